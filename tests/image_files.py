"""Image files in memory, good ones and the hostile kind."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Return the PNG of pixels."""
    return saved(Image.fromarray(pixels), "PNG")


def png_with_profile(pixels: np.ndarray, profile: bytes) -> bytes:
    """Return the PNG of pixels with an ICC profile."""
    return saved(Image.fromarray(pixels), "PNG", icc_profile=profile)


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    """Return random uint8 [height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_with_header(width: int, height: int) -> bytes:
    """Return a PNG that says it is of that size and holds next to nothing."""

    return raw_png(width, height, 8, 2, b"\0" * 64)


def raw_png(width: int, height: int, bits: int, kind: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """Return a PNG of that bit depth and colour type; `rows` begin with their filter, 0 for none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    chunks += [(b"tRNS", transparent)] if transparent else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*entry) for entry in chunks)


def raw_tiff(tags: dict[int, int], data: bytes) -> bytes:
    """Return a little-endian TIFF of one frame, whose strip or tile is `data` at byte 8."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def icc_profile(space: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile of version 2 and that class (ICC.1:2001-04) with these tags; Lab connects if it prints."""
    table, body = b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(content))
        body += content
    connection = b"Lab " if kind == b"prtr" else b"XYZ "
    size = 132 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02000000, kind, space, connection) + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)  # the white of D50
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body

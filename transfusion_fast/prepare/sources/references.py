"""Image files as records hold or name them: bytes, base64, or a path on this machine."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.sources.base import MAX_BYTES

_TO_STANDARD = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet
_NAMES = ("bytes", "base64", "path", "image", "url", "file_name")  # of the keys of an object, the first that is set
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{256,}=*\s*", re.ASCII)  # too long for a path without a dot
_REMOTE = ("http://", "https://", "s3://", "gs://", "hf://")


def check_root(root: Path | None) -> None:
    """Raise InputError for an `--image-root` that is no folder, below which no image can be."""
    if root is not None and not root.is_dir():
        raise InputError(f"--image-root must be a folder, got {root}; give the one that paths are relative to")


def image_bytes(value: Any, folder: Path) -> bytes:
    """Return the bytes of an image file.

    Args:
        value: the bytes; a path, base64 or a data URI; or an object such as `{"path": ..}` or `{"base64": ..}`.
        folder: the folder that paths are relative to and must not lead out of.

    Raises:
        Rejected: the image is missing, lies elsewhere, or cannot be read.
    """
    match value:
        case bytes():
            return value
        case str() if value.startswith("data:"):
            return decode_base64(value)
        case str() if value.lower().startswith(_REMOTE):
            raise Rejected("image not downloaded", f"{value!r:.80} must be a file on this machine")
        case str() if _BASE64.fullmatch(value):
            return decode_base64(value)
        case str():
            path = unquote(value.removeprefix("file://")) if value.startswith("file://") else value
            return _read_image(path, folder)
        case {"base64": str(data)}:
            return decode_base64(data)
        case dict():
            named = next((value[name] for name in _NAMES if value.get(name) is not None), None)
            if named is not None and not isinstance(named, dict):
                return image_bytes(named, folder)
    raise Rejected("no image", f"{value!r:.60} is neither bytes nor base64 nor a path")


def decode_base64(data: str) -> bytes:
    """Return the bytes of base64 (RFC 4648) in either alphabet, padded or not, in lines, alone or as a data URI."""
    head, comma, content = data.partition(",")
    if not comma:
        content = data
    elif not (head.startswith("data:") and head.endswith(";base64")):
        raise Rejected("not base64", f"it begins with {head!r:.40}")
    try:
        letters = b"".join(unquote_to_bytes(content).split()).rstrip(b"=").translate(_TO_STANDARD)
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("not base64", str(error)) from error


def _read_image(name: str, folder: Path) -> bytes:
    """Return the bytes of a file whose written path lies below `folder`; links there are the owner's and followed."""
    try:
        if "\0" in name:
            raise ValueError("it has a zero byte")  # where normpath may stop
        path = Path(os.path.normpath(folder.resolve() / name))
        if not any(path.is_relative_to(known) for known in (folder.resolve(), os.path.abspath(folder))):
            raise Rejected("path leads out", f"image {name!r:.80} must lie below {folder}")
        if not path.is_file():
            raise Rejected("image missing", f"{name!r:.80} below {folder}; name another folder with --image-root")
        return read_limited(path)
    except Rejected:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte in it, or a circle of links
        raise Rejected("image unreadable", f"{name!r:.80} ({error})") from error


def read_limited(path: Path) -> bytes:
    """Return the content of a file; Rejected if it has more than MAX_BYTES."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise Rejected("file too large", f"{size} bytes of {path.name!r:.80}")
    return path.read_bytes()

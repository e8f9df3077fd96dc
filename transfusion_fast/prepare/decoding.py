"""Decoding of image files to upright sRGB pixels, within limits; nothing that a file says is executed."""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from transfusion_fast.errors import Rejected, Repaired

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024
HEADROOM = 1.5
"""A JPEG is decoded at a half, a quarter or an eighth if that leaves at least so many times the size that is needed."""

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow widens grey values of 2 and 4 bits, though not the one that a PNG calls transparent."""
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_PROFILED = {"RGB ": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
"""Modes of pixels that an ICC profile can describe, by its colour space."""
_ORIENTATION = 0x0112  # a tag of EXIF; the others are of TIFF
_BITS, _PHOTOMETRIC, _BLACK_IS_ZERO, _TILE_SIDES = 258, 262, 1, (322, 323)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each orientation (CIPA DC-008, Exif 2.32, 4.6.4)."""
# Decoders raise about anything on damaged data.
_DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, ArithmeticError, LookupError, EOFError, MemoryError, AttributeError,
    RuntimeError, struct.error,
)  # fmt: skip
_JPEG = ("JPEG", "MPO")  # MPO: several JPEGs in a file, as cameras write them
_JPEG_END = b"\xff\xd9"
_JPEG_HEADER = re.compile(rb"\xff+([\x02-\xcf\xda-\xfe])")  # neither stuffing nor a restart of entropy-coded data
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA

Scale = Callable[[int, int], float]
"""The factor by which an image of (height, width) will be scaled."""
SizeCheck = Callable[[int, int], None]
"""A function that raises Rejected for an image of (width, height) by its header; two sides may be exchanged."""


@dataclass(frozen=True)
class DecodedImage:
    """The pixels of an image file, and what was repaired to get them."""

    image: Image.Image
    """RGB, sRGB, upright by its EXIF, transparent parts over white, 16 bits cut to 8."""
    size: tuple[int, int]
    """Height and width of the image at its full size."""
    reduction: int = 1
    """The full size divided by that of `image`, whose last row and column may be those of a part of a pixel."""
    repairs: tuple[Repaired, ...] = ()

    @property
    def pixels(self) -> np.ndarray:
        """The values of `image`, uint8 [height, width, 3]."""
        return np.asarray(self.image)


def decode_image(
    data: bytes, scale: Scale | None = None, max_pixels: int = MAX_PIXELS, check: SizeCheck = lambda width, height: None
) -> DecodedImage:
    """Decode the first frame of a file of `FORMATS`, which its content tells and not its name.

    With `scale`, a JPEG may be decoded at a smaller size, with at least `HEADROOM` times the pixels that are needed.

    Raises:
        Rejected: not an image of `FORMATS`, more than `max_pixels` pixels by its header, refused by `check`, or
            damaged.
    """
    check_size = partial(_check_size, max_pixels=max_pixels, check=check)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which are checked below, and odd metadata
            try:
                return _decode(data, scale, check_size)
            except OSError as error:
                if not data.startswith(b"\xff\xd8") or "truncated" not in str(error):
                    raise
                return _decode_without_end(data, scale, check_size)
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("image too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("not an image", f"must be {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        raise Rejected("image damaged", str(error) or type(error).__name__) from error


def _decode(data: bytes, scale: Scale | None, check_size: Callable[[Image.Image], None]) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image)
        width, height = image.size
        reduction = 1 if scale is None or image.format not in _JPEG else _reduce(image, scale(height, width))
        grey_step = _GREY_STEPS.get(str(image.tile[0].args), 1) if image.tile else 1
        image.load()
        pixels, repairs = _srgb(image, grey_step)
        orientation = _orientation(image)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    if reduction == 1 or orientation in _UPRIGHT:
        width, height = (side * reduction for side in pixels.size)
    return DecodedImage(pixels, (height, width), reduction, repairs)


def _check_size(image: Image.Image, max_pixels: int, check: SizeCheck) -> None:
    tags = _tiff_tags(image)
    tile = [int(tags.get(tag, 1)) for tag in _TILE_SIDES]  # is decoded as a whole, however small the image is
    for width, height in (image.size, tile):
        if width * height > max_pixels:
            raise Rejected("image too large", f"{width} x {height} pixels are more than {max_pixels}")
    check(*image.size)


def _tiff_tags(image: Image.Image) -> Any:
    return image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]


def _reduce(image: Image.Image, scale: float) -> int:
    """Have a JPEG decoded at 1 / 8, 1 / 4 or 1 / 2 by its own DCT; return the reduction."""
    # If a part of a pixel at the end came to the beginning, all others would lie beside their places.
    turned = _orientation(image) in _UPRIGHT
    width, height = image.size
    for reduction in (8, 4, 2):
        large = reduction * scale * HEADROOM <= 1 and reduction <= min(width, height)
        if large and not (turned and (width % reduction or height % reduction)):
            image.draft(None, (width // reduction, height // reduction))
            return reduction
    return 1


def _orientation(image: Image.Image) -> object:
    """Return the orientation that the EXIF names. No other tag is read: it may be malformed without harm."""
    try:
        return image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return None


def _decode_without_end(data: bytes, scale: Scale | None, check_size: Callable[[Image.Image], None]) -> DecodedImage:
    """Decode a JPEG that stops early; Rejected if more than its end marker is missing.

    Nothing more is missing if no pixel depends on what follows, and all scans are there: decoders give coarse pixels
    without the later ones.
    """
    data = data.rstrip(b"\xff")  # perhaps half of the end marker
    tails = b"", bytes(range(254, 0, -1))
    short, long = (_decode(data + tail + _JPEG_END, None, check_size).pixels for tail in tails)
    if not np.array_equal(short, long) or not _has_all_scans(data):
        raise Rejected("image damaged", "the file is cut off")
    decoded = _decode(data + _JPEG_END, scale, check_size)
    return replace(decoded, repairs=(Repaired("end marker", "the JPEG lacks it and nothing else"), *decoded.repairs))


def _has_all_scans(data: bytes) -> bool:
    """Return whether the scans of a JPEG hold every bit of every coefficient (ITU-T T.81, frame and scan headers)."""
    missing: dict[int, np.ndarray] = {}
    at = 2
    while header := _JPEG_HEADER.search(data, at):
        kind, at = header[1][0], header.end() + int.from_bytes(data[header.end() : header.end() + 2], "big")
        body = data[header.end() + 2 : at]
        if kind in _JPEG_FRAMES:
            missing = {component: np.ones(64, bool) for component in body[6::3]}
        elif kind == _JPEG_SCAN:
            first, last, bits = body[-3:]
            for component in body[1:-3:2]:
                missing[component][first : last + 1] &= bits & 15 > 0
    return bool(missing) and not any(coefficients.any() for coefficients in missing.values())


def _srgb(image: Image.Image, grey_step: int) -> tuple[Image.Image, tuple[Repaired, ...]]:
    """Return an image as RGB over white, and what was repaired."""
    repairs: tuple[Repaired, ...] = ()
    colour, alpha = _colour_and_alpha(image, grey_step)
    if "icc_profile" in image.info:
        try:
            transform = _transform(image.info["icc_profile"], colour.mode)
            colour = colour if transform is None else transform.apply(colour.convert(transform.input_mode))
        except (*_DAMAGE, ImageCms.PyCMSError) as error:
            repairs = (Repaired("colour profile", f"it is ignored ({error})"),)
    colour = colour.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha)
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return colour, repairs


def _colour_and_alpha(image: Image.Image, grey_step: int) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of an image as L, RGB or CMYK, and its opacity as L if it has any."""
    transparency = image.info.get("transparency")
    if image.mode in (*_SIXTEEN_BIT, "F"):
        _check_range(image)
        values = np.asarray(image)  # Pillow would clip what is above 255
        alpha = None if transparency is None else Image.fromarray(np.where(values == transparency, 0, 255).astype("u1"))
        return Image.fromarray((values >> 8).astype(np.uint8)), alpha
    if image.mode in _TRANSPARENT or transparency is not None:
        if isinstance(transparency, int) and image.mode == "L":
            image.info["transparency"] = transparency * grey_step
        whole = image.convert("RGBA")
        return whole.convert("L" if image.mode in ("L", "LA", "La") else "RGB"), whole.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


def _check_range(image: Image.Image) -> None:
    """Check that black is 0 and white is 65535 in grey values of more than 8 bits."""
    tags = _tiff_tags(image)
    is_plain = (tags.get(_BITS), tags.get(_PHOTOMETRIC)) == ((16,), _BLACK_IS_ZERO) and image.mode != "I"
    if image.mode == "F" or not (is_plain or image.format != "TIFF"):
        raise Rejected("unknown range of grey", f"{image.mode} in {image.format}; convert it to 8 or 16 bits")


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion from a profile to sRGB; None if it would change no value by more than rounding does."""
    if profile is None:
        raise ValueError("it cannot be decompressed")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if mode not in _PROFILED.get(space, ()):
        raise ValueError(f"it is for {space.strip()} and the image is {mode}")
    mode = _PROFILED[space][0]
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION  # as editors do
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(grid) if mode == "RGB" else Image.fromarray(grid[..., 0])
    change = np.asarray(transform.apply(before), np.int16) - np.asarray(before.convert("RGB"))
    return transform if np.abs(change).max() > 1 else None

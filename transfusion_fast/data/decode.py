"""Image files from anywhere to uint8 RGB arrays: nothing is decoded before its header was believed to be affordable.

Of the formats that photographs come in: JPEG, PNG and WebP, told by their content, never by their name. What cannot be
decoded raises `Rejected`, whose reason is one of a few, to be counted.
"""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from transfusion_fast.data.source import Rejected

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What decoders raise on damaged data: about anything.
_DAMAGE = (
    OSError, ValueError, TypeError, SyntaxError, ArithmeticError, LookupError, EOFError, MemoryError, AttributeError,
    struct.error,
)  # fmt: skip
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [height, width, 3], upright as its EXIF says, transparent parts over white, 16 bits cut to 8.

    Raises:
        Rejected: not an image of `FORMATS`, more than `max_pixels` pixels by its header, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are checked below, and of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Rejected("image too large", f"{width} x {height} pixels are more than {max_pixels}")
                image.load()
                return _rgb(_upright(image))
    except Image.DecompressionBombError as error:
        raise Rejected("image too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("not an image", f"must be {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected("image damaged", str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF says it was held. Only that tag is read: any other may be malformed without harm to the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        # Pillow would clip what is above 255 instead.
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))

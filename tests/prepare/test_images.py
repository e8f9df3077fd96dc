"""Image files of all kinds, and of the hostile kind, become upright RGB of the size that is stored, or are rejected."""

import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import picture, png, png_with_header, saved
from PIL import Image

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.decoding import DecodedImage, decode_image
from transfusion_fast.prepare.images import ImageRule

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
STORED = {  # how an upright picture is stored for each orientation: row 0 and column 0 of the file, Exif 2.32, 4.6.4
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p.swapaxes(0, 1)[::-1],  # right, top
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda p: p.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


def exif(orientation, **others):
    found = Image.Exif()
    for tag, value in {0x0112: orientation, 0x0100: others.get("width"), 0x010F: others.get("maker")}.items():
        if value is not None:
            found[tag] = value
    return found


def reason(data, **options):
    with pytest.raises(Rejected) as caught:
        decode_image(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def fitted(rule, pixels):
    return rule(DecodedImage(Image.fromarray(pixels), pixels.shape[:2]))


def with_palette(colours, **options):
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(range(len(colours)))
    return saved(image, "PNG", **options)


GREY = picture()[..., 0]
HALF_CLEAR = np.array([[[*RED, 0], [*RED, 255]]], np.uint8)
SIXTEEN = np.array([[0, 0x1200, 0xFFFF]], np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(picture()), picture()),
        (saved(Image.fromarray(picture()), "WEBP", lossless=True), picture()),
        (png(GREY), np.repeat(GREY[..., None], 3, 2)),
        (saved(Image.new("1", (2, 2), 1), "PNG"), np.full((2, 2, 3), 255)),
        (with_palette([BLUE, GREEN]), [[BLUE, GREEN]]),
        (png(HALF_CLEAR), [[WHITE, RED]]),
        (with_palette([RED], transparency=0), [[WHITE]]),
        (png(SIXTEEN), [[[0] * 3, [0x12] * 3, [0xFF] * 3]]),
    ],
    ids=["PNG", "WEBP", "grey", "bilevel", "palette", "transparent", "transparent palette", "16 bits"],
)
def test_images_of_every_mode_become_rgb(data, expected):
    np.testing.assert_array_equal(decode_image(data).pixels, np.asarray(expected, np.uint8), strict=True)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpeg_and_cmyk_jpeg_show_their_colour(mode):
    decoded = decode_image(saved(Image.new("RGB", (16, 16), RED).convert(mode), "JPEG", quality=95)).pixels
    assert decoded.shape == (16, 16, 3) and np.abs(decoded.astype(int) - RED).max() < 12


@pytest.mark.parametrize("orientation", STORED)
def test_images_of_each_exif_orientation_become_upright(orientation):
    stored = np.ascontiguousarray(STORED[orientation](picture(4, 6)))
    data = saved(Image.fromarray(stored), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode_image(data).pixels, picture(4, 6))


def test_a_malformed_exif_tag_costs_neither_the_image_nor_its_orientation():
    data = bytearray(saved(Image.fromarray(picture(4, 6)), "PNG", exif=exif(6, width=40)))
    order = "little" if b"II*" in data else "big"
    chunk = data.index(b"eXIf")
    tag = data.index((0x0100).to_bytes(2, order), chunk)
    data[tag + 2 : tag + 4] = (2).to_bytes(2, order)  # the width as letters
    end = chunk + 4 + int.from_bytes(data[chunk - 4 : chunk], "big")
    data[end : end + 4] = zlib.crc32(data[chunk:end]).to_bytes(4, "big")
    assert np.array_equal(decode_image(bytes(data)).pixels, np.rot90(picture(4, 6), -1))


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (9000, 9000)])
def test_the_size_in_the_header_is_checked_before_anything_is_decoded(size):
    assert reason(png_with_header(*size)) == "image too large"
    assert reason(png(picture(9, 9)), max_pixels=80) == "image too large"
    assert reason(png_with_header(5000, 5000)) == "image damaged"  # a small file that does not hold what it says


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_damaged_files_raise_nothing_but_rejections(kind):
    data = saved(Image.fromarray(picture(40, 40)), kind)
    whole = decode_image(data).pixels
    for end in np.linspace(0, len(data) - 1, 20).astype(int).tolist():
        try:
            found = decode_image(data[:end]).pixels
            assert np.array_equal(found, whole)  # nothing but what follows the pixels was missing
        except Rejected as error:
            assert error.reason in ("image damaged", "not an image")
    data = bytearray(saved(Image.fromarray(picture(40, 40)), kind, exif=exif(6, width=40, maker="maker")))
    start = data.find(b"Exif") if kind == "JPEG" else 0
    generator = np.random.default_rng(1)
    for number in range(300):
        flipped = bytearray(data)
        # Half of them in the first bytes, where headers and EXIF are.
        end = len(data) if number % 2 else min(len(data), start + 100)
        for at in generator.integers(start, end, 4):
            flipped[at] ^= int(generator.integers(1, 256))
        with suppress(Rejected):
            assert decode_image(bytes(flipped)).pixels.shape[2] == 3


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    + [saved(Image.new("RGB", (16, 16)), kind) for kind in ("PPM", "ICO", "TGA", "PCX")],
)
def test_other_content_and_other_formats_are_no_images(data):
    assert reason(data) == "not an image"


def test_a_crop_is_the_middle_at_the_given_size():
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 8:24] = 200
    assert np.array_equal(fitted(ImageRule("crop", 16, 4), pixels), np.full((16, 16, 3), 200))
    for height, width in ((5, 7), (100, 8), (8, 100), (1, 300)):
        assert fitted(ImageRule("crop", 8, 4), np.zeros((height, width, 3), dtype=np.uint8)).shape == (8, 8, 3)
    with pytest.raises(InputError, match="image size must be a positive multiple of 4, got 10"):
        ImageRule("crop", 10, 4)


@given(st.integers(4, 200), st.integers(4, 200))
def test_native_images_keep_their_shape_within_the_limit_of_pixels(height, width):
    rule = ImageRule("native", 32, 4)
    try:
        rows, columns, _ = fitted(rule, np.zeros((height, width, 3), dtype=np.uint8)).shape
    except Rejected as rejected:
        assert rejected.reason == "image narrower than a patch" and max(height, width) > 8 * min(height, width)
        return
    assert rows % 4 == columns % 4 == 0 and rows * columns <= 32 * 32
    scale = min(1, 32 / (height * width) ** 0.5)
    lost = np.array([height * scale - rows, width * scale - columns])
    assert (lost > -1e-6).all() and (lost < 4).all()


def test_a_small_native_image_is_cut_and_not_scaled():
    assert np.array_equal(fitted(ImageRule("native", 32, 4), picture(10, 9)), picture(10, 9)[1:9, :8])


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_thin_image_takes_no_more_memory_than_it_has_pixels(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels.reshape(-1, 3)[9_995:10_005] = 200
    tracemalloc.start()
    square = fitted(ImageRule("crop", 256, 16), pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert square.shape == (256, 256, 3) and square.min() == 200  # the middle pixel, enlarged
    assert peak < 1 << 20
    with pytest.raises(Rejected, match="image narrower than a patch"):
        fitted(ImageRule("native", 256, 16), pixels)

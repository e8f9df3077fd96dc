"""Image files of all kinds, and of the hostile kind, become upright RGB of the size that is stored, or are rejected."""

import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import picture, png_with_header, saved
from PIL import Image

from transfusion_fast.errors import InputError, Rejected
from transfusion_fast.prepare.images import ImageRule, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION, WIDTH, MAKER = 0x0112, 0x0100, 0x010F
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


def exif(**tags):
    found = Image.Exif()
    for name, value in tags.items():
        found[globals()[name]] = value
    return found


def reason(data, **options):
    with pytest.raises(Rejected) as caught:
        decode_image(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_their_pixels(kind, options):
    decoded = decode_image(saved(Image.fromarray(picture()), kind, **options))
    np.testing.assert_array_equal(decoded, picture(), strict=True)


def test_jpeg_and_cmyk_jpeg_show_their_colour():
    for mode in ("RGB", "CMYK"):
        decoded = decode_image(saved(Image.new("RGB", (16, 16), RED).convert(mode), "JPEG", quality=95))
        assert decoded.shape == (16, 16, 3) and np.abs(decoded.astype(int) - RED).max() < 12


def test_grey_bilevel_and_palette_images_become_rgb():
    grey = Image.fromarray(picture()[..., 0])
    assert np.array_equal(decode_image(saved(grey, "PNG")), np.repeat(np.asarray(grey)[..., None], 3, 2))
    assert decode_image(saved(Image.new("1", (2, 2), 1), "PNG")).min() == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([*BLUE, *GREEN])
    palette.putpixel((1, 0), 1)
    assert decode_image(saved(palette, "PNG")).tolist() == [[[*BLUE], [*GREEN]]]


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    assert decode_image(saved(image, "PNG")).tolist() == [[[*WHITE], [*RED]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(RED)
    assert decode_image(saved(palette, "PNG", transparency=0)).tolist() == [[[*WHITE]]]


def test_sixteen_bits_are_cut_to_eight():
    values = np.array([[0, 0x1200, 0xFFFF]], dtype=np.uint16)
    assert decode_image(saved(Image.fromarray(values), "PNG")).tolist() == [[[0] * 3, [0x12] * 3, [0xFF] * 3]]


@pytest.mark.parametrize("orientation", STORED)
def test_images_of_each_exif_orientation_become_upright(orientation):
    stored = np.ascontiguousarray(STORED[orientation](picture(4, 6)))
    data = saved(Image.fromarray(stored), "PNG", exif=exif(ORIENTATION=orientation))
    np.testing.assert_array_equal(decode_image(data), picture(4, 6))


def test_a_malformed_exif_tag_costs_neither_the_image_nor_its_orientation():
    data = bytearray(saved(Image.fromarray(picture(4, 6)), "PNG", exif=exif(ORIENTATION=6, WIDTH=40)))
    order = "little" if b"II*" in data else "big"
    chunk = data.index(b"eXIf")
    tag = data.index(WIDTH.to_bytes(2, order), chunk)
    data[tag + 2 : tag + 4] = (2).to_bytes(2, order)  # the width as letters
    end = chunk + 4 + int.from_bytes(data[chunk - 4 : chunk], "big")
    data[end : end + 4] = zlib.crc32(data[chunk:end]).to_bytes(4, "big")
    assert np.array_equal(decode_image(bytes(data)), np.rot90(picture(4, 6), -1))


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (9000, 9000)])
def test_the_size_in_the_header_is_checked_before_anything_is_decoded(size):
    assert reason(png_with_header(*size)) == "image too large"
    assert reason(saved(Image.new("RGB", (9, 9)), "PNG"), max_pixels=80) == "image too large"
    assert reason(png_with_header(5000, 5000)) == "image damaged"  # a small file that does not hold what it says


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_rejected_or_complete(kind):
    data = saved(Image.fromarray(picture(40, 40)), kind)
    whole = decode_image(data)
    for end in np.linspace(0, len(data) - 1, 20).astype(int).tolist():
        try:
            decoded = decode_image(data[:end])
        except Rejected as error:
            assert error.reason in ("image damaged", "not an image")
        else:
            assert np.array_equal(decoded, whole)  # nothing but what follows the pixels was missing


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_flipped_bytes_raise_nothing_but_rejections(kind):
    tags = exif(ORIENTATION=6, WIDTH=40, MAKER="maker")
    data = bytearray(saved(Image.fromarray(picture(40, 40)), kind, exif=tags))
    start = data.find(b"Exif") if kind == "JPEG" else 0
    generator = np.random.default_rng(1)
    for number in range(300):
        flipped = bytearray(data)
        # Half of them in the first bytes, where headers and EXIF are.
        end = len(data) if number % 2 else min(len(data), start + 100)
        for at in generator.integers(start, end, 4):
            flipped[at] ^= int(generator.integers(1, 256))
        with suppress(Rejected):
            assert decode_image(bytes(flipped)).shape[2] == 3


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    + [saved(Image.new("RGB", (16, 16)), kind) for kind in ("GIF", "TIFF", "BMP", "PPM", "ICO")],
)
def test_other_content_and_other_formats_are_no_images(data):
    assert reason(data) == "not an image"


def test_a_crop_is_the_middle_at_the_given_size():
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 8:24] = 200
    assert np.array_equal(ImageRule("crop", 16, 4)(pixels), np.full((16, 16, 3), 200))
    for height, width in ((5, 7), (100, 8), (8, 100), (1, 300)):
        assert ImageRule("crop", 8, 4)(np.zeros((height, width, 3), dtype=np.uint8)).shape == (8, 8, 3)


@given(st.integers(4, 200), st.integers(4, 200))
def test_native_images_keep_their_shape_within_the_limit_of_pixels(height, width):
    rule = ImageRule("native", 32, 4)
    try:
        rows, columns, _ = rule(np.zeros((height, width, 3), dtype=np.uint8)).shape
    except Rejected as rejected:
        assert rejected.reason == "image too thin" and max(height, width) > 8 * min(height, width)
        return
    assert rows % 4 == columns % 4 == 0 and rows * columns <= 32 * 32
    scale = min(1, 32 / (height * width) ** 0.5)
    lost = np.array([height * scale - rows, width * scale - columns])
    assert (lost > -1e-6).all() and (lost < 4).all()


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_thin_image_takes_no_more_memory_than_it_has_pixels(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels.reshape(-1, 3)[9_995:10_005] = 200
    tracemalloc.start()
    square = ImageRule("crop", 256, 16)(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert square.shape == (256, 256, 3) and square.min() == 200  # the middle pixel, enlarged
    assert peak < 1 << 20
    with pytest.raises(Rejected, match="image too thin"):
        ImageRule("native", 256, 16)(pixels)


def test_a_small_native_image_is_cut_and_not_scaled():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 3), dtype=np.uint8)
    assert np.array_equal(ImageRule("native", 32, 4)(pixels), pixels[1:9, :8])


def test_sizes_that_cannot_be_cut_into_patches_are_refused():
    with pytest.raises(InputError, match="image size must be a positive multiple of 4, got 10"):
        ImageRule("crop", 10, 4)

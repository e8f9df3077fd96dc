"""Image files of all kinds, and of the hostile kind, come out as upright RGB or are rejected by name."""

import zlib
from contextlib import suppress

import numpy as np
import pytest
from image_files import picture, png_with_header, saved
from PIL import Image

from transfusion_fast.prepare.images import Rejected, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def reason(data, **options):
    with pytest.raises(Rejected) as caught:
        decode_image(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_out_as_they_went_in(kind, options):
    pixels = picture()
    decoded = decode_image(saved(Image.fromarray(pixels), kind, **options))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, pixels)


def test_jpeg_and_cmyk_jpeg_show_their_colour():
    for mode in ("RGB", "CMYK"):
        image = Image.new("RGB", (16, 16), RED).convert(mode)
        decoded = decode_image(saved(image, "JPEG", quality=95))
        assert decoded.shape == (16, 16, 3) and np.abs(decoded.astype(int) - RED).max() < 12


def test_grey_bilevel_and_palette_images_become_rgb():
    grey = Image.fromarray(picture()[..., 0])
    assert np.array_equal(decode_image(saved(grey, "PNG")), np.repeat(np.asarray(grey)[..., None], 3, 2))
    assert decode_image(saved(Image.new("1", (2, 2), 1), "PNG")).min() == 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([*BLUE, *GREEN])
    palette.putpixel((1, 0), 1)
    assert decode_image(saved(palette, "PNG")).tolist() == [[[*BLUE], [*GREEN]]]


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (2, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    assert decode_image(saved(image, "PNG")).tolist() == [[[*WHITE], [*RED]]]
    palette = Image.new("P", (1, 1))
    palette.putpalette(RED)
    assert decode_image(saved(palette, "PNG", transparency=0)).tolist() == [[[*WHITE]]]


def test_sixteen_bits_are_cut_to_eight():
    values = np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)
    decoded = decode_image(saved(Image.fromarray(values), "PNG"))
    assert decoded.tolist() == [[[0] * 3, [0x12] * 3, [0xFF] * 3]]


def test_exif_turns_the_image_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    pixels = picture(4, 6)
    decoded = decode_image(saved(Image.fromarray(pixels), "PNG", exif=exif))
    assert np.array_equal(decoded, np.rot90(pixels, -1))


def test_the_header_is_checked_before_anything_is_decoded():
    assert reason(png_with_header(100_000, 100_000)) == "image too large"
    assert reason(png_with_header(2**31 - 1, 2**31 - 1)) == "image too large"
    assert reason(png_with_header(9000, 9000)) == "image too large"
    assert reason(saved(Image.new("RGB", (9, 9)), "PNG"), max_pixels=80) == "image too large"


def test_a_small_file_does_not_become_a_large_one():
    assert reason(png_with_header(5000, 5000)) == "image damaged"  # what it says is not what it holds


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
def test_no_flipped_bytes_raise_anything_else(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x0100], exif[0x010F] = 6, 40, "maker"
    data = bytearray(saved(Image.fromarray(picture(40, 40)), kind, exif=exif))
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


def test_a_malformed_tag_of_exif_costs_neither_the_image_nor_its_turn():
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 40
    pixels = picture(4, 6)
    data = bytearray(saved(Image.fromarray(pixels), "PNG", exif=exif))
    order = "little" if b"II*" in data else "big"
    tag = data.index((0x0100).to_bytes(2, order), data.index(b"eXIf"))
    data[tag + 2 : tag + 4] = (2).to_bytes(2, order)  # width as letters
    length = int.from_bytes(data[data.index(b"eXIf") - 4 : data.index(b"eXIf")], "big")
    chunk = data.index(b"eXIf")
    data[chunk + 4 + length : chunk + 8 + length] = zlib.crc32(data[chunk : chunk + 4 + length]).to_bytes(4, "big")
    assert np.array_equal(decode_image(bytes(data)), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"],
)
def test_other_content_is_no_image_whatever_its_name(data):
    assert reason(data) == "not an image"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    assert reason(saved(Image.new("RGB", (16, 16)), kind)) == "not an image"

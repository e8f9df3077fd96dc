"""Image files as cameras, editors and crawlers write them show the colours that their readers would see."""

import io
import re
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from image_files import icc_profile, picture, png_with_profile, raw_png, raw_tiff, saved
from PIL import Image

from transfusion_fast.errors import Rejected
from transfusion_fast.prepare.decoding import HEADROOM, DecodedImage, decode_image
from transfusion_fast.prepare.images import ImageRule

RED = (255, 0, 0)


def smooth(height, width):
    """A picture of soft shapes, hard lines and some noise, uint8 [height, width, 3]."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(pixels + generator.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    pixels[:, ::97], pixels[::131] = 0, 255
    return pixels


def reason(data, **options):
    with pytest.raises(Rejected) as caught:
        decode_image(data, **options)
    return caught.value.reason


# Colour profiles.


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


# The primaries of sRGB and of Adobe RGB (1998), adapted to D50.
SRGB = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
ADOBE = [(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)]


def rgb_profile(primaries, gamma):
    tags = {name + b"XYZ": xyz(*values) for name, values in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return icc_profile(b"RGB ", b"mntr", tags | {name + b"TRC": curve(gamma) for name in (b"r", b"g", b"b")})


def expected_srgb(pixels, primaries, gamma):
    """The same colours by the formulas of IEC 61966-2-1."""
    linear = (pixels / 255.0) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("primaries", [ADOBE, [SRGB[1], SRGB[0], SRGB[2]]], ids=["Adobe RGB", "swapped"])
def test_colours_of_a_profile_become_those_of_srgb(kind, primaries):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(picture(20, 20)), kind, icc_profile=rgb_profile(primaries, 2.2), **options)
    decoded = decode_image(data)
    assert not decoded.repairs
    assert np.abs(decoded.pixels - expected_srgb(picture(20, 20), primaries, 2.2)).max() < 3


def test_a_profile_that_is_srgb_changes_no_value():
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(png_with_profile(picture(), srgb)).pixels, picture())


def test_a_profile_holds_for_transparent_and_grey_images_too():
    swapped = rgb_profile([SRGB[1], SRGB[0], SRGB[2]], 2.2)
    clear = np.dstack([picture(), np.full((6, 8), 255, np.uint8)])
    clear[0, 0, 3] = 0
    decoded = decode_image(png_with_profile(clear, swapped)).pixels.astype(int)
    assert decoded[0, 0].tolist() == [255] * 3 and np.abs(decoded - picture()[..., [1, 0, 2]])[1:].max() < 12
    grey = picture()[..., 0]
    expected = expected_srgb(np.repeat(grey[..., None], 3, 2), SRGB, 1.5)
    for profile in (icc_profile(b"GRAY", b"mntr", {b"kTRC": curve(1.5)}), rgb_profile(SRGB, 1.5)):
        assert np.abs(decode_image(png_with_profile(grey, profile)).pixels - expected).max() < 3


def test_inks_of_a_profile_become_their_colours():
    """In this profile cyan prints red, black prints black, and everything else leaves the paper white, if yellowish."""
    red, black, white = (138, 209, 198), (0, 128, 128), (255, 128, 128)  # L, a and b of a lut8Type
    grid = b"".join(bytes(black if point & 1 else red if point & 8 else white) for point in range(16))
    identity, ramp = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9))), bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + grid + 3 * ramp
    profile = icc_profile(b"CMYK", b"prtr", {b"A2B0": lut, b"wtpt": xyz(0.8, 0.8, 0.5)})
    for inks, colour in (((255, 0, 0, 0), RED), ((0, 255, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))):
        for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
            data = saved(Image.new("CMYK", (16, 16), inks), kind, icc_profile=profile, **options)
            assert np.abs(decode_image(data).pixels.astype(int) - colour).max() < 8


@pytest.mark.parametrize("profile", [b"broken", icc_profile(b"CMYK", b"prtr", {}), rgb_profile(SRGB, 1.0)[:200]],
                         ids=["no profile", "of other colours", "cut"])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_ignored_and_counted(profile):
    decoded = decode_image(png_with_profile(picture(), profile))
    assert np.array_equal(decoded.pixels, picture())
    assert [repaired.reason for repaired in decoded.repairs] == ["colour profile"]


# Formats.


def test_the_first_frame_of_each_format_is_read():
    first, second = Image.fromarray(picture(20, 24)), Image.new("RGB", (24, 20))
    frames = {"save_all": True, "append_images": [second]}
    exact = [("BMP", {}), ("PNG", frames), *(("TIFF", {"compression": kind, **frames})
             for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"))]  # fmt: skip
    for kind, options in exact:
        assert np.array_equal(decode_image(saved(first, kind, **options)).pixels, picture(20, 24)), (kind, options)
    palette = first.quantize(200)
    decoded = decode_image(saved(palette, "GIF", save_all=True, append_images=[palette.point(lambda _: 0)])).pixels
    assert np.array_equal(decoded, np.asarray(palette.convert("RGB")))
    flat = Image.new("RGB", (64, 48), (200, 60, 30))
    for kind in ("AVIF", "MPO"):
        decoded = decode_image(saved(flat, kind, save_all=True, append_images=[Image.new("RGB", (64, 48))])).pixels
        assert decoded.shape == (48, 64, 3) and np.abs(decoded.astype(int) - (200, 60, 30)).max() < 4


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "JPEG"])
def test_an_orientation_is_undone_once_in_each_format(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24] = 255
    decoded = decode_image(saved(Image.fromarray(pixels), kind, exif=exif)).pixels
    assert decoded.shape == (48, 32, 3) and decoded[:20].min() > 200 and decoded[28:].max() < 50


@pytest.mark.parametrize(("bits", "rows", "transparent"), [
    (1, b"\0\x40", 1), (2, b"\0\x60", 2), (4, b"\0\x1a", 10), (8, b"\0\x10\x20", 32), (16, b"\0\x10\0\x20\1", 0x2001),
])  # fmt: skip
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(bits, rows, transparent):
    first, second = decode_image(raw_png(2, 1, bits, 0, rows, transparent.to_bytes(2, "big"))).pixels[0].tolist()
    assert first == [{1: 0, 2: 85, 4: 17, 8: 16, 16: 16}[bits]] * 3 and second == [255] * 3


@pytest.mark.parametrize("image", [Image.new("F", (4, 4)), Image.new("I", (4, 4))], ids=["floats", "32 bits"])
def test_grey_values_of_which_no_one_knows_the_white_are_rejected(image):
    assert reason(saved(image, "TIFF")) == "unknown range of grey"
    sixteen = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert (decode_image(saved(sixteen, "TIFF")).pixels == 0x80).all()


# Limits.


@pytest.mark.parametrize("kind", ["AVIF", "GIF", "BMP", "TIFF", "PNG", "JPEG", "WEBP"])
def test_an_image_of_too_many_pixels_is_not_decoded(kind, monkeypatch):
    data = saved(Image.new("L" if kind != "WEBP" else "RGB", (1024, 1024)), kind)
    with Image.open(io.BytesIO(data)) as image:
        monkeypatch.setattr(type(image), "load", pytest.fail)
    assert reason(data, max_pixels=1024 * 1024 - 1) == "image too large"


def test_frames_and_tiles_that_are_larger_than_their_image_are_limited():
    gif = bytearray(saved(Image.new("L", (2000, 2000)), "GIF"))
    gif[6:10] = struct.pack("<HH", 10, 10)  # the screen; the frame is as large as before
    assert reason(bytes(gif), max_pixels=1_000_000) == "image too large"
    tile = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 1024, 323: 1024, 324: 8}
    packed = zlib.compress(bytes(1024 * 1024))
    data = raw_tiff({**tile, 325: len(packed)}, packed)
    assert decode_image(data).pixels.shape == (16, 16, 3)
    assert reason(data, max_pixels=1_000_000) == "image too large"


def test_a_profile_that_unpacks_to_gigabytes_is_not_unpacked():
    assert reason(png_with_profile(picture(), bytes(8 << 20))) == "image damaged"


# JPEG.

JPEGS = [
    {"mode": mode, "quality": quality, **options}
    for mode in ("RGB", "L", "CMYK")
    for quality in (30, 95)
    for options in ({}, {"progressive": True}, {"optimize": True, "subsampling": 0}, {"restart_marker_rows": 1})
]


@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_a_jpeg_without_its_end_marker_is_accepted_and_one_that_is_cut_is_not(options):
    image = Image.fromarray(smooth(50, 70)).convert(options["mode"])
    data = saved(image, "JPEG", **{name: value for name, value in options.items() if name != "mode"})
    whole = decode_image(data).pixels
    for end in (len(data) - 2, len(data) - 1):
        decoded = decode_image(data[:end])
        assert np.array_equal(decoded.pixels, whole)
        assert {repaired.reason for repaired in decoded.repairs} <= {"end marker"}  # at times Pillow needs none
    scans = [found.start() for found in re.finditer(rb"\xff[\xc4\xda]", data)][1:]  # where a cut leaves whole scans
    for end in (*scans, *np.linspace(2, len(data) - 40, 5).astype(int)):
        assert reason(data[:end]) in ("image damaged", "not an image")
    for end in range(len(data) - 12, len(data) - 2):
        with suppress(Rejected):  # unless what is missing shows in no pixel
            assert np.array_equal(decode_image(data[:end]).pixels, whole)


def test_a_jpeg_is_decoded_at_a_smaller_size_to_nearly_the_same_pixels():
    data = saved(Image.fromarray(smooth(1111, 1537)), "JPEG", quality=90)
    for rule, reduction in ((ImageRule("crop", 128, 16), 4), (ImageRule("native", 144, 16), 4),
                            (ImageRule("buckets", 128, 16), 4), (ImageRule("crop", 64, 16), 8),
                            (ImageRule("crop", 700, 10), 1)):  # fmt: skip
        small, whole = decode_image(data, rule.scale), decode_image(data)
        assert small.reduction == reduction and small.size == whole.size == (1111, 1537)
        difference = np.abs(rule(small).astype(int) - rule(whole))
        assert difference.mean() < 2 and np.quantile(difference, 0.99) < 12


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(1024, 1536), (1021, 1531)])
def test_a_smaller_size_moves_nothing(orientation, size):
    """On a steep ramp, pixels that lay beside their places would differ."""
    rows, columns = np.indices(size)
    ramp = np.stack([rows * 255 / size[0], columns * 255 / size[1], rows * 0], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(ramp), "JPEG", quality=95, exif=exif)
    rule = ImageRule("crop", 96, 16)
    small, whole = decode_image(data, rule.scale), decode_image(data)
    assert small.reduction > 1 or (orientation > 1 and size[0] % 2)
    assert small.size == whole.size
    difference = rule(small).astype(int) - rule(whole)
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.25 and np.abs(difference).max() < 4


@pytest.mark.parametrize("shape", ["crop", "buckets", "native"])
def test_an_image_is_never_decoded_below_the_size_that_is_needed(shape):
    rule = ImageRule(shape, 16, 4)
    for height, width in ((24, 24), (47, 48), (48, 49), (95, 97), (191, 300), (192, 193), (300, 1500)):
        decoded = decode_image(saved(Image.new("RGB", (width, height)), "JPEG"), rule.scale)
        needed = min(1, rule.scale(height, width)) * HEADROOM
        rows, columns, _ = decoded.pixels.shape
        assert (rows, columns) == (height, width) or (rows >= height * needed and columns >= width * needed)
        assert isinstance(decoded, DecodedImage) and rule(decoded).shape[0] >= 4

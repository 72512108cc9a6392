"""Right pictures from good bytes, a clear error from bad ones."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from imagepipeline.errors import TooLargeError, UnreadableImageError, UnsupportedFormatError
from imagepipeline.imaging.decoding import decode

RED, BLUE = (220, 30, 30), (30, 30, 220)


@pytest.fixture
def corners():
    """Red in the upper left quarter, blue elsewhere."""
    image = Image.new("RGB", (80, 40), BLUE)
    image.paste(RED, (0, 0, 40, 20))
    return image


def is_red(pixel):
    return pixel[0] > 150 and pixel[2] < 100


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_accepted_formats_are_told_by_their_bytes(format_, corners, encode):
    decoded = decode(encode(corners, format_))
    assert (decoded.format, decoded.image.mode, decoded.image.size) == (format_, "RGB", (80, 40))
    assert is_red(decoded.image.getpixel((10, 10)))
    assert not is_red(decoded.image.getpixel((60, 30)))


# The original as the sensor saw it, so that turning it by the orientation gives `corners` (CIPA DC-008 4.6.4).
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_rotated_photos_come_out_upright(orientation, corners, encode):
    turned = corners if TURNS[orientation] is None else corners.transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = decode(encode(turned, "JPEG", exif=exif)).image
    assert image.size == (80, 40)
    assert is_red(image.getpixel((10, 10)))
    assert not is_red(image.getpixel((70, 10)))
    assert not is_red(image.getpixel((10, 30)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb_and_keeps_its_transparency(mode, encode):
    grey = Image.new("L", (8, 8), 200)
    image = Image.fromarray(np.full((8, 8), 200 * 257, dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    has_alpha = mode in ("LA", "RGBA")
    if has_alpha:
        image.putalpha(128)
    decoded = decode(encode(image, "JPEG" if mode == "CMYK" else "PNG")).image
    assert decoded.mode == ("RGBA" if has_alpha else "RGB")
    expected = 255 if mode == "1" else 200
    assert abs(decoded.getpixel((4, 4))[0] - expected) <= 3
    if has_alpha:
        assert decoded.getpixel((4, 4))[3] == 128


def test_a_palette_with_a_transparent_colour_keeps_it(encode):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 4, 8))
    decoded = decode(encode(image, "PNG", transparency=1)).image
    assert decoded.getpixel((6, 4)) == (255, 0, 0, 255)
    assert decoded.getpixel((1, 4))[3] == 0


def wide_profile():
    """An RGB matrix profile with the primaries of Display P3 (D50) and a gamma of 2.2, as bytes (ICC.1:2010)."""

    def s15(value):
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1571, 0.0666, 0.7841),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data, offset = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (offset + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    header = b"\0" * 8 + b"\x02\x10\0\0" + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    header += s15(0.9642) + s15(1.0) + s15(0.8249)
    profile = header.ljust(128, b"\0") + table + data
    return len(profile).to_bytes(4, "big") + profile[4:]


def test_wide_gamut_colours_are_converted_to_srgb(encode):
    # By hand: to linear by 2.2, the P3-to-sRGB matrix (1.2249 -0.2247 0; -0.0420 1.0419 0; -0.0197 -0.0786 1.0979),
    # and the sRGB curve of IEC 61966-2-1.
    swatch = Image.new("RGB", (8, 8), (200, 100, 50))
    converted = decode(encode(swatch, "PNG", icc_profile=wide_profile())).image.getpixel((4, 4))
    assert max(abs(a - b) for a, b in zip(converted, (216, 92, 24), strict=True)) <= 3


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_a_profile_that_does_not_fit_is_ignored(profile, encode):
    swatch = Image.new("RGB", (8, 8), (90, 160, 40))
    assert decode(encode(swatch, "PNG", icc_profile=profile)).image.getpixel((4, 4)) == (90, 160, 40)


def test_nothing_but_pixels_is_left(corners, encode):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Spy 3000"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    decoded = decode(encode(corners, "JPEG", exif=exif, comment=b"secret"))
    assert decoded.camera == "Spy 3000"
    assert decoded.image.info == {}
    assert not decoded.image.getexif()


def test_exif_text_is_cleaned_and_bounded(corners, encode):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "A\x07B\x1b[31m" + "x" * 500
    exif[ExifTags.Base.DateTime] = "2024:02:03 04:05:06"
    decoded = decode(encode(corners, "JPEG", exif=exif))
    assert decoded.camera == ("AB[31m" + "x" * 500)[:40]
    assert decoded.taken_on == "2024-02-03"


def test_of_an_animation_the_first_frame_is_taken(encode):
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert is_red(decode(content).image.getpixel((4, 4)))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_cut_off_file_is_refused(format_, share, encode):
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    content = encode(noise, format_)
    with pytest.raises((UnreadableImageError, UnsupportedFormatError)):
        decode(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "content", [b"GIF", b"<svg xmlns='x'/>", b"%PDF-1.7", b"<html>", b"II*\x00", b"\x00" * 99, b"PK\x03\x04"]
)
def test_other_files_are_refused_whatever_they_are(content):
    with pytest.raises(UnsupportedFormatError, match="JPEG, PNG"):
        decode(content)


def test_an_empty_file_is_refused():
    with pytest.raises(UnreadableImageError, match="0 bytes"):
        decode(b"")


def test_limits_are_checked_on_the_header(encode):
    bomb = encode(Image.new("1", (13_000, 13_000)), "PNG")  # 20 kB that would take 169 megapixels
    assert len(bomb) < 30_000
    with pytest.raises(TooLargeError, match="pixels"):
        decode(bomb)
    with pytest.raises(TooLargeError, match="16383"):
        decode(encode(Image.new("1", (16_384, 1)), "PNG"))
    with pytest.raises(TooLargeError, match="bytes"):
        decode(io.BytesIO(b"\xff" * 25_000_001).getvalue())

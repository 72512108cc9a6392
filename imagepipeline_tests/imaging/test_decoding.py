"""Decoding reads metadata, follows the rules and reports damage; see also test_odd_files.py."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from imagepipeline.errors import (
    LimitError,
    TooLargeError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging import scaling
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.drawing import Drawn
from imagepipeline.imaging.formats import FORMATS, REFUSED, SIGNATURES
from imagepipeline.imaging.readers.source import to_picture
from imagepipeline_tests.imaging.odd_files import (
    PHOTO,
    SAMPLES,
    SIZE,
    TURNS,
    encode,
    photo_as,
    picture,
)


def test_only_pixels_are_kept():
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Spy 3000"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    decoded = decode(encode(picture(), "JPEG", exif=exif, comment=b"secret"))
    assert decoded.camera == "Spy 3000"
    assert decoded.image.info == {}
    assert not decoded.image.getexif()


def test_exif_texts_are_cleaned_and_cut_to_length():
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "A\x07B\x1b[31m" + "x" * 500
    exif[ExifTags.Base.DateTime] = "2024:02:03 04:05:06"
    exif[ExifTags.Base.Artist] = "Ann\n"
    exif[ExifTags.Base.Copyright] = "© " + "y" * 500
    decoded = decode(encode(picture(), "JPEG", exif=exif))
    assert decoded.camera == ("AB[31m" + "x" * 500)[:40]
    assert decoded.taken_on == "2024-02-03"
    assert decoded.artist == "Ann"
    assert len(decoded.copyright) == 200


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_wide_image_is_scaled_down_but_its_size_is_recorded(orientation):
    turn = TURNS[orientation]
    stored = picture().resize((960, 640))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encode(stored if turn is None else stored.transpose(turn), "JPEG", exif=exif)
    decoded = decode(content, Rules(max_width_px=300))
    assert (decoded.width, decoded.height) == (960, 640)
    assert decoded.image.size == (300, 200)


def percentage_in(error):
    return int(str(error.value).split(" %")[0])


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("percent", [20, 50, 83])
def test_the_error_for_a_truncated_file_states_the_share_of_rows_read(format_, percent):
    noise = Image.effect_noise((400, 400), 80)  # rows of similar size
    whole = encode(noise, format_)
    with pytest.raises(TruncatedImageError, match="upload it again") as error:
        decode(whole[: len(whole) * percent // 100])
    assert percentage_in(error) == pytest.approx(percent, abs=5)


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("percent", [20, 50, 83])
def test_missing_rows_are_counted_in_pictures_of_any_colours(format_, percent):
    noise = np.random.default_rng(1).integers(0, 2, (400, 400), dtype=np.uint8)
    for image in (
        Image.fromarray(noise * 255).convert("1"),
        Image.new("L", (400, 400), 165),
        Image.new("1", (400, 400)),
    ):
        whole = encode(image, format_, **({"compress_level": 0} if format_ == "PNG" else {}))
        with pytest.raises(TruncatedImageError) as error:
            decode(whole[: len(whole) * percent // 100])
        assert percentage_in(error) == pytest.approx(percent, abs=5)


@pytest.mark.parametrize(("scans", "percent"), [(2, 25), (5, 50), (9, 99)])
def test_the_error_for_a_truncated_progressive_jpeg_counts_its_scans(scans, percent):
    whole = photo_as("JPEG", progressive=True)
    content = whole[: len(whole) * percent // 100]
    with pytest.raises(
        TruncatedImageError, match=f"coarse picture could be read, from {scans} scans"
    ):
        decode(content)
    decoded = decode(content, Rules(is_truncated_accepted=True))
    assert "coarse" in decoded.flaw
    assert decoded.image.size == decode(whole).image.size


@pytest.mark.parametrize("margin", ["white", "black"])
def test_a_damaged_fax_is_kept_with_a_flaw_if_the_rules_accept_it(margin):
    image = Image.open(PHOTO).convert("1")
    image.paste(margin, (image.width - 16, 0, *image.size))
    fax = bytearray(encode(image, "TIFF", compression="group4"))
    fax[len(fax) // 2 : len(fax) // 2 + 20] = b"\x55" * 20
    with pytest.raises(UnreadableImageError, match="Bad code word"):
        decode(bytes(fax))
    assert "wrong" in decode(bytes(fax), Rules(is_truncated_accepted=True)).flaw


def test_a_damaged_jpeg_is_kept_with_a_flaw_if_the_rules_accept_it():
    whole = photo_as("JPEG")
    middle = len(whole) // 2
    damaged = whole[:middle] + whole[middle + 4096 :]
    with pytest.raises(UnreadableImageError, match="ends too early"):
        decode(damaged)
    decoded = decode(damaged, Rules(is_truncated_accepted=True))
    assert "wrong" in decoded.flaw
    made, wanted = (np.asarray(one.image).astype(int) for one in (decoded, decode(whole)))
    assert abs(made[:100] - wanted[:100]).max() == 0


@pytest.mark.parametrize(
    ("compression", "mode"),
    [
        ("group4", "1"),
        ("tiff_lzw", "RGB"),
        ("tiff_adobe_deflate", "L"),
        ("jpeg", "RGB"),
        ("jpeg", "L"),
    ],
)
def test_damage_in_a_compressed_tiff_is_detected(compression, mode):
    page = encode(Image.open(PHOTO).convert(mode), "TIFF", compression=compression)
    damaged = bytearray(page)
    middle = len(damaged) // 2
    damaged[middle : middle + 400] = np.random.default_rng(2).bytes(400)
    assert decode(page).flaw is None
    with pytest.raises(UnreadableImageError, match="damaged"):
        decode(bytes(damaged))


@pytest.mark.parametrize("format_", ["WEBP", "AVIF"])
def test_if_no_row_can_be_read_the_error_states_the_share_of_bytes(format_):
    whole = photo_as(format_)
    with pytest.raises(TruncatedImageError, match="no row could be read") as error:
        decode(whole[: len(whole) * 83 // 100])
    assert percentage_in(error) == pytest.approx(83, abs=1)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_a_truncated_file_is_filled_with_grey_if_the_rules_accept_it(format_):
    whole = photo_as(format_)
    decoded = decode(whole[: len(whole) // 2], Rules(is_truncated_accepted=True))
    complete = decode(whole)
    assert "of the rows could be read" in decoded.flaw
    assert complete.flaw is None
    made, wanted = (np.asarray(one.image).astype(int) for one in (decoded, complete))
    assert abs(made[:100] - wanted[:100]).max() == 0
    assert (made[-20:] == 128).all()


def test_a_header_alone_is_refused_even_if_the_rules_accept_truncation():
    with pytest.raises(TruncatedImageError):
        decode(photo_as("PNG")[:200], Rules(is_truncated_accepted=True))


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP", "AVIF"])
def test_all_frames_are_kept_if_the_rules_say_so(format_):
    colors = ["red", "lime", "blue"]
    frames = [Image.new("RGB", (600, 400), color) for color in colors]
    content = encode(
        frames[0], format_, save_all=True, append_images=frames[1:], duration=[100, 200, 300]
    )
    kept = decode(content, Rules(is_animation_kept=True, max_width_px=300))
    assert [frame.size for frame in kept.frames] == [(300, 200)] * 3
    assert kept.durations_ms == (100, 200, 300)
    for frame, color in zip(kept.frames, frames, strict=True):
        assert (
            max(
                abs(a - b)
                for a, b in zip(frame.getpixel((5, 5)), color.getpixel((5, 5)), strict=True)
            )
            < 12
        )
    assert len(decode(content).frames) == 1


@pytest.mark.parametrize(
    ("rules", "error", "name"),
    [
        (Rules(max_bytes=100), TooLargeError, "IMAGEPIPELINE_MAX_BYTES"),
        (Rules(max_pixels=6_000), LimitError, "IMAGEPIPELINE_MAX_PIXELS"),
        (Rules(max_side_px=95), LimitError, "IMAGEPIPELINE_MAX_SIDE_PX"),
        (Rules(max_frames=2, is_animation_kept=True), LimitError, "IMAGEPIPELINE_MAX_FRAMES"),
    ],
)
def test_each_limit_is_a_setting_and_the_error_names_it(rules, error, name):
    frames = [Image.new("RGB", picture().size, color) for color in ("black", "white")]
    content = encode(picture(), "GIF", save_all=True, append_images=frames)
    assert decode(content)
    with pytest.raises(error, match=name):
        decode(content, rules)


def test_further_pictures_in_a_phones_jpeg_are_not_frames():
    content = encode(picture(), "MPO", save_all=True, append_images=[picture(), picture()])
    assert decode(content, Rules(max_frames=1, max_pixels=7_000)).format == "JPEG"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_signature_alone_is_not_a_picture(format_):
    starts = {
        "JPEG": b"\xff\xd8\xff",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "WEBP": b"RIFF\0\0\0\0WEBP",
        "GIF": b"GIF89a",
        "AVIF": b"\0\0\0\x18ftypavif\0\0\0\0",
        "TIFF": b"II*\0",
        "BMP": b"BM" + bytes(12) + b"\x28\0\0\0",
        "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0",
    }
    assert SIGNATURES[format_](starts[format_])
    for length in (0, 1, 100):
        with pytest.raises(Exception, match=r"missing|damaged") as error:
            decode(starts[format_] + bytes(length))
        assert error.value.reason in ("truncated", "corrupt")


def test_patterns_of_refused_files_match_only_at_the_start():
    with pytest.raises(UnsupportedFormatError, match="not a picture of a known format"):
        decode(b"a note about <svg> and %!PS, PK and all that" * 50)
    assert len(REFUSED) > 10


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_reduced_size_without_visible_loss(orientation):
    turn = TURNS[orientation]
    large = Image.open(PHOTO).resize((2000, 1330))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encode(
        large if turn is None else large.transpose(turn), "JPEG", exif=exif, quality=95
    )
    decoded = decode(content, Rules(max_width_px=500))
    assert (decoded.width, decoded.height) == (2000, 1330)
    reference = np.asarray(large.resize(decoded.image.size, Image.Resampling.LANCZOS)).astype(float)
    error = ((np.asarray(decoded.image) - reference) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 40


@pytest.mark.parametrize("is_simd", [True, False])
@pytest.mark.parametrize("size", [(7681, 480), (7687, 481), (15_361, 241), (481, 7687)])
def test_a_reduced_jpeg_is_not_stretched_if_its_sides_are_no_multiples(size, is_simd, monkeypatch):
    if not is_simd:
        monkeypatch.setattr(scaling, "SIMD_MODES", ())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if size[1] > size[0] else 1
    content = encode(_tile_photo(size), "JPEG", quality=92, exif=exif)
    decoded = decode(content)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    whole = whole.transpose(Image.Transpose.ROTATE_270) if size[1] > size[0] else whole
    assert (decoded.width, decoded.height) == whole.size
    reference = np.asarray(whole.resize(decoded.image.size, Image.Resampling.LANCZOS))
    error = (np.asarray(decoded.image).astype(float) - reference) ** 2
    assert 10 * np.log10(255**2 / error.mean()) >= 45
    assert 10 * np.log10(255**2 / error[:, -300:].mean()) >= 45


def _tile_photo(size):
    """A picture with detail everywhere, also at its edges."""
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    rows, columns = -(-size[1] // photo.shape[0]), -(-size[0] // photo.shape[1])
    return Image.fromarray(np.tile(photo, (rows, columns, 1))[: size[1], : size[0]])


def test_the_height_of_a_reduced_jpeg_is_that_of_its_own_proportions():
    decoded = decode(encode(Image.new("L", (4001, 34_000)), "JPEG"))
    assert decoded.image.size == (1920, round(34_000 * 1920 / 4001))


@pytest.mark.parametrize(
    ("size", "is_turned"), [((8160, 6144), False), ((8160, 6144), True), ((6144, 8160), False)]
)
def test_a_jpeg_over_the_pixel_limit_is_decoded_at_a_reduced_size(size, is_turned):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if is_turned else 1
    content = encode(picture("L").resize(size), "JPEG", quality=30, exif=exif)
    decoded = decode(content)
    assert (decoded.width, decoded.height) == (size[::-1] if is_turned else size)
    assert decoded.image.width == 1920


def test_the_pixel_limit_applies_to_the_size_that_is_decoded():
    content = encode(picture("L").resize((1000, 700)), "PNG")
    assert decode(content, Rules(max_pixels=700_000))
    with pytest.raises(LimitError, match="IMAGEPIPELINE_MAX_PIXELS"):
        decode(content, Rules(max_pixels=699_999))
    with pytest.raises(LimitError, match="decoded at 500 x 350 px"):
        decode(
            encode(picture("L").resize((1000, 700)), "JPEG"),
            Rules(max_pixels=150_000, max_width_px=500),
        )


def test_the_limit_on_a_side_applies_to_the_variants():
    assert decode(encode(Image.new("L", (20_000, 30)), "PNG")).image.size == (1920, 3)
    with pytest.raises(LimitError, match="variants would be up to 16,384 px"):
        decode(encode(Image.new("L", (30, 16_384)), "PNG"))
    assert decode(encode(Image.new("L", (4000, 8000)), "PNG")).image.height == 3840


def test_exif_does_not_rotate_a_heic_a_second_time():
    content = (SAMPLES / "orientation-6.heic").read_bytes()
    assert decode(content).image.size == SIZE


def test_grey_of_16_bits_is_rounded():
    steps = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for format_ in ("PNG", "TIFF"):
        found = np.asarray(decode(encode(Image.fromarray(steps), format_)).image)[..., 0]
        assert (found == (steps / 257).round()).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_no_reader_passes_on_grey_whose_white_is_unknown(mode):
    with pytest.raises(UnsupportedFormatError, match="grey of 32 bits"):
        to_picture(Drawn(picture(mode)))

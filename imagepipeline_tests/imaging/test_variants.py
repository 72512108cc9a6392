"""Variants have the right size and format, no metadata, and look like the original."""

import base64
import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from imagepipeline.imaging.decoding import Decoded, Rules, decode
from imagepipeline.imaging.scaling import fill_clear
from imagepipeline.imaging.variants import (
    build_recipe,
    render,
    render_placeholder,
    render_preview,
    render_thumbnail,
)
from imagepipeline.imaging.verification import verify_variants
from imagepipeline.models import MAX_THUMBNAIL_CHARACTERS, VariantSpec, build_variant_specs
from imagepipeline.output_formats import OUTPUT_FORMATS
from imagepipeline_tests.conftest import PHOTOS

SPECS = build_variant_specs()


@pytest.fixture(scope="module")
def photo():
    return decode((PHOTOS / "galaxies.jpg").read_bytes())


def decoded_from(image):
    return Decoded((image,), "PNG", *image.size)


def reopened(variant):
    image = Image.open(io.BytesIO(variant.content))
    image.load()
    return image


def test_six_variants_are_rendered_and_none_is_enlarged(photo):
    variants = render(photo, SPECS)
    assert [(v.spec.name, v.spec.format, v.width) for v in variants] == [
        ("sm", "webp", 640),
        ("sm", "avif", 640),
        ("md", "webp", 1000),
        ("md", "avif", 1000),
        ("lg", "webp", 1000),
        ("lg", "avif", 1000),
    ]
    for variant in variants:
        image = reopened(variant)
        assert image.format == variant.spec.format.upper()
        assert (
            image.size
            == (variant.width, variant.height)
            == (variant.width, round(872 * variant.width / 1000))
        )


def test_variants_look_like_the_original(photo):
    for variant in render(photo, SPECS):
        reference = photo.image.resize((variant.width, variant.height), Image.Resampling.LANCZOS)
        difference = np.asarray(reference, dtype=float) - np.asarray(
            reopened(variant).convert("RGB"), dtype=float
        )
        decibels = 10 * np.log10(255**2 / (difference**2).mean())
        assert decibels > 30, (variant.spec, decibels)


def test_variants_carry_no_metadata(encode):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Spy 3000"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    content = encode(Image.new("RGB", (20, 20), "red"), "JPEG", exif=exif, comment=b"secret")
    for variant in render(decode(content), SPECS):
        assert b"Spy 3000" not in variant.content
        assert b"secret" not in variant.content
        assert not reopened(variant).getexif()


def test_transparency_is_kept():
    image = Image.new("RGBA", (800, 20), (10, 200, 10, 0))
    image.paste((200, 10, 10, 255), (0, 0, 400, 20))
    for variant in render(decoded_from(image), SPECS):
        made = reopened(variant).convert("RGBA")
        assert made.getpixel((10, 5))[3] == 255
        assert made.getpixel((made.width - 10, 5))[3] == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 16000)])
def test_extreme_shapes_are_rendered(size):
    for variant in render(decoded_from(Image.new("RGB", size, "teal")), SPECS):
        assert reopened(variant).size == (variant.width, variant.height)
        assert variant.width <= variant.spec.width_px
        assert variant.height >= 1


def test_rendering_twice_gives_the_same_bytes(photo):
    first, second = (render(photo, SPECS) for _ in range(2))
    assert [v.content for v in first] == [v.content for v in second]


def test_the_preview_is_a_small_jpeg_on_white():
    preview = Image.open(
        io.BytesIO(render_preview(Image.new("RGBA", (4000, 100), (0, 0, 0, 0)), 1024))
    )
    assert (preview.format, preview.mode, preview.width) == ("JPEG", "RGB", 1024)
    assert min(preview.getpixel((500, 10))) > 250


def test_the_recipe_names_every_size_and_quality():
    assert build_recipe(SPECS).version.endswith(
        ":640-webp-80,640-avif-80,1024-webp-80,1024-avif-80,1920-webp-80,1920-avif-80"
    )


def test_each_format_has_its_quality(photo):
    def sizes(*qualities):
        return {
            v.spec.format: len(v.content) for v in render(photo, build_variant_specs(*qualities))
        }

    usual = sizes()
    assert sizes(80, 63)["avif"] < usual["avif"]
    assert sizes(80, 63)["webp"] == usual["webp"]
    assert sizes(40, 80)["webp"] < usual["webp"]


def test_artist_and_copyright_are_kept_only_on_request():
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Spy 3000"
    exif[ExifTags.Base.Artist] = "Ann"
    exif[ExifTags.Base.Copyright] = "(c) Ann"
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "JPEG", exif=exif)
    decoded = decode(buffer.getvalue())
    for variant in render(decoded, SPECS, has_rights=True):
        assert dict(reopened(variant).getexif()) == {
            ExifTags.Base.Artist: "Ann",
            ExifTags.Base.Copyright: "(c) Ann",
        }
    for variant in render(decoded, SPECS):
        assert not reopened(variant).getexif()


def test_an_animation_gives_animated_variants():
    frames = tuple(Image.new("RGB", (800, 600), color) for color in ("red", "lime", "blue"))
    decoded = Decoded(frames, "GIF", 800, 600, durations_ms=(100, 200, 300))
    for variant in render(decoded, SPECS):
        image = Image.open(io.BytesIO(variant.content))
        assert image.n_frames == 3
        assert image.size == (variant.width, variant.height)
        durations = []
        for index in range(3):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
        assert durations == [100, 200, 300]
        assert image.convert("RGB").getpixel((5, 5))[2] > 200


def test_the_placeholder_is_a_tiny_picture_of_the_same_shape():
    image = Image.new("RGBA", (1600, 400), (10, 200, 10, 255))
    image.paste((0, 0, 0, 0), (0, 0, 800, 400))
    uri = render_placeholder(image)
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < 400
    tiny = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (tiny.format, tiny.size) == ("WEBP", (16, 4))
    assert tiny.getpixel((2, 2))[3] == 0
    assert tiny.getpixel((13, 2))[1] > 150


def test_the_thumbnail_is_as_large_as_the_ui_shows_without_a_click(photo):
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 4), np.uint8)
    sizes = []
    for image in (photo.image, Image.fromarray(noise), Image.new("RGB", (4000, 10))):
        uri = render_thumbnail(image)
        assert len(uri) <= MAX_THUMBNAIL_CHARACTERS
        sizes.append(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size)
    assert sizes == [(80, 70), (12, 16), (96, 1)]


BOX = (100, "cover")


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (VariantSpec("a", 200, "png", None, 100), (200, 60)),
        (VariantSpec("a", 1000, "png", None, 60), (200, 60)),
        (VariantSpec("a", 2000, "png", None, 2000), (1000, 300)),
        (VariantSpec("a", 100, "png", None, *BOX), (100, 100)),
        (VariantSpec("a", 900, "png", None, 900, "cover"), (300, 300)),
        (VariantSpec("a", 100, "jpeg", 80, *BOX, "attention"), (100, 100)),
        (VariantSpec("a", 300, "webp", 80, *BOX, (1.0, 0.0)), (300, 100)),
    ],
)
@pytest.mark.parametrize("max_width_px", [1920, 50])  # also when it is decoded as small as can be
def test_a_box_limits_both_sides_and_a_crop_fills_it(spec, size, max_width_px):
    content = io.BytesIO()
    Image.linear_gradient("L").resize((1000, 300)).save(content, "PNG")
    decoded = decode(content.getvalue(), Rules(max_width_px=max_width_px, variants=(spec,)))
    [variant] = variants = render(decoded, [spec])
    assert reopened(variant).size == (variant.width, variant.height) == size
    verify_variants(variants, [spec], (1000, 300))


def test_a_crop_keeps_what_the_focus_names():
    image = Image.new("RGB", (900, 300), "white")
    image.paste("red", (600, 0, 900, 300))
    for focus, color in [("centre", 255), ((1.0, 0.5), 0), ((0.0, 0.0), 255), ("attention", 0)]:
        [crop] = render(
            decoded_from(image), [VariantSpec("a", 90, "png", None, 90, "cover", focus)]
        )
        assert reopened(crop).convert("RGB").getpixel((50, 45))[1] == color, focus


def test_each_format_shows_what_is_transparent_and_moves_if_it_can():
    clear = Image.new("RGBA", (80, 80), (200, 0, 0, 0))
    solid = Image.new("RGBA", (80, 80), (0, 0, 200, 255))
    decoded = Decoded((clear, solid), "GIF", 80, 80, (100, 100))
    for name, format_ in OUTPUT_FORMATS.items():
        [variant] = render(
            decoded, [VariantSpec("a", 80, name, format_.default_quality)], has_rights=True
        )
        image = reopened(variant)
        assert image.format == format_.encoder
        assert getattr(image, "n_frames", 1) == (2 if format_.is_animated else 1)
        expected = (200, 0, 0, 0) if name == "png" else None
        shown = image.convert("RGBA").getpixel((40, 40))
        assert shown[3] == 0 if format_.has_alpha else shown == (255, 255, 255, 255)
        assert expected is None or shown == expected
        assert format_.measure(variant.content) == (80, 80)
        for cut in (0, 3, 20, len(variant.content) - 1):
            with pytest.raises((ValueError, IndexError, struct.error)):
                format_.measure(variant.content[:cut])
    assert len({one.suffix for one in OUTPUT_FORMATS.values()}) == len(OUTPUT_FORMATS)


def test_a_wide_original_is_decoded_at_the_width_of_the_widest_variant():
    assert Rules().max_width_px == max(spec.width_px for spec in SPECS)


def logo():
    image = Image.new("RGBA", (640, 640))
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((60, 60, 580, 580), outline=(255, 0, 0, 255), width=150)
    return image.resize((320, 320))


def cut_out(blur_px):
    image = Image.open(PHOTOS / "cat.jpg").convert("RGB")
    mask = Image.new("L", image.size)
    box = [round(side * share) for share in (0.15, 0.85) for side in image.size]
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    image.putalpha(mask.filter(ImageFilter.GaussianBlur(blur_px)))
    clear = image.getchannel("A").point([255] + [0] * 255)
    image.paste((0, 0, 0, 0), mask=clear)
    return image


@pytest.mark.parametrize(
    ("image", "share"),
    [(logo(), 0.5), (cut_out(0), 1), (cut_out(4), 1)],
    ids=["logo", "hard", "soft"],
)
def test_what_is_transparent_costs_an_avif_few_bytes_and_gives_it_no_fringe(
    image, share, monkeypatch
):
    spec = VariantSpec("", image.width, "avif", 80)
    (filled,) = render(decoded_from(image), [spec])
    monkeypatch.setattr("imagepipeline.imaging.variants.fill_clear", lambda frames: frames)
    (plain,) = render(decoded_from(image), [spec])
    assert len(filled.content) < share * len(plain.content)
    for ground in ("white", "black"):
        shown, wanted = (
            np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, ground), one)).astype(
                int
            )
            for one in (reopened(filled).convert("RGBA"), image)
        )
        assert abs(shown - wanted).max() <= 60


def test_only_wholly_transparent_pixels_are_filled():
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    assert [frame.getextrema()[3] for frame in fill_clear([clear])] == [(0, 0)]
    pixels = np.random.default_rng(1).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    pixels[..., 3] *= pixels[..., 3] > 99
    found = np.asarray(fill_clear([Image.fromarray(pixels)])[0])
    is_clear = pixels[..., 3] == 0
    assert (found[~is_clear] == pixels[~is_clear]).all()
    assert len(np.unique(found[is_clear], axis=0)) == 1
    opaque = [Image.new("RGB", (20, 20))]
    assert fill_clear(opaque) is opaque

"""Variants: right size, right format, nothing attached, close to the original."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.variants import recipe, render, render_preview
from imagepipeline.models import VARIANT_SPECS
from imagepipeline_tests.conftest import PHOTOS


@pytest.fixture(scope="module")
def photo():
    return decode((PHOTOS / "galaxies.jpg").read_bytes()).image


def reopened(variant):
    image = Image.open(io.BytesIO(variant.content))
    image.load()
    return image


def test_six_variants_are_made_and_none_is_enlarged(photo):
    variants = render(photo, VARIANT_SPECS)
    assert [(v.spec.suffix, v.spec.format, v.width) for v in variants] == [
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
        assert image.size == (variant.width, variant.height) == (variant.width, round(872 * variant.width / 1000))


def test_variants_look_like_the_original(photo):
    for variant in render(photo, VARIANT_SPECS):
        reference = photo.resize((variant.width, variant.height), Image.Resampling.LANCZOS)
        difference = np.asarray(reference, dtype=float) - np.asarray(reopened(variant).convert("RGB"), dtype=float)
        decibels = 10 * np.log10(255**2 / (difference**2).mean())
        assert decibels > 30, (variant.spec, decibels)


def test_variants_carry_no_metadata(encode):
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "Spy 3000"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    content = encode(Image.new("RGB", (20, 20), "red"), "JPEG", exif=exif, comment=b"secret")
    for variant in render(decode(content).image, VARIANT_SPECS):
        assert b"Spy 3000" not in variant.content
        assert b"secret" not in variant.content
        assert not reopened(variant).getexif()


def test_transparency_is_kept():
    image = Image.new("RGBA", (800, 20), (10, 200, 10, 0))
    image.paste((200, 10, 10, 255), (0, 0, 400, 20))
    for variant in render(image, VARIANT_SPECS):
        made = reopened(variant).convert("RGBA")
        assert made.getpixel((10, 5))[3] == 255
        assert made.getpixel((made.width - 10, 5))[3] == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 16000)])
def test_extreme_shapes_are_rendered(size):
    for variant in render(Image.new("RGB", size, "teal"), VARIANT_SPECS):
        assert reopened(variant).size == (variant.width, variant.height)
        assert variant.width <= variant.spec.width_px
        assert variant.height >= 1


def test_rendering_twice_gives_the_same_bytes(photo):
    first, second = (render(photo, VARIANT_SPECS) for _ in range(2))
    assert [v.content for v in first] == [v.content for v in second]


def test_the_preview_is_a_small_jpeg_over_white():
    preview = Image.open(io.BytesIO(render_preview(Image.new("RGBA", (4000, 100), (0, 0, 0, 0)), 1024)))
    assert (preview.format, preview.mode, preview.width) == ("JPEG", "RGB", 1024)
    assert min(preview.getpixel((500, 10))) > 250


def test_the_recipe_names_every_size_and_quality():
    assert recipe(VARIANT_SPECS).version.endswith(
        ":640-webp-80,640-avif-80,1024-webp-80,1024-avif-80,1920-webp-80,1920-avif-80"
    )

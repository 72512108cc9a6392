"""Inspection distinguishes good variants from bad ones."""

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFilter

from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.inspection import choose_compared, compare, inspect
from imagepipeline.imaging.variants import render
from imagepipeline.models import build_variant_specs
from imagepipeline_tests.imaging.odd_files import PHOTO, encode


@pytest.fixture(scope="module")
def photo():
    return decode(PHOTO.read_bytes())


def test_rendered_variants_pass(photo):
    variants = render(photo, build_variant_specs())
    for variant, inspection in zip(
        variants, inspect(photo, [v.content for v in variants], build_variant_specs()), strict=True
    ):
        assert inspection.fault is None
        assert (inspection.format, inspection.width, inspection.height) == (
            variant.spec.format,
            variant.width,
            variant.height,
        )
        assert inspection.attachments == ()
        assert 0.9 < inspection.similarity < 1


def test_only_the_chosen_variants_are_compared(photo):
    specs = build_variant_specs()
    chosen = choose_compared(specs)
    assert {(specs[position].width_px, specs[position].format) for position in chosen} == {
        (640, "webp"),
        (640, "avif"),
    }
    contents = [variant.content for variant in render(photo, specs)]
    found = inspect(photo, contents, specs, chosen)
    assert [found[position].similarity for position in chosen] == [
        inspect(photo, contents, specs)[position].similarity for position in chosen
    ]
    assert all(
        one.similarity is None for position, one in enumerate(found) if position not in chosen
    )
    assert [(one.format, one.width, one.attachments) for one in found] == [
        (one.format, one.width, one.attachments) for one in inspect(photo, contents, specs)
    ]


def test_undecodable_bytes_are_a_fault(photo):
    whole = render(photo, build_variant_specs())[0].content
    for content in (b"", b"<html>", whole[:500]):
        assert inspect(photo, [content], [None])[0].fault


def test_attachments_are_listed(photo):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Ann"
    assert inspect(photo, [encode(photo.image, "WEBP", exif=exif)], [None])[0].attachments == ()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    content = encode(photo.image, "WEBP", exif=exif, xmp=b"<x/>", icc_profile=b"profile")
    assert inspect(photo, [content], [None])[0].attachments == ("icc_profile", "xmp", "exif")


def test_similarity_falls_with_damage(photo):
    image = photo.image.convert("L")
    blurred = image.filter(ImageFilter.GaussianBlur(3))
    black = Image.new("L", image.size)
    upside_down = image.transpose(Image.Transpose.ROTATE_180)
    assert compare(image, image) == pytest.approx(1, abs=1e-4)
    assert 0.95 > compare(image, blurred) > compare(image, upside_down)
    assert compare(image, black) < 0.2


def test_similarity_follows_the_published_formula():
    # Two blocks of 8 x 8 px with means 100 and 110, the same variance of 100, and full correlation.
    # So the structure term is 1, and luminance is (2 * 100 * 110 + 6.5025) / (100^2 + 110^2 +
    # 6.5025).
    pattern = np.tile([90, 110], (8, 4)).astype(np.uint8)
    a, b = Image.fromarray(pattern), Image.fromarray(pattern + 10)
    assert compare(a, b) == pytest.approx(22006.5025 / 22106.5025, abs=1e-4)

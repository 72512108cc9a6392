"""Variants agree with those of libvips, which does all the same steps with other code.

libvips is the engine of sharp, which this pipeline replaces.
"""

import numpy as np
import pytest
import pyvips

from imagepipeline.imaging.cropping import find_region
from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.variants import render
from imagepipeline.models import VariantSpec, build_variant_specs
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.imaging.odd_files import TURNS, encode, wide_profile

pytestmark = pytest.mark.stack

# Peak signal-to-noise ratios. On 20 camera photos, the resizers differ by 41 to 59 dB; encoded at
# quality 80 the variants have 31 dB or more.
MIN_RESIZED_DB, MIN_ENCODED_DB = 38, 29


def large_photo(name, times=5, **options):
    """Returns a demo photo enlarged to more than the width of the largest variant."""
    image = decode((PHOTOS / name).read_bytes()).image
    size = (image.width * times, image.height * times)
    return encode(image.resize(size), "JPEG", quality=95, **options)


def resize_by_vips(content, width_px):
    image = pyvips.Image.new_from_buffer(content, "").autorot()
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb")
    return image.resize(min(1, width_px / image.width), kernel="lanczos3")


def pixels(image):
    shape = (image.height, image.width, image.bands)
    return np.ndarray(buffer=image.write_to_memory(), dtype=np.uint8, shape=shape).astype(float)


def decibels(a, b):
    assert a.shape == b.shape
    return 10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-9))


def orientation_6():
    from PIL import ExifTags, Image

    image = decode((PHOTOS / "cat.jpg").read_bytes()).image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = image.resize((image.width * 5, image.height * 5)).transpose(TURNS[6])
    return encode(stored, "JPEG", quality=95, exif=exif)


FILES = {
    "cat": lambda: large_photo("cat.jpg"),
    "decoded at half its size": lambda: large_photo("galaxies.jpg", 4),
    "progressive": lambda: large_photo("coffee.jpg", 4, progressive=True),
    "wide gamut": lambda: large_photo("coffee.jpg", 4, icc_profile=wide_profile()),
    "turned": orientation_6,
}


@pytest.mark.parametrize("name", FILES)
def test_variants_agree_with_another_decoder_and_resizer(name):
    content = FILES[name]()
    decoded = decode(content)
    wide = pixels(resize_by_vips(content, decoded.image.width))
    assert decibels(np.asarray(decoded.image, dtype=float), wide) > MIN_RESIZED_DB
    # What is encoded does not depend on how it was decoded.
    specs = build_variant_specs() if name == "cat" else build_variant_specs()[:2]
    for variant in render(decoded, specs):
        reference = pixels(resize_by_vips(content, variant.spec.width_px))
        made = pixels(pyvips.Image.new_from_buffer(variant.content, ""))
        assert decibels(made, reference) > MIN_ENCODED_DB, variant.spec


@pytest.mark.parametrize("name", ["astronaut.jpg", "cat.jpg", "coffee.jpg"])
@pytest.mark.parametrize("focus", ["centre", "attention"])
@pytest.mark.parametrize("box", [(200, 200), (300, 100)])
def test_a_crop_shows_what_libvips_shows(name, focus, box):
    image = decode((PHOTOS / name).read_bytes()).image
    spec = VariantSpec("crop", box[0], "webp", 80, box[1], "cover", focus)
    scale = max(box[0] / image.width, box[1] / image.height)
    theirs = (
        pyvips.Image.new_from_file(PHOTOS / name)
        .resize(scale, kernel="lanczos3")
        .smartcrop(*box, interesting=focus)
    )
    left, top, *_ = find_region(image, spec)
    apart = left * scale + theirs.get("xoffset"), top * scale + theirs.get("yoffset")
    assert max(abs(apart[0]) / box[0], abs(apart[1]) / box[1]) < 0.125

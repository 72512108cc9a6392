"""Variants as users define them."""

import json

import pytest

from imagepipeline.errors import SettingsError
from imagepipeline.imaging.variants import build_recipe
from imagepipeline.models import VariantSpec, build_variant_specs
from imagepipeline.settings import Settings
from imagepipeline.variant_settings import parse_variants

DEFAULT = [
    {"name": "lg", "width": 1920},
    {"name": "sm", "width": 640},
    {"name": "md", "width": 1024},
]
THUMB = {
    "name": "thumb", "width": 300, "height": 200, "fit": "cover", "focus": "attention",
    "formats": ["jpeg", "webp", "png"], "quality": {"webp": 75},
}  # fmt: skip


def load(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return Settings.load({"IMAGEPIPELINE_VARIANTS": text, "IMAGEPIPELINE_AVIF_QUALITY": "63"})


def test_the_default_variants_are_the_same_when_they_are_written_out():
    specs = load(DEFAULT).specs
    assert specs == Settings.load({"IMAGEPIPELINE_AVIF_QUALITY": "63"}).specs
    assert specs == build_variant_specs(80, 63)
    assert build_recipe(specs).settings == (
        "640-webp-80,640-avif-63,1024-webp-80,1024-avif-63,1920-webp-80,1920-avif-63"
    )


def test_a_variant_has_a_box_a_crop_formats_and_qualities():
    specs = load([THUMB, {"name": "page", "width": 800, "height": 900}]).specs
    crop = (200, "cover", "attention")
    assert specs == (
        VariantSpec("thumb", 300, "webp", 75, *crop),
        VariantSpec("thumb", 300, "jpeg", 80, *crop),
        VariantSpec("thumb", 300, "png", None, *crop),
        VariantSpec("page", 800, "webp", 80, 900),
        VariantSpec("page", 800, "avif", 63, 900),
    )
    assert specs[0].recipe == "thumb-300x200-cover-attention-webp-75"
    assert specs[0].at((0.25, 0.5)).recipe == "thumb-300x200-cover-0.25x0.5-webp-75"
    assert specs[3].at((0.25, 0.5)) == specs[3]
    assert specs[1].path_for("original/a/b.png") == "variants/a/b-thumb.jpg"


def test_a_long_set_has_a_recipe_that_fits_its_column_and_tells_sets_apart():
    def describe(count):
        variants = [{"name": f"size_{n}", "width": n} for n in range(100, 100 + count)]
        return build_recipe(load(variants).specs).settings

    assert describe(20) != describe(21)
    assert {len(describe(20)), len(describe(21))} == {128}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[{", "is not valid JSON, at character 3"),
        ([], "must be a list of one or more variants"),
        ({"name": "a"}, "must be a list"),
        (["a"], "variant 1 must be an object with name and width"),
        ([{"width": 9}], "the name of variant 1 must be"),
        ([{"name": "a-b", "width": 9}], "the name of variant 1 must be"),
        ([{"name": "../x", "width": 9}], "the name of variant 1 must be"),
        ([{"name": "a", "width": 9}, {"name": "a", "width": 8}], "2 variants are named a"),
        ([{"name": "a"}], "variant a: width must be a whole number of pixels from 1 to 16383"),
        ([{"name": "a", "width": 0}], "variant a: width must be"),
        ([{"name": "a", "width": True}], "variant a: width must be"),
        ([{"name": "a", "width": 9, "height": 16384}], "variant a: height must be"),
        ([{"name": "a", "width": 9, "fit": "fill"}], "fit must be one of inside, cover"),
        ([{"name": "a", "width": 9, "fit": ["cover"]}], "fit must be one of inside, cover"),
        ([{"name": "a", "width": 9, "fit": "cover"}], "fit cover also needs a height"),
        ([{"name": "a", "width": 9, "focus": "centre"}], "focus matters only with fit cover"),
        ([THUMB | {"focus": "face"}], "focus must be one of centre, attention"),
        ([THUMB | {"formats": ["webp", "gif"]}], "'gif' is not one of the formats webp, avif"),
        ([THUMB | {"formats": "webp"}], "formats must be a list"),
        ([THUMB | {"formats": []}], "formats must name at least one of"),
        ([THUMB | {"formats": [["webp"]]}], "is not one of the formats"),
        ([THUMB | {"formats": ["webp", "webp"]}], "has the format webp more than once"),
        ([THUMB | {"quality": {"avif": 50}}], "has a quality for 'avif', but not that format"),
        ([THUMB | {"quality": {"png": 50}}], "png is lossless, so it has no quality"),
        ([THUMB | {"quality": {"webp": 101}}], "the quality of webp must be a whole number"),
        ([THUMB | {"quality": 80}], "quality must give a number for each format"),
        ([THUMB | {"sharpen": 1}], "variant thumb: 'sharpen' is not one of name, width"),
        ([{"name": f"n{n}", "width": 9} for n in range(33)], "66 files for each image"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_start(value, sentence):
    with pytest.raises(SettingsError) as refused:
        load(value)
    assert str(refused.value).startswith("IMAGEPIPELINE_VARIANTS: ")
    assert sentence in str(refused.value)


def test_a_list_of_dictionaries_is_read_as_from_json():
    assert parse_variants([THUMB]) == parse_variants(json.loads(json.dumps([THUMB])))

"""What is an image ID, an entry, a variant's path."""

import json

import pytest
from pydantic import ValidationError

from imagepipeline.errors import InvalidUploadError
from imagepipeline.models import ImageMetadata, Recipe, Upload, VariantSpec

GOOD = ["a", "0", "IMG_1234", "a-b_c", "x" * 64]
BAD = [
    "",
    " ",
    "-a",
    "_a",
    "a b",
    "a/b",
    "../a",
    "a\nb",
    "a\x00",
    "é",
    "а",
    "x" * 65,
    "a.b",
    "%2e%2e",
    "...",
    "🙂",
]


@pytest.mark.parametrize("image_id", GOOD)
def test_a_bare_id_is_an_upload(image_id):
    assert Upload.from_entry(image_id.encode()) == Upload(image_id)


@pytest.mark.parametrize("image_id", BAD)
def test_anything_else_is_refused_as_an_id(image_id):
    with pytest.raises(InvalidUploadError):
        Upload.from_entry(image_id.encode())
    with pytest.raises(InvalidUploadError):
        Upload.from_entry(json.dumps({"imageId": image_id}).encode())


def test_json_entries_carry_a_path_and_a_priority():
    entry = b'{"imageId": "a", "path": "original/2024/x.jpg", "priority": 5}'
    assert Upload.from_entry(entry) == Upload("a", "original/2024/x.jpg", 5)


@pytest.mark.parametrize(
    "entry",
    [
        b"\xff\xfe",
        b"{",
        b"{}",
        b'{"imageId": 5.0}',
        b'{"imageId": null}',
        b'{"imageId": "a", "priority": "high"}',
        b'{"imageId": "a", "priority": true}',
        b'{"imageId": "a", "priority": 1001}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"x" * 2_000_000,
    ],
    ids=lambda entry: repr(entry[:30]),
)
def test_a_malformed_entry_is_refused_with_a_reason(entry):
    with pytest.raises(InvalidUploadError, match=r"\w{3}"):
        Upload.from_entry(entry)


@pytest.mark.parametrize(
    "path",
    [
        "/original/a.jpg",
        "original/../a.jpg",
        "original/a",
        "original/",
        "originals/a.jpg",
        "a.jpg",
        "original//a.jpg",
        "original/./a.jpg",
        "original\\a.jpg",
        "original/a\n.jpg",
        5,
        "",
    ],
)
def test_a_path_outside_the_originals_is_refused(path):
    with pytest.raises(InvalidUploadError, match=r"original/NAME\.EXT"):
        Upload("a", path)


@pytest.mark.parametrize("name", ["x" * 248, "é" * 124, "d/" * 230 + "x" * 20, "d" * 256 + "/x"])
def test_a_path_that_is_too_long_for_a_disk_or_whose_variants_are_is_refused(name):
    with pytest.raises(InvalidUploadError, match="too long"):
        Upload("a", f"original/{name}.jpg")


@pytest.mark.parametrize("name", ["x" * 247, "é" * 123, "d" * 255 + "/x"])
def test_a_path_as_long_as_can_be_is_taken(name):
    assert Upload("a", f"original/{name}.jpg").path


@pytest.mark.parametrize(
    "upload",
    [
        Upload("a"),
        Upload("a", priority=3),
        Upload("a", "original/b.png"),
        Upload("a", "original/b.png", -2),
    ],
)
def test_an_upload_survives_the_list(upload):
    assert Upload.from_entry(upload.to_entry().encode()) == upload


def test_a_variant_lies_where_the_original_does_below_variants():
    spec = VariantSpec("md", 1024, "avif", 80)
    assert spec.path_for("original/abc.jpg") == "variants/abc-md.avif"
    assert spec.path_for("original/2024/a.b.jpeg") == "variants/2024/a.b-md.avif"


def test_metadata_accepts_the_names_the_web_product_reads():
    answer = {
        "description": " A cat ",
        "tags": ["cat"],
        "category": "animal",
        "dominantColors": ["#AABBCC"],
        "mood": "calm",
    }
    metadata = ImageMetadata.model_validate(answer)
    assert metadata.model_dump(by_alias=True) == answer | {
        "description": "A cat",
        "dominantColors": ["#aabbcc"],
    }
    assert metadata.embedding_text == "A cat cat animal calm"


@pytest.mark.parametrize(
    "change",
    [
        {"description": ""},
        {"description": "x" * 1_000_000},
        {"tags": "cat"},
        {"tags": ["x"] * 51},
        {"dominantColors": ["brown"]},
        {"dominantColors": ["#12345"]},
        {"mood": None},
        {"status": "completed"},
    ],
)
def test_metadata_refuses_what_does_not_fit(change):
    answer = {
        "description": "A cat",
        "tags": ["cat"],
        "category": "animal",
        "dominantColors": [],
        "mood": "calm",
    }
    with pytest.raises(ValidationError):
        ImageMetadata.model_validate(answer | change)


def test_a_recipe_is_one_word_for_what_made_a_result():
    assert Recipe("openai", "gpt-4o-mini", "prompt-1").version == "openai:gpt-4o-mini:prompt-1"
    assert Recipe("local", "minilm").version == "local:minilm"

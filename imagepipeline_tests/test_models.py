"""IDs, queue entries, paths and metadata are validated."""

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
def test_an_invalid_id_is_refused(image_id):
    with pytest.raises(InvalidUploadError):
        Upload.from_entry(image_id.encode())
    with pytest.raises(InvalidUploadError):
        Upload.from_entry(json.dumps({"imageId": image_id}).encode())


def test_json_entries_carry_a_path_a_priority_and_a_focus():
    entry = b'{"imageId": "a", "path": "original/2024/x.jpg", "priority": 5, "focus": [0.2, 1]}'
    upload = Upload("a", "original/2024/x.jpg", 5, focus=(0.2, 1.0))
    assert Upload.from_entry(entry) == upload
    assert Upload.from_entry(upload.to_entry().encode()) == upload
    assert Upload("a", focus=(0.123456, 0)).focus == (0.1235, 0.0)  # as its recipe says


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
        b'{"imageId": "a", "focus": [0.5]}',
        b'{"imageId": "a", "focus": [0.5, 1.01]}',
        b'{"imageId": "a", "focus": [0.5, NaN]}',
        b'{"imageId": "a", "focus": [0.5, true]}',
        b'{"imageId": "a", "focus": "centre"}',
        b'{"imageId": "a", "focus": 0}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"x" * 2_000_000,
    ],
    ids=lambda entry: repr(entry[:30]),
)
def test_a_malformed_entry_is_refused_with_a_reason(entry):
    with pytest.raises(InvalidUploadError, match=r"\w{3}"):
        Upload.from_entry(entry)


def test_a_quoted_id_may_look_like_a_field():
    assert Upload.from_entry(b'"Records"') == Upload("Records")


def build_record(key, event="ObjectCreated:Put"):
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-east-1",
        "eventTime": "2026-01-01T00:00:00.000Z",
        "eventName": event,
        "s3": {
            "s3SchemaVersion": "1.0",
            "bucket": {"name": "images", "arn": "arn:aws:s3:::images"},
            "object": {"key": key, "size": 1024, "eTag": "0" * 32, "sequencer": "00"},
        },
    }


@pytest.mark.parametrize(
    "message",
    [
        {"Records": [build_record("original/a.jpg")]},
        {"Records": [build_record("some/prefix/original/a.jpg", "ObjectCreated:Copy")]},
        [{"Event": [build_record("p%2Foriginal%2Fa.jpg", "s3:ObjectCreated:Put")]}],
    ],
    ids=["S3", "S3 with a prefix", "MinIO"],
)
def test_an_object_stores_message_of_a_new_object_is_an_upload(message):
    assert Upload.from_entry(json.dumps(message).encode()) == Upload("a", "original/a.jpg")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"Records": [build_record("original/a.jpg", "ObjectRemoved:Delete")]}, "no new object"),
        ({"Records": [build_record("variants/a-sm.webp")]}, "does not end with original/"),
        ({"Records": [build_record("original/2026/a.jpg")]}, "push other paths with their IDs"),
        ({"Records": [build_record("original/a+b.jpg")]}, "does not end with original/"),
        ({"Records": [build_record("original/a.jpg")] * 2}, "one new object"),
        ({"Records": [{}]}, "one new object"),
        ({"Records": 5}, "one new object"),
        ([], "one new object"),
        ({"Service": "Amazon S3", "Event": "s3:TestEvent"}, "the entry has no imageId, but"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_messages_of_an_object_store_are_refused_with_a_reason(message, reason):
    with pytest.raises(InvalidUploadError, match=reason):
        Upload.from_entry(json.dumps(message).encode())


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
def test_a_path_is_refused_if_it_or_its_variants_are_too_long_for_a_disk(name):
    with pytest.raises(InvalidUploadError, match="too long"):
        Upload("a", f"original/{name}.jpg")


@pytest.mark.parametrize("name", ["x" * 247, "é" * 123, "d" * 255 + "/x"])
def test_the_longest_possible_path_is_accepted(name):
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
def test_an_upload_survives_a_round_trip_through_the_queue(upload):
    assert Upload.from_entry(upload.to_entry().encode()) == upload


def test_the_path_of_a_variant_mirrors_that_of_the_original():
    spec = VariantSpec("md", 1024, "avif", 80)
    assert spec.path_for("original/abc.jpg") == "variants/abc-md.avif"
    assert spec.path_for("original/2024/a.b.jpeg") == "variants/2024/a.b-md.avif"


def test_metadata_is_read_and_written_with_the_web_products_names():
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
def test_invalid_metadata_is_refused(change):
    answer = {
        "description": "A cat",
        "tags": ["cat"],
        "category": "animal",
        "dominantColors": [],
        "mood": "calm",
    }
    with pytest.raises(ValidationError):
        ImageMetadata.model_validate(answer | change)


def test_a_recipe_is_written_as_one_word():
    assert Recipe("openai", "gpt-4o-mini", "prompt-1").version == "openai:gpt-4o-mini:prompt-1"
    assert Recipe("local", "minilm").version == "local:minilm"


@pytest.mark.parametrize("stored", [None, [], {}, {"description": "a cat", "keywords": ["cat"]}])
def test_metadata_of_an_earlier_kind_count_as_none(stored):
    assert ImageMetadata.read(stored) is None

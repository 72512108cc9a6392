"""Filters choose the images of a plan: strict in what they accept, the same on both databases."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.errors import InvalidFilterError
from imagepipeline.filters import FIELDS, Filter
from imagepipeline.models import ImageMetadata, OriginalFacts, Recipe, Upload
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.plans import Outdated, Plans

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
MADE, TODAY = {"metadata": Recipe("openai", "m")}, {"metadata": Recipe("openai", "m2")}
OTHERS = ("variants", "embedding")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("category", "'category' is not a filter: it must look like category=animal"),
        ("colour=red", "'colour' is not a field of an image: it must be one of id, category, tag"),
        ("id=", "the value of id, '', must be an ID, or how IDs start and a `*`"),
        ("id=a%", "the value of id, 'a%', must be an ID"),
        ("id=*", "the value of id, '\\*', must be an ID"),
        ("tag=", "the value of tag, '', must not be empty"),
        ("status=done", "the value of status, 'done', must be one of pending, processing, comp"),
        ("updated-since=yesterday", "'yesterday', must be a date such as 2026-11-01 or"),
        ("updated-since=2026-02-30", "must be a date"),
        ("updated-since=0001-01-01T00:00+14:00", "must be a date"),
    ],
)
def test_a_malformed_filter_is_explained(text, problem):
    with pytest.raises(InvalidFilterError, match=problem):
        Filter.parse([text])


def test_a_filter_is_stored_as_json():
    texts = ["id=a*", "tag=a=b", "accepted-before=2026-11-01T12:00+02:00"]
    where = Filter.parse(texts)
    assert where.conditions[1].value == "a=b"
    assert where.conditions[2].time == datetime(2026, 11, 1, 10, tzinfo=UTC)
    assert Filter.parse(json.loads(json.dumps(where.to_list()))) == where


@pytest.fixture
def library(catalogue_url):
    """Completed images: a day apart, some of cats, one in capitals; and one that waits."""
    times = iter(START + timedelta(days=days) for days in range(99))
    now = START
    with closing(Catalogue(catalogue_url, lambda: now)) as catalogue:
        for image_id, category, tags in (
            ("a-1", "animal", ["cat", "sofa"]),
            ("a-2", "animal", ["dog's bone"]),
            ("A-3", "food", ["cat", "cat food"]),
            ("b_4", "food", []),
        ):
            now = next(times)
            catalogue.accept([Upload(image_id)])
            claim = catalogue.claim(image_id, 1, "run")
            facts = OriginalFacts(f"original/{image_id}.jpg", 9, "0" * 64, 3, 2, "data:", "#000000")
            catalogue.save_original(claim, facts)
            described = ImageMetadata(
                description="cat", tags=tags, category=category, dominant_colors=[], mood="calm"
            )
            catalogue.save_metadata(claim, described, MADE["metadata"], "0" * 64)
            for asset in OTHERS:
                catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
            catalogue.finish(claim)
        now = next(times)
        catalogue.accept([Upload("waits")])
    return Plans(catalogue_url)


CASES = (
    ([], "A-3 a-1 a-2 b_4"),
    (["id=a-1"], "a-1"),
    (["id=a-*"], "a-1 a-2"),  # case counts
    (["id=b_*"], "b_4"),
    (["category=animal"], "a-1 a-2"),
    (["category=anim"], ""),
    (["tag=cat"], "A-3 a-1"),  # neither a part of a tag nor another field
    (["tag=dog's bone"], "a-2"),
    (["tag=cat", "tag=sofa"], "a-1"),
    (["tag=cat", "category=food", "id=A*"], "A-3"),
    (["status=completed"], "A-3 a-1 a-2 b_4"),
    (["status=pending"], ""),
    (["accepted-since=2026-11-03"], "A-3 b_4"),
    (["accepted-before=2026-11-03T12:00"], "a-1 a-2"),
    (["updated-since=2026-11-02T12:00", "updated-before=2026-11-03T12:01Z"], "A-3 a-2"),
)


def test_a_filter_chooses_images(library):
    for texts, expected in CASES:
        where = Filter.parse(texts)
        found = library.list_outdated(TODAY, "", 9, where)
        assert sorted(found) == expected.split(), texts
        assert library.count_images(TODAY, where) == len(found)
        [counted] = [
            one.images for one in library.count_outdated(TODAY, where) if one.cause == "model"
        ] or [0]
        assert counted == len(found), texts


def test_images_without_results_are_filtered_too(library):
    for text, count in (("status=pending", 1), ("id=wai*", 1), ("category=food", 0)):
        counted = library.count_outdated(MADE, Filter.parse([text]))
        assert counted == [Outdated("metadata", "missing", 1)] * count, text


def test_every_field_can_be_asked_for(library):
    values = {"id": "x*", "status": "failed", "category": "x", "tag": "x"}
    texts = [f"{field}={values.get(field, '2020-01-01')}" for field in FIELDS]
    assert library.count_outdated(MADE, Filter.parse(texts)) == []
    assert library.count_outdated(MADE) == [Outdated("metadata", "missing", 1)]

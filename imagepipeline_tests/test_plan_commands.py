"""The commands `plan` and `apply`, as people and scripts use them."""

import json

import pytest
from click.testing import CliRunner

from imagepipeline.cli import cli
from imagepipeline.models import ImageMetadata, OriginalFacts, Recipe, Upload
from imagepipeline.stores.catalogue import Catalogue

EARLIER = Recipe("local", "earlier")


@pytest.fixture
def invoke(monkeypatch, tmp_path, redis_url, queue):
    """A function that runs a command in a new home."""
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REDIS_URL", redis_url)
    (tmp_path / "home").mkdir()
    return lambda *arguments: CliRunner().invoke(cli, arguments)


@pytest.fixture
def catalogue(invoke, tmp_path, create_catalogue):
    return Catalogue(create_catalogue(tmp_path / "home" / "catalogue.sqlite"))


def complete(catalogue, image_id, category, sha256="0" * 64, made_by=EARLIER):
    catalogue.accept([Upload(image_id)])
    claim = catalogue.claim(image_id, 1, "run")
    facts = OriginalFacts(f"original/{image_id}.jpg", 9, sha256, 3, 2, "data:", "#000000")
    catalogue.save_original(claim, facts)
    described = ImageMetadata(
        description="A cat", tags=["cat"], category=category, dominant_colors=[], mood="calm"
    )
    catalogue.save_metadata(claim, described, made_by, sha256)
    for asset in ("variants", "embedding"):
        catalogue.record_result(claim, asset, made_by, sha256)
    catalogue.finish(claim)


def test_a_filter_restricts_what_is_planned_and_applied(invoke, catalogue):
    complete(catalogue, "cat", "animal")
    complete(catalogue, "soup", "food")
    where = ("--where", "category=animal", "--where", "tag=cat")
    rows = json.loads(invoke("plan", "--json", *where).output)
    assert [(row["asset"], row["images"]) for row in rows] == [
        ("metadata", 1),
        ("variants", 1),
        ("embedding", 1),
    ]
    assert json.loads(invoke("apply", "--dry-run", "--json", *where).output) == [
        {"image_id": "cat"}
    ]
    refused = invoke("apply", "--dry-run", "--where", "colour=red")
    assert refused.exit_code == 2
    assert "'colour' is not a field of an image: it must be one of id, category" in refused.output
    assert invoke("plan", "cat", *where).exit_code == 2

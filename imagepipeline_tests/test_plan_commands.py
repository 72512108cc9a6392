"""The commands `plan` and `apply`, as people and scripts use them."""

import json

import pytest
from click.testing import CliRunner

from imagepipeline.cli import cli
from imagepipeline.commands import plans
from imagepipeline.errors import ApplyBusyError
from imagepipeline.models import ImageMetadata, OriginalFacts, Recipe, Upload
from imagepipeline.stores.applies import Applies
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


def test_a_plan_of_one_asset_says_what_else_its_images_get(invoke, catalogue):
    complete(catalogue, "cat", "animal")
    planned = invoke("plan", "--asset", "variants", "--json")
    rows = json.loads(planned.stdout)
    assert [row["asset"] for row in rows] == ["variants", "metadata", "embedding"]
    assert planned.stderr == (
        "Note: an image that begins gets everything it needs: these need metadata and embedding, "
        "too\n"
    )
    assert "metadata" not in invoke("plan").stderr


def test_a_dry_run_counts_what_it_does_not_list(invoke, catalogue, monkeypatch):
    monkeypatch.setattr(plans, "MAX_LISTED", 2)
    for number in range(5):
        complete(catalogue, f"image-{number}", "animal")
    listed = invoke("apply", "--dry-run")
    assert listed.stdout.split() == ["image_id", "image-0", "image-1"]
    assert listed.stderr == "2 of 5 planned images; --json lists all.\n"
    assert invoke("apply", "--dry-run", "--limit", "4").stderr == "4 of 5 planned images.\n"
    rows = json.loads(invoke("apply", "--dry-run", "--json").stdout)
    assert rows == [{"image_id": f"image-{number}"} for number in range(5)]
    assert json.loads(invoke("apply", "--dry-run", "--json", "--where", "id=x").stdout) == []


def test_an_apply_does_not_wait_for_a_stack_that_does_not_run(invoke, catalogue, monkeypatch):
    complete(catalogue, "cat", "animal")
    monkeypatch.setenv("REDIS_URL", "unix:///nowhere.sock")
    refused = invoke("apply", "--asset", "variants")
    assert refused.exit_code != 0
    assert "start the stack with `imagepipeline up`" in str(refused.exception)


def test_a_second_apply_says_at_once_who_holds_it(invoke, catalogue, tmp_path, monkeypatch, capsys):
    applies = Applies(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}")
    of_ui = applies.start({})
    refused = invoke("apply")
    assert refused.exit_code == 1
    assert "an apply of Dagster's UI is under way since" in str(refused.exception)
    assert "with 0 images begun: wait until it has ended, or end it with" in str(refused.exception)
    applies.end(of_ui.id, "stopped")
    living = applies.start({}, lease_seconds=15)
    monkeypatch.setattr(plans.time, "sleep", lambda _: applies.renew(living.id, 16))
    with pytest.raises(ApplyBusyError, match="an `apply` of another command is under way"):
        plans.await_turn(applies)
    monkeypatch.setattr(plans.time, "sleep", lambda _: applies.end(living.id, "killed"))
    plans.await_turn(applies)
    assert "If that command was killed, this one begins within 15 s." in capsys.readouterr().err


def test_a_batch_without_pictures_is_refused(invoke, catalogue):
    refused = invoke("apply", "--batch", "--asset", "embedding")
    assert refused.exit_code == 2
    assert "--batch asks about pictures, so it needs --asset metadata, too" in refused.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "--budget", "inf"),
        ("apply", "--budget", "nan"),
        ("apply", "--budget", "1e308"),
        ("apply", "--budget", "0"),
        ("apply", "--limit", "2147483648"),
        ("plan", "--where", "accepted-since=0001-01-01T00:00+14:00"),
        ("events", "--since", "99999999999999999999"),
    ],
    ids=" ".join,
)
def test_a_number_or_time_that_nothing_can_hold_is_refused(invoke, catalogue, arguments):
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert f"Invalid value for '{arguments[1]}'" in refused.output

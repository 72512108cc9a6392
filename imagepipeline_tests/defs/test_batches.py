"""Runs of the bulk lane: each image is claimed, tried and ended by itself."""

import hashlib
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from pydantic import ValidationError

from imagepipeline.definitions import NICEST, defs
from imagepipeline.defs import batches
from imagepipeline.defs.attempts import STOPPED
from imagepipeline.defs.batches import (
    IMAGES_AT_ONCE,
    ApplyConfig,
    apply_plan,
    process_batch,
)
from imagepipeline.defs.outcomes import ORIGINAL, REASON_TAG, STATUS_TAG
from imagepipeline.defs.reconciler import StandstillWatch, reconcile
from imagepipeline.errors import (
    ApplyBusyError,
    PausedError,
    ProviderUnavailableError,
    RateLimitError,
)
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import (
    ASSETS,
    BULK_PRIORITY,
    BY_PERSON,
    Recipe,
    Upload,
    build_variant_specs,
)
from imagepipeline.originals import Originals
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.applies import Applies
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.usage import CallUsage
from imagepipeline_tests.conftest import PHOTOS

pytestmark = pytest.mark.stack


@pytest.fixture
def run_batch(instance, catalogue, files, index, paid_calls, ledger, tenants):
    """A function that runs one batch."""

    def run_batch(size=50, config=None, **resources):
        return process_batch.execute_in_process(
            instance=instance,
            run_config={"ops": {"process_images": {"config": config or {}}}},
            resources={
                "catalogue": catalogue,
                "files": files,
                "background_originals": Originals(files, Sandbox(niceness=NICEST), Rules()),
                "renderer": Renderer(build_variant_specs()),
                "index": index,
                "paid_calls": paid_calls,
                "tenants": tenants,
                "ledger": ledger,
                "vision": LocalVision(),
                "embedder": LocalEmbedder(),
                "batch_size": size,
                **resources,
            },
            raise_on_error=False,
        )

    return run_batch


@pytest.fixture
def push(catalogue, files):
    """A function that puts images into the bulk lane, whose originals are the same photo."""

    def push(*image_ids):
        for number, image_id in enumerate(image_ids):
            files.put_original(image_id, (PHOTOS / "cat.jpg").read_bytes() + bytes(number), "jpg")
            catalogue.accept([Upload(image_id)])
            catalogue.prioritize(image_id, BULK_PRIORITY)

    return push


def list_materialized(instance, asset):
    return set(instance.get_materialized_partitions(dg.AssetKey(asset)))


def test_one_run_completes_many_images(run_batch, push, catalogue, instance, index):
    ids = [f"image-{number}" for number in range(6)]
    push(*ids)
    result = run_batch()
    assert result.success
    assert catalogue.count()["completed"] == 6
    assert len({catalogue.get(image_id)["run_id"] for image_id in ids}) == 1
    for asset in ASSETS:
        assert list_materialized(instance, asset) == set(ids)
    assert set(instance.get_dynamic_partitions("uploads")) == set(ids)
    assert all(index.get(image_id, LocalEmbedder.recipe.version) for image_id in ids)


def test_results_of_a_batch_are_as_fresh_as_those_of_single_runs(run_batch, push, instance):
    """Dagster has no public question for this, so the test asks what its UI asks."""
    push("cat")
    assert run_batch().success
    graph = defs().get_repository_def().asset_graph
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    for asset in ASSETS:
        causes = resolver.get_stale_causes(dg.AssetKey(asset), "cat")
        assert resolver.get_status(dg.AssetKey(asset), "cat") == StaleStatus.FRESH, causes


def test_an_image_that_is_made_in_part_shows_that_part_in_few_bytes(
    run_batch, push, catalogue, instance
):
    class Other(LocalVision):
        recipe = Recipe("local", "other")

    push("cat")
    assert run_batch().success
    catalogue.accept([Upload("cat")])
    catalogue.prioritize("cat", BULK_PRIORITY)
    result = run_batch(vision=Other())
    assert result.success
    of_image = instance.fetch_materializations(ORIGINAL, limit=1).records[0]
    shown = of_image.asset_materialization.metadata
    assert {"status", "picture", "description", "see_variants", "see_embedding"} <= {*shown}
    assert not {"variants", "see_metadata"}.intersection(shown)
    events = [
        record.event_log_entry
        for asset in (ORIGINAL, *map(dg.AssetKey, ASSETS))
        for record in instance.fetch_materializations(asset, limit=9).records
        if record.run_id == result.run_id
    ]
    assert [event.dagster_event.asset_key.path for event in events] == [["original"], ["metadata"]]
    assert max(len(event.to_json()) for event in events) < 2500


def test_a_bad_file_and_an_outage_cost_the_neighbours_nothing(
    run_batch, push, catalogue, files, instance
):
    class Flaky(LocalVision):
        """Is down for the first two calls."""

        calls = 0
        lock = threading.Lock()

        def describe(self, preview, facts):
            with self.lock:
                self.calls += 1
                if self.calls <= 2:
                    raise ProviderUnavailableError("the provider is down")
            return super().describe(preview, facts)

    push("a", "b", "c")
    files.put_original("b", b"not a picture", "jpg")
    assert run_batch(vision=Flaky()).success
    rows = {image_id: catalogue.get(image_id) for image_id in "abc"}
    assert {row["status"] for row in (rows["a"], rows["c"])} == {"completed"}
    assert (rows["b"]["status"], rows["b"]["reason"]) == ("failed", "unsupported")
    assert sum(row["attempts"] for row in rows.values()) in (4, 5)  # two calls failed
    assert list_materialized(instance, "metadata") == {"a", "c"}
    events = instance.fetch_materializations(ORIGINAL, limit=9).records
    shown = {event.partition_key: event.asset_materialization.metadata for event in events}
    assert {image_id: entries["status"].value for image_id, entries in shown.items()} == {
        image_id: row["status"] for image_id, row in rows.items()
    }
    assert shown["b"]["error"].value == rows["b"]["error"]


def test_a_batch_takes_no_more_images_than_its_size(run_batch, push, catalogue):
    push("a", "b", "c")
    assert run_batch(size=2).success
    assert catalogue.count()["completed"] == 2
    assert [catalogue.get(image_id)["status"] for image_id in "abc"][2] == "pending"


def test_a_batch_takes_no_images_once_a_person_has_paused_all_work(
    run_batch, push, catalogue, ledger
):
    push("a")
    ledger.pause(BY_PERSON, "the disk is being moved", None)
    assert run_batch().success
    assert catalogue.get("a")["status"] == "pending"


@pytest.mark.parametrize(
    "error", [PausedError("credits", "no credit is left", None), RateLimitError("used up")]
)
def test_a_batch_takes_no_more_images_once_paid_work_must_wait(run_batch, push, catalogue, error):
    class Waiting(LocalVision):
        def describe(self, preview, facts):
            raise error

    push(*(f"i{number}" for number in range(IMAGES_AT_ONCE)))
    assert run_batch(vision=Waiting()).success
    rows = [catalogue.get(f"i{number}") for number in range(IMAGES_AT_ONCE)]
    assert {row["status"] for row in rows} == {"pending"}
    events = [line["event"] for row in rows for line in row["history"]]
    assert 1 <= events.count("handed_back") <= IMAGES_AT_ONCE  # once in each thread, not on and on


class Stopped(LocalVision):
    """Stops the process as Celery and Dagster do."""

    def describe(self, preview, facts):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def test_the_images_of_a_batch_that_is_stopped_get_runs_of_their_own(run_batch, push, catalogue):
    push("a")
    assert not run_batch(vision=Stopped()).success
    row = catalogue.get("a")
    assert (row["status"], row["generation"]) == ("pending", 2)
    assert row["history"][-1]["detail"] == STOPPED
    assert catalogue.claim_next("other") is None


def test_a_batch_that_dagster_fails_does_not_say_that_it_was_stopped(
    run_batch, push, catalogue, instance, tasks, monkeypatch
):
    def restore(*_):
        raise OSError("Dagster's database does not answer")

    monkeypatch.setattr(batches, "restore", restore)
    push("a")
    result = run_batch()
    assert not result.success
    assert catalogue.get("a")["run_id"] == result.run_id
    reconcile(catalogue, instance, tasks, StandstillWatch())
    row = catalogue.get("a")
    assert (row["status"], row["history"][-1]["detail"]) == (
        "pending",
        "its run ended without a result",
    )


def test_an_image_whose_runs_are_stopped_three_times_fails(run, instance, catalogue, cat):
    catalogue.accept([Upload(cat)])
    for generation, status in ((1, "pending"), (2, "pending"), (3, "failed")):
        result = run(cat, generation, vision=Stopped())
        assert not result.success
        row = catalogue.get(cat)
        assert (row["status"], row["fence"]) == (status, 2 * generation - (status == "failed"))
    assert row["reason"] == "poison"
    assert row["error"] == f"its run was lost 3 times, the last time because {STOPPED}"
    tags = instance.get_run_by_id(result.run_id).tags
    assert (tags[STATUS_TAG], tags[REASON_TAG]) == ("failed", "poison")


def test_an_image_whose_batch_died_gets_a_run_of_its_own(push, catalogue):
    push("a")
    catalogue.claim_next("run")
    [lost] = catalogue.list_processing()
    assert catalogue.recover(lost.claim, "its process died") == "pending"
    assert catalogue.claim_next("other") is None
    assert [pending.image_id for pending in catalogue.list_pending(9)] == ["a"]


def test_a_batch_takes_uploads_of_a_backlog_behind_those_with_runs_of_their_own(
    run_batch, push, catalogue, instance
):
    push("planned", *"abcde")
    for image_id, priority in zip("abcde", (0, 5, 0, 0, -5), strict=True):
        catalogue.prioritize(image_id, priority)
    catalogue.hand_back(catalogue.claim("c", 1, "a run of its own"), "it was stopped")
    assert run_batch(config={"uploads_left": 2}).success
    completed = {
        image_id for image_id in "abcde" if catalogue.get(image_id)["status"] == "completed"
    }
    assert completed == {"d", "e"}  # b and a are first in line, c runs alone
    for asset in ASSETS:  # each was made once, and none was restored
        made = instance.fetch_materializations(dg.AssetKey(asset), limit=10).records
        assert sorted(record.partition_key for record in made) == ["d", "e"]
        assert not any("restored" in record.asset_materialization.metadata for record in made)
    assert catalogue.get("planned")["status"] == "pending"


def test_decoders_of_the_bulk_lane_yield_the_cpu():
    with Sandbox(niceness=NICEST).open(
        decode, (PHOTOS / "cat.jpg").read_bytes(), Rules()
    ) as session:
        assert os.getpriority(os.PRIO_PROCESS, session.process_id) == NICEST


@pytest.mark.parametrize(("uploads_left", "expected"), [(None, 20), (5, 15)])
def test_threads_claim_different_images(catalogue_url, uploads_left, expected):
    with closing(Catalogue(catalogue_url)) as catalogue:
        catalogue.accept([Upload(f"i{number:02}") for number in range(20)])
        if uploads_left is None:
            for number in range(20):
                catalogue.prioritize(f"i{number:02}", BULK_PRIORITY)
        with ThreadPoolExecutor(8) as pool:
            claims = list(
                pool.map(
                    lambda number: catalogue.claim_next(f"run{number}", uploads_left), range(24)
                )
            )
    claimed = [claim.image_id for claim in claims if claim]
    assert sorted(claimed) == [f"i{number:02}" for number in range(20 - expected, 20)]


@pytest.mark.parametrize(
    "config", [{"budget_usd": usd} for usd in (math.inf, math.nan, 1e308)] + [{"limit": 2**31}]
)
def test_the_apply_job_refuses_a_number_that_nothing_can_hold(config):
    with pytest.raises(ValidationError, match=next(iter(config))):
        ApplyConfig(**config)


def test_the_apply_job_opens_an_apply(instance, applier, catalogue, sqlite_catalogue_url):
    config = {"limit": 7, "budget_usd": 2.5, "assets": ["variants"]}
    run_config = {"ops": {"start_apply": {"config": config}}}
    options = {"instance": instance, "resources": {"applier": applier}}
    assert apply_plan.execute_in_process(run_config=run_config, **options).success
    apply = Applies(sqlite_catalogue_url).find_open()
    assert (apply.max_images, apply.budget_usd, [*apply.recipes]) == (7, 2.5, ["variants"])
    with pytest.raises(ApplyBusyError, match="an apply of Dagster's UI is under way"):
        apply_plan.execute_in_process(**options)


def test_an_image_that_is_replaced_while_a_batch_works_on_it_is_read_again(
    run_batch, push, catalogue, files, monkeypatch
):
    """Cancelled, replaced and pushed again, it is claimed by another thread of the same run."""
    monkeypatch.setattr(batches, "LINGER_SECONDS", 30)  # as long as other images wait
    push("x")
    is_first = threading.Event()

    class Slow(LocalVision):
        def describe(self, preview, facts):
            if not is_first.is_set():
                is_first.set()
                catalogue.cancel("x", "a wrong picture")
                push("x")
                files.put_original("x", (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
                deadline = time.monotonic() + 60
                while catalogue.get("x")["status"] != "completed":
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            return super().describe(preview, facts)

    assert run_batch(size=2, vision=Slow()).success
    assert is_first.is_set()
    row = catalogue.get("x")
    coffee = (PHOTOS / "coffee.jpg").read_bytes()
    assert (row["status"], row["original_sha256"]) == (
        "completed",
        hashlib.sha256(coffee).hexdigest(),
    )


@pytest.mark.parametrize("asset", ["metadata", "embedding"])
def test_an_image_that_is_erased_while_a_batch_asks_about_it_leaves_nothing(
    run_batch, push, catalogue, files, index, instance, sqlite_catalogue_url, asset
):
    erasures = Erasures(sqlite_catalogue_url)

    def erase():
        catalogue.cancel("victim", "it is erased")
        assert erasures.remove("victim", catalogue.get("victim")["fence"], []) is not None

    class Vision(LocalVision):
        recipe = Recipe("openai", "m", "p")

        def describe(self, preview, facts):
            if asset == "metadata":
                erase()
            return replace(super().describe(preview, facts), usage=CallUsage(800, 60))

    class Embedder(LocalEmbedder):
        recipe = Recipe("openai", "e", "")

        def embed(self, text):
            if asset == "embedding":
                erase()
            return replace(super().embed(text), version=self.recipe.version)

    push("victim")
    run_batch(vision=Vision(), embedder=Embedder())
    assert catalogue.get("victim") is None
    assert index.count_rows_of(["victim"]) == 0
    outcomes = instance.fetch_materializations(ORIGINAL, limit=9).records
    assert [one.partition_key for one in outcomes if one.partition_key == "victim"] == []
    with sa.create_engine(sqlite_catalogue_url).connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM answers").scalar() == 0
        calls = connection.exec_driver_sql("SELECT image_id FROM provider_calls").all()
    assert {image_id for (image_id,) in calls} == {None}


def test_a_run_of_pictures_makes_variants_alone_and_each_once(run_batch, push, catalogue):
    push("a", "b")
    assert run_batch(config={"pictures_only": True}).success
    for image_id in ("a", "b"):
        row = catalogue.get(image_id)
        assert (row["status"], row["priority"]) == ("pending", BULK_PRIORITY)
        assert list(row["made_by"]) == ["variants"]
        assert [one["event"] for one in row["history"]].count("claimed") == 1
    lacking = Renderer(build_variant_specs()).recipe
    assert not catalogue.has_next(None, lambda tenant: 9, lacking)
    assert catalogue.has_next(None, lambda tenant: 9, Recipe("local", "pillow", "another width"))
    assert run_batch().success
    assert catalogue.count()["completed"] == 2

"""What is pruned of an image, what stays, how it comes back, and what a kill leaves."""

import uuid
from contextlib import closing
from datetime import timedelta
from unittest.mock import Mock

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml
from dagster._core.definitions.assets.job.asset_job import IMPLICIT_ASSET_JOB_NAME
from dagster._core.events.log import EventLogEntry
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.storage.event_log import SqliteEventLogStorage

from imagepipeline import dagster_records, overview
from imagepipeline.dagster_records import DagsterRecords
from imagepipeline.defs import retention
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.batches import process_batch
from imagepipeline.defs.outcomes import build_outcome
from imagepipeline.defs.reconciler import StandstillWatch, reconcile
from imagepipeline.defs.restoring import restore
from imagepipeline.defs.retention import Kept, Pruner
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.instance import sqlite_storage
from imagepipeline.instance.event_filter import is_unread
from imagepipeline.instance.restoration import restore_one
from imagepipeline.models import (
    BULK_PRIORITY,
    PaidCall,
    Upload,
    build_variant_specs,
    now_utc,
)
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import Database
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.outbox import Outbox
from imagepipeline.stores.retention import Retention
from imagepipeline.stores.tables import schema
from imagepipeline.tenants import Tenants
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.defs.conftest import ASSETS

STEP_OUTPUT = dg.DagsterEventType.STEP_OUTPUT
SHOWN = ("original", "metadata", "variants", "embedding")
KEPT = Kept(7, 5000, 0, 32, 7, ["mail"])


class World:
    """A catalogue and a Dagster instance, and a clock that can be put forward."""

    def __init__(self, url, instance, files, index):
        self.url, self.instance, self.files, self.index = url, instance, files, index
        self.now = now_utc()
        self.catalogue = Catalogue(url, self.clock)
        self.ledger, self.retention = Ledger(url, self.clock), Retention(url, self.clock)
        self.records = DagsterRecords(instance)

    def clock(self):
        return self.now

    def prune(self, **changes):
        return self.pruner(**changes).prune(self.instance)

    def pruner(self, **changes):
        return Pruner(self.retention, Kept(**(vars(KEPT) | changes)))

    def resources(self):
        return {
            "catalogue": self.catalogue,
            "files": self.files,
            "originals": Originals(self.files, Sandbox(), Rules()),
            "background_originals": Originals(self.files, Sandbox(), Rules()),
            "renderer": Renderer(build_variant_specs()),
            "index": self.index,
            "paid_calls": PaidCalls(self.ledger, None, {}),
            "ledger": self.ledger,
            "batch_size": 9,
            "tenants": Tenants(self.catalogue, self.ledger, {}, {}),
            "vision": LocalVision(),
            "embedder": LocalEmbedder(),
        }

    def store(self, image_id):
        content = (PHOTOS / "cat.jpg").read_bytes() + image_id.encode()
        self.files.put_original(image_id, content, "jpg")
        self.catalogue.accept([Upload(image_id)])

    def run(self, image_id):
        """Takes in an upload and executes its run, as the sensor would start it."""
        self.store(image_id)
        for gone in self.catalogue.find_gone([image_id]):
            restore(self.instance, self.catalogue, gone)
        self.instance.add_dynamic_partitions("uploads", [image_id])
        generation = self.catalogue.get(image_id)["generation"]
        return dg.materialize(
            ASSETS,
            partition_key=image_id,
            instance=self.instance,
            tags={GENERATION_TAG: str(generation)},
            resources=self.resources(),
            raise_on_error=False,
        )

    def run_together(self, *image_ids):
        for image_id in image_ids:
            self.store(image_id)
            self.catalogue.prioritize(image_id, BULK_PRIORITY)
        assert process_batch.execute_in_process(
            instance=self.instance, resources=self.resources()
        ).success

    def list_shown(self, image_id):
        """The assets that Dagster calls materialized for an image."""
        return {
            asset
            for asset in SHOWN
            if image_id in self.instance.get_materialized_partitions(dg.AssetKey(asset))
        }

    def get_shown(self, asset, image_id):
        """The newest materialization of an image."""
        [record] = self.instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[image_id]), limit=1
        ).records
        return record

    def dump(self):
        """All rows of the catalogue, as in a backup."""
        with Database(self.url).reading() as connection:
            tables = {
                table: connection.execute(sa.select(table)).mappings().all()
                for table in schema.sorted_tables
            }
        return {table: [{**row} for row in rows] for table, rows in tables.items() if rows}

    def load(self, backup):
        """Restores the catalogue by docs/operations.md."""
        with Database(self.url).transaction() as connection:
            for table in reversed(schema.sorted_tables):
                connection.execute(sa.delete(table))
            for table, rows in backup.items():
                connection.execute(sa.insert(table), rows)
            connection.exec_driver_sql("UPDATE images SET fence = fence + 1000000")

    def count_bytes(self, image_id):
        """How much Dagster's event log has of an image, without the runs of others."""
        storage = self.instance.event_log_storage
        query = sa.text("SELECT sum(length(event)) FROM event_logs WHERE partition = :image_id")
        with storage.index_connection() as connection:
            return connection.execute(query, {"image_id": image_id}).scalar_one()


@pytest.fixture(params=["sqlite", "postgres", "files per run"])
def world(request, tmp_path, index, files):
    """SQLite as `up` uses it, Postgres, or SQLite as Dagster uses it by itself."""
    url = request.getfixturevalue(
        "postgres_catalogue_url" if request.param == "postgres" else "sqlite_catalogue_url"
    )
    storages = {
        "sqlite": ("sqlite_storage", "PooledSqliteStorage", "base_dir"),
        "postgres": ("postgres_storage", "PooledPostgresStorage", "postgres_url"),
    }
    config = {}
    if request.param in storages:
        module, name, option = storages[request.param]
        value = str(tmp_path / "dagster")
        if request.param == "postgres":
            value = request.getfixturevalue("dagster_postgres_url")
        module = f"imagepipeline.instance.{module}"
        custom = {"module": module, "class": name, "config": {option: value}}
        config = {"storage": {"custom": custom}}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(config))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        world = World(url, instance, files, index)
        with closing(world.catalogue):
            yield world
        if request.param == "postgres":
            vars(instance.run_storage)["_engine"].dispose()
    sqlite_storage.close_connections()


@pytest.mark.stack
def test_an_image_loses_its_runs_then_its_partition_and_comes_back(world, tmp_path):
    assert world.run("old").success
    world.run_together("together", "also", "again")
    before = {asset: world.get_shown(asset, "old") for asset in SHOWN}
    story = world.catalogue.get("old")
    events = world.instance.all_logs(story["run_id"])
    outputs = [event for event in events if event.dagster_event_type == STEP_OUTPUT]
    assert [event.dagster_event.step_output_data.metadata for event in outputs] == [{}] * 3
    if not isinstance(world.instance.event_log_storage, SqliteEventLogStorage):
        assert [event.message for event in events if is_unread(event)] == []
        assert len(events) == 19
    world.now += timedelta(days=6)
    world.run_together("again")  # which makes nothing: Dagster has it from the first run
    world.now += timedelta(days=2)
    assert world.run("new").success

    planned = world.pruner().plan(world.instance)
    assert (planned.summaries, planned.runs, planned.partitions) == (3, 2, 0)
    done = world.prune()
    assert (done.summaries, done.runs, done.partitions, done.waits_because) == (3, 2, 0, "")
    assert world.catalogue.get("old") == story | {"in_dagster": "summary"}
    assert [run.tags["dagster/partition"] for run in world.instance.get_runs()] == ["new"]
    for image_id in ("old", "together", "also", "again", "new"):
        assert world.list_shown(image_id) == set(SHOWN)
    for asset, record in before.items():
        after = world.get_shown(asset, "old")
        assert (after.storage_id, after.timestamp) == (record.storage_id, record.timestamp)
        assert after.asset_materialization.tags == record.asset_materialization.tags
        assert after.run_id == ""
    assert world.count_bytes("old") < 8_000 < world.count_bytes("new")
    assert not [*tmp_path.rglob(f"{story['run_id']}*")]
    assert world.prune().total == 0

    done = world.prune(partitions=1)
    assert done.partitions == 4
    assert world.instance.get_dynamic_partitions("uploads") == ["new"]
    assert world.list_shown("old") == set()
    told = overview.describe_image(world.catalogue.get("old"), world.now, "http://ui")
    assert told["in the UI"] == "not any more: `imagepipeline restore old`"
    assert world.list_shown("new") == set(SHOWN)
    assert world.catalogue.get("old")["history"] == story["history"]

    restore(world.instance, world.catalogue, "old")
    world.retention.note_restored("old")
    assert world.list_shown("old") == set(SHOWN)
    for asset in ("metadata", "variants", "embedding"):
        tags = world.get_shown(asset, "old").asset_materialization.tags
        was = before[asset].asset_materialization.tags
        assert tags["dagster/data_version"] == was["dagster/data_version"]
    sizes = [
        record.asset_materialization.metadata["bytes_out"]
        for record in (before["variants"], world.get_shown("variants", "old"))
    ]
    assert sizes[0] == sizes[1]
    assert world.prune(partitions=2).total == 0, "what was restored is not the oldest"

    assert world.run("together").success  # as a new upload
    assert world.catalogue.get("together")["status"] == "completed"
    assert world.list_shown("together") == set(SHOWN)
    world.run_together("also")
    assert world.list_shown("also") == set(SHOWN)


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_a_prune_that_is_killed_at_any_step_is_continued_by_the_next(world, monkeypatch):
    class Killed(BaseException):
        pass

    def kill_at(name, is_after, **limits):
        original = getattr(DagsterRecords, name)

        def die(*arguments):
            if is_after:
                original(*arguments)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(DagsterRecords, name, die)
            with pytest.raises(Killed):
                world.prune(**limits)

    of_runs = ("detach", "remove_run", "remove_runs")
    of_partitions = ("remove_runs", "remove_events", "remove_partition")
    for image_id, steps, limits in (
        ("shortened", of_runs, {"runs_days": 1e-9}),
        ("removed", of_partitions, {"partitions_days": 1e-9}),
    ):
        assert world.run(image_id).success
        world.now += timedelta(seconds=1)
        for name in steps:
            for is_after in (False, True):
                kill_at(name, is_after, **limits)
                assert world.catalogue.get(image_id)["in_dagster"] == "runs"
                if limits == {"runs_days": 1e-9}:
                    assert world.list_shown(image_id) == set(SHOWN)
        assert world.prune(**limits).total > 0
        assert world.records.count_runs(image_id) == 0
        assert world.prune(**limits).total == 0
    assert world.list_shown("shortened") == world.list_shown("removed") == set()
    for image_id in ("shortened", "removed"):
        assert world.run(image_id).success
        assert world.list_shown(image_id) == set(SHOWN)


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_what_is_at_work_is_left_alone(world, monkeypatch):
    for image_id in ("pushed", "claimed", "running", "ended"):
        assert world.run(image_id).success
    world.now += timedelta(days=100)
    world.catalogue.accept([Upload("pushed"), Upload("claimed")])
    world.catalogue.claim("claimed", 2, "some run")
    unfinished = dg.DagsterRun(
        job_name="__ASSET_JOB",
        run_id="00000000-0000-4000-8000-000000000000",
        status=dg.DagsterRunStatus.STARTED,
        tags={"dagster/partition": "running"},
    )
    world.instance.add_run(unfinished)
    backfill = PartitionBackfill(
        "backfill",
        BulkActionStatus.REQUESTED,
        from_failure=False,
        tags={},
        backfill_timestamp=world.now.timestamp(),
        asset_selection=[dg.AssetKey("metadata")],
    )
    world.instance.add_backfill(backfill)
    everything = {"partitions_days": 1, "partitions": 1, "runs_days": 0}
    done = world.prune(**everything)
    assert (done.total, done.waits_because != "") == (0, True)
    world.instance.update_backfill(backfill.with_status(BulkActionStatus.COMPLETED_SUCCESS))

    # A push that comes while an image is pruned waits, and finds all of it gone or nothing.
    original = DagsterRecords.has_unfinished_runs

    def push_first(records, image_id):
        if image_id == "ended":
            world.catalogue.accept([Upload(image_id)])
        return original(records, image_id)

    with monkeypatch.context() as patch:
        patch.setattr(DagsterRecords, "has_unfinished_runs", push_first)
        assert world.prune(**everything).total == 0
    for image_id in ("pushed", "claimed", "running", "ended"):
        assert world.list_shown(image_id) == set(SHOWN)
        assert world.records.count_runs(image_id) >= 1
    world.instance.report_run_failed(unfinished)
    assert world.prune(**everything).partitions == 1


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_an_image_that_is_erased_while_it_is_restored_stays_away(world, monkeypatch):
    assert world.run("victim").success
    get = world.catalogue.get

    def erase_after(image_id):
        if row := get(image_id):
            world.records.remove_runs(image_id)
            world.records.remove_events(image_id)
            world.records.remove_partition(image_id)
            assert Erasures(world.url).remove(image_id, row["fence"], [])
        return row

    monkeypatch.setattr(world.catalogue, "get", erase_after)
    restore(world.instance, world.catalogue, "victim")
    assert not world.records.has_partition("victim")
    assert world.list_shown("victim") == set()


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_an_erased_image_takes_no_lines_of_images_with_similar_names_along(world):
    world.run_together("a_b", "axb", "A_B")
    [run] = world.instance.get_runs()
    names = ["a_b", "axb", "A_B"]
    for name in names:
        line = EventLogEntry(
            error_info=None,
            level=20,
            user_message=f"{name}: attempt 1 failed",
            run_id=run.run_id,
            timestamp=1.0,
        )
        world.instance.handle_new_event(line)
    world.records.remove_events("a_b", is_logged=True)
    lines = [entry.user_message for entry in world.instance.all_logs(run.run_id)]
    assert [name for name in names if f"{name}: attempt 1 failed" in lines] == ["axb", "A_B"]


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_an_image_that_is_pushed_again_and_again_keeps_only_its_newer_runs(world, monkeypatch):
    assert IMPLICIT_ASSET_JOB_NAME in retention.OF_ONE
    monkeypatch.setattr(retention, "OF_ONE", ("__ephemeral_asset_job__",))  # of `world.run`
    assert world.run("again").success
    between = world.now = now_utc()
    assert world.run("again").success
    world.now = between + timedelta(days=7)
    assert world.prune().runs == 1
    assert world.records.count_runs("again") == 1
    assert world.catalogue.get("again")["in_dagster"] == "runs"
    assert world.list_shown("again") == set(SHOWN)

    # While the row is locked, only a few runs are removed.
    counts = []
    original = DagsterRecords.remove_runs

    def count_first(records, image_id):
        counts.append(records.count_runs(image_id))
        return original(records, image_id)

    for _ in range(2):
        assert world.run("again").success
    monkeypatch.setattr(dagster_records, "FEW_RUNS", 1)
    monkeypatch.setattr(DagsterRecords, "remove_runs", count_first)
    world.now += timedelta(days=2)
    assert world.prune(partitions_days=1, runs_days=0).partitions == 1
    assert counts == [1]


@pytest.mark.parametrize("url", ["sqlite_catalogue_url", "postgres_catalogue_url"])
def test_sums_of_costs_outlive_their_calls_and_unsent_notices_stay(url, request):
    url = request.getfixturevalue(url)
    now = [now_utc()]
    catalogue, ledger = Catalogue(url, lambda: now[0]), Ledger(url, lambda: now[0])
    kept, outbox = Retention(url, lambda: now[0]), Outbox(url, lambda: now[0])
    catalogue.accept([Upload("paid"), Upload("sent"), Upload("unsent")])
    for image_id in ("paid", None, "paid"):
        ledger.record(PaidCall(image_id, 1, "metadata", "p", "m", "answered", 9, 1, 0.5, 1, 0))
    for image_id in ("sent", "unsent"):
        claim = catalogue.claim(image_id, 1, "run")
        catalogue.fail(claim, "poison", "it kills")
    outbox.mark_sent(
        "mail", [one for one in outbox.list_unsent("mail") if one["image_id"] == "sent"]
    )
    now[0] += timedelta(days=40)
    ledger.record(PaidCall("paid", 1, "metadata", "p", "m", "answered", 9, 1, 0.25, 1, 0))

    def sum_all():
        return [
            *(ledger.summarize(by) for by in ("model", "stage", "day")),
            ledger.sum_cost_usd(now[0] - timedelta(days=99)),
            catalogue.sum_cost_usd("paid"),
            catalogue.sum_cost_usd("sent"),
        ]

    before = sum_all()
    assert before[-2:] == [1.25, None]
    pruner = Pruner(kept, KEPT)
    with dg.DagsterInstance.ephemeral() as instance:
        planned, done = pruner.plan(instance), pruner.prune(instance)
        assert (planned.calls, planned.notices) == (done.calls, done.notices) == (3, 1)
        assert sum_all() == before
        assert pruner.prune(instance).total == 0
    with sa.create_engine(url).connect() as connection:
        rows = connection.exec_driver_sql("SELECT image_id FROM notifications").scalars().all()
        assert rows == ["unsent"]
    catalogue.close()


def test_what_is_restored_of_a_failed_image_says_why_it_failed(world):
    world.catalogue.accept([Upload("bad")])
    world.catalogue.fail(world.catalogue.claim("bad", 1, "run"), "too_large", "it is too large")
    restore(world.instance, world.catalogue, "bad")
    shown = world.get_shown("original", "bad").asset_materialization.metadata
    assert shown["reason"].value == "too_large"
    assert build_outcome(world.catalogue, "bad").metadata["error"] == shown["error"]


@pytest.mark.stack
@pytest.mark.parametrize("world", ["sqlite", "postgres"], indirect=True)
def test_what_backups_of_different_ages_disagree_on_is_told_and_repaired(world, tasks, monkeypatch):
    def reconcile_all():
        return sorted(reconcile(world.catalogue, world.instance, tasks, StandstillWatch()))

    def start(image_id):
        """A run that has claimed an image and goes on until after the backup."""
        world.store(image_id)
        run = dg.DagsterRun(
            "__ASSET_JOB",
            str(uuid.uuid4()),
            tags={"dagster/partition": image_id, GENERATION_TAG: "1"},
        )
        world.instance.add_run(run._replace(status=dg.DagsterRunStatus.STARTED))
        world.catalogue.claim(image_id, 1, run.run_id)
        return run

    assert world.run("done").success
    world.store("waited")
    running = start("running")
    assert reconcile_all() == []
    backup = world.dump()
    assert world.run("waited").success
    assert world.run("later").success
    world.instance.report_run_failed(running)

    # The catalogue is older than Dagster, the files and the index.
    world.load(backup)
    assert world.catalogue.find_unknown({"later": "original/later.jpg", "done": "x"}) == {
        "later": "original/later.jpg"
    }
    ran, was = reconcile_all()
    assert ran.startswith("running was recovered and is pending: its run ended without a result")
    assert was.startswith("waited is requested again in 1 s: its run ended before it began (run ")
    world.now += timedelta(seconds=1)
    assert reconcile_all() == []
    for image_id in ("waited", "running", "later"):
        assert world.run(image_id).success
        assert world.catalogue.get(image_id)["status"] == "completed"

    # Dagster is older than the catalogue.
    gone = start("gone")
    world.instance.delete_run(gone.run_id)
    for image_id in ("done", "waited"):
        world.records.remove_runs(image_id)
        world.records.remove_events(image_id)
        world.records.remove_partition(image_id)
    [line] = reconcile_all()
    assert line.startswith("gone was recovered and is pending: its run was deleted (run ")
    with monkeypatch.context() as patch:
        killed = Mock(side_effect=ConnectionError)
        patch.setattr(world.instance, "report_runless_asset_event", killed)
        with pytest.raises(ConnectionError):
            restore_one(world.instance, world.catalogue, world.retention, "done")
    restored = restore_one(world.instance, world.catalogue, world.retention, "done")
    assert restored["outcome"] == "restored"
    assert world.list_shown("done") == set(SHOWN)
    again = restore_one(world.instance, world.catalogue, world.retention, "done")
    assert again["outcome"] == "left alone: Dagster has it"

    # Dagster's database is lost: another one takes over.
    world.catalogue.bind("lost")
    world.catalogue.bind("new", is_taken_over=True)
    assert world.catalogue.find_gone(["done", "waited", "running"]) == ["done", "running", "waited"]

"""An erased image is found nowhere: in no file, no table of ours or Dagster's, and no bucket."""

import hashlib
import json
import struct
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import dagster as dg
import pytest
import sqlalchemy as sa
import yaml

from imagepipeline import erasing
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.batches import process_batch
from imagepipeline.defs.jobs import process_upload
from imagepipeline.defs.outcomes import build_outcome
from imagepipeline.defs.restoring import restore
from imagepipeline.errors import StackError, StaleClaimError
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.instance import erasure, sqlite_storage
from imagepipeline.models import BULK_PRIORITY, PaidCall, Upload, build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import Kept
from imagepipeline.relaying import relay_to_stream
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision, VisionAnswer
from imagepipeline.storage import open_storage
from imagepipeline.stores import vectors
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.stream import EventStream
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline.tenants import Tenants
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.defs.conftest import ASSETS

RECIPES = {"metadata": LocalVision.recipe, "embedding": LocalEmbedder.recipe}


@dataclass
class World:
    """Everything an image leaves traces in."""

    stores: erasing.Stores
    instance: dg.DagsterInstance
    ledger: Ledger
    folder: Path
    databases: list[str]
    bucket: str | None
    prefix: str  # in the bucket, which other tests use at the same time
    stream: EventStream

    def run(self, image_id: str, photo: str) -> None:
        """Takes in an upload and executes its run."""
        content = (PHOTOS / photo).read_bytes() + image_id.encode()
        self.stores.files.put_original(image_id, content, "jpg")
        self.stores.catalogue.accept([Upload(image_id)])
        generation = self.stores.catalogue.get(image_id)["generation"]
        self.instance.add_dynamic_partitions("uploads", [image_id])
        resources = {
            "catalogue": self.stores.catalogue,
            "files": self.stores.files,
            "originals": Originals(self.stores.files, Sandbox(), Rules()),
            "renderer": Renderer(build_variant_specs()),
            "index": self.stores.index,
            "paid_calls": paid_calls_of(self),
            "vision": LocalVision(),
            "embedder": LocalEmbedder(),
        }
        tags = {GENERATION_TAG: str(generation)}
        assert dg.materialize(
            ASSETS,
            partition_key=image_id,
            instance=self.instance,
            tags=tags,
            resources=resources,
        ).success

    def run_together(self, *photos: str) -> None:
        """Takes in photos as uploads of their names, and executes one batch for them."""
        for photo in photos:
            content = (PHOTOS / photo).read_bytes()
            self.stores.files.put_original(Path(photo).stem, content, "jpg")
            self.stores.catalogue.accept([Upload(Path(photo).stem)])
            self.stores.catalogue.prioritize(Path(photo).stem, BULK_PRIORITY)
        assert process_batch.execute_in_process(
            instance=self.instance,
            resources={
                "catalogue": self.stores.catalogue,
                "files": self.stores.files,
                "background_originals": Originals(self.stores.files, Sandbox(), Rules()),
                "renderer": Renderer(build_variant_specs()),
                "index": self.stores.index,
                "paid_calls": paid_calls_of(self),
                "vision": LocalVision(),
                "embedder": LocalEmbedder(),
                "ledger": self.ledger,
                "batch_size": 9,
                "tenants": Tenants(self.stores.catalogue, self.ledger, {}, {}),
            },
        ).success

    def relay(self) -> None:
        """Sends the events to the stream."""
        relay_to_stream(EventLog(self.databases[0]), self.stream)

    def find(self, needles: dict[str, bytes]) -> set[str]:
        """Which of these are in any file, table or object, and where."""
        found = set()

        def look(place: str, content: bytes) -> None:
            found.update(f"{name} in {place}" for name, one in needles.items() if one in content)

        for path in self.folder.rglob("*"):
            if path.is_file():
                look(str(path.relative_to(self.folder)), path.read_bytes())
        for url in self.databases:
            engine = sa.create_engine(url)
            with engine.connect() as connection:
                for table in sa.inspect(engine).get_table_names():
                    for row in connection.exec_driver_sql(f'SELECT * FROM "{table}"'):
                        look(
                            table,
                            repr(tuple(row)).encode() + json.dumps(list(map(str, row))).encode(),
                        )
            engine.dispose()
        if self.bucket:
            client = boto3.client("s3", endpoint_url=self.bucket, region_name="us-east-1")
            listed = client.list_objects_v2(Bucket="images", Prefix=self.prefix)
            for entry in listed.get("Contents", []):
                body = client.get_object(Bucket="images", Key=entry["Key"])["Body"].read()
                look(entry["Key"], body)
        for number, fields in self.stream.redis.xrange(self.stream.key):
            look(f"event {number}", b"".join(fields.values()))
        return found


def paid_calls_of(world: World) -> Any:
    """Models of the world are local, so nothing is paid."""
    from imagepipeline.paid_calls import PaidCalls

    return PaidCalls(world.ledger, None, {})


@pytest.fixture(params=["one machine", "production"])
def world(request, tmp_path, queue, redis_url, monkeypatch):
    """SQLite and folders, or Postgres and a bucket."""
    monkeypatch.setattr(vectors, "SETTLE_SECONDS", 0)
    folder = tmp_path / "home"
    folder.mkdir()
    if request.param == "one machine":
        root, bucket = str(folder / "storage"), None
        url = request.getfixturevalue("create_catalogue")(folder / "catalogue.sqlite")
        storage = {
            "module": "imagepipeline.instance.sqlite_storage",
            "class": "PooledSqliteStorage",
            "config": {"base_dir": str(folder / "dagster")},
        }
        databases = [
            url,
            *(f"sqlite:///{folder / 'dagster' / name}.db" for name in ("runs", "event_log")),
        ]
    else:
        root = request.getfixturevalue("bucket_url")
        bucket = request.getfixturevalue("s3_server")["AWS_ENDPOINT_URL"]
        url = request.getfixturevalue("postgres_catalogue_url")
        dagster_url = request.getfixturevalue("dagster_postgres_url")
        storage = {
            "module": "imagepipeline.instance.postgres_storage",
            "class": "PooledPostgresStorage",
            "config": {"postgres_url": dagster_url},
        }
        databases = [url, dagster_url]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": {"custom": storage}}))
    with (
        dg.DagsterInstance.from_config(str(tmp_path)) as instance,
        closing(Catalogue(url)) as catalogue,
        closing(Ledger(url)) as ledger,
    ):
        stores = erasing.Stores(
            catalogue,
            Erasures(url),
            queue,
            open_storage(root),
            EmbeddingIndex(f"{root}/lancedb"),
            erasure.Dagster(instance),
            build_variant_specs(),
            RECIPES,
        )
        stream = EventStream(redis_url, "test", 100)
        prefix = root.removeprefix("s3://images/")
        yield World(stores, instance, ledger, folder, databases, bucket, prefix, stream)
        if request.param == "production":
            vars(instance.run_storage)["_engine"].dispose()
    sqlite_storage.close_connections()


def describe(world: World, image_id: str) -> dict[str, bytes]:
    """What would give an image away: bytes that are its own."""
    row = world.stores.catalogue.get(image_id)
    vector = world.stores.index.get(image_id, LocalEmbedder.recipe.version)["vector"]
    original = world.stores.files.read(row["path"])
    variant = world.stores.files.read(row["variants"][0]["path"])
    return {
        "hash": row["original_sha256"].encode(),
        "description": row["metadata"]["description"].encode(),
        "placeholder": row["placeholder"].encode(),
        "vector": struct.pack("<32f", *vector[:32]),
        "original": original[2000:2100],
        "variant": variant[500:600],
    }


def erase(world: World, *image_ids: str, is_dry_run: bool = False) -> list[erasing.Receipt]:
    receipts = erasing.erase(world.stores, image_ids, is_dry_run)
    if world.bucket is None and not is_dry_run:
        assert sqlite_storage.truncate_logs()
    return receipts


@pytest.mark.stack
def test_an_erased_image_is_found_nowhere_and_may_be_pushed_again(world):
    world.run("other", "coffee.jpg")
    world.run("victim", "cat.jpg")  # last: Dagster keeps a copy of the latest materialization
    traces, kept = describe(world, "victim"), describe(world, "other")
    key = Kept("metadata", RECIPES["metadata"], traces["hash"].decode(), VisionAnswer).key
    call = PaidCall("victim", 1, "metadata", "openai", "m", "answered", 1, 1, 0.25, 1.0, 0.0)
    world.ledger.record(call, key, traces["description"].decode())
    world.stores.queue.enqueue("victim")
    before = world.find(traces)
    assert {name for name in traces if any(one.startswith(name) for one in before)} == set(traces)

    [dry] = erase(world, "victim", is_dry_run=True)
    assert world.find(traces) == before
    assert (dry.is_known, dry.entries, dry.vectors, dry.runs, len(dry.files)) == (True, 1, 1, 1, 3)

    world.stores.catalogue.accept([Upload("victim")])  # pending: no run may take it
    [receipt, unknown] = erase(world, "victim", "nobody")
    assert world.find(traces) == set()
    assert receipt.files == dry.files
    assert receipt.rows["images"] == 1
    assert not unknown.is_known
    assert world.stores.queue.count()["waiting"] == 0
    assert world.instance.get_dynamic_partitions("uploads") == ["other"]
    assert world.ledger.summarize("model")[0]["cost_usd"] == 0.25

    # The other image has lost nothing.
    assert world.find(kept)
    assert world.stores.catalogue.get("other")["status"] == "completed"
    latest = world.instance.get_latest_materialization_event(dg.AssetKey("metadata"))
    assert latest.asset_materialization.partition == "other"

    world.run("victim", "rocket.jpg")
    row = world.stores.catalogue.get("victim")
    assert (row["status"], row["generation"]) == ("completed", 3)
    erase(world, "other", "victim")  # the last ones: Dagster's copies go, too
    assert world.find(traces | kept) == set()


@pytest.mark.stack
@pytest.mark.parametrize("world", ["one machine"], indirect=True)
def test_what_is_restored_until_the_rows_are_gone_is_removed_again(world, monkeypatch):
    world.run("victim", "coffee.jpg")
    remove = Erasures.remove

    def restore_first(*arguments):
        restore(world.instance, world.stores.catalogue, "victim")
        return remove(*arguments)

    monkeypatch.setattr(Erasures, "remove", restore_first)
    erase(world, "victim")
    assert not world.stores.orchestrator.has_partition("victim")
    assert world.instance.get_materialized_partitions(dg.AssetKey("metadata")) == set()


@pytest.mark.stack
def test_what_an_image_shares_with_others_loses_its_part_alone(world):
    """Events of a batch, events without a run, and the stream of events for apps."""
    world.run_together("coffee.jpg", "cat.jpg")
    world.instance.report_runless_asset_event(build_outcome(world.stores.catalogue, "cat"))
    world.relay()
    traces, kept = describe(world, "cat"), describe(world, "coffee")
    [receipt] = erase(world, "cat")
    assert receipt.is_known
    world.relay()
    assert world.find(traces) == set()
    told = [
        json.loads(fields[b"event"])["type"]
        for _, fields in world.stream.redis.xrange(world.stream.key)
    ]
    assert told.count("image.erased") == 1
    assert world.find({"description": kept["description"]})
    for asset in ("metadata", "variants", "embedding", "original"):
        assert world.instance.get_materialized_partitions(dg.AssetKey(asset)) == {"coffee"}


@pytest.mark.stack
@pytest.mark.parametrize("world", ["one machine"], indirect=True)
def test_a_run_under_way_can_write_nothing_more(world):
    """Plays a run that was cancelled by force, and writes until it looks for its claim."""
    world.stores.files.put_original("victim", b"late", "jpg")
    world.stores.files.write("variants/victim-sm.webp", b"late")
    world.stores.catalogue.accept([Upload("victim")])
    claim = world.stores.catalogue.claim("victim", 1, "run")
    dagster = world.stores.orchestrator
    embedding = LocalEmbedder().embed("a secret cat")

    class Late:
        count_runs, end_runs = dagster.count_runs, dagster.end_runs

        def remove(self, image_id):
            world.stores.files.write("variants/victim-sm.webp", b"late")
            world.stores.index.upsert(claim, embedding)
            return dagster.remove(image_id)

    [receipt] = erase(replace_orchestrator(world, Late()), "victim")
    assert receipt.is_known
    with pytest.raises(StaleClaimError):
        world.stores.catalogue.beat(claim)
    assert world.stores.catalogue.get("victim") is None
    assert world.find({"file": b"late", "text": b"a secret cat"}) == set()


@pytest.mark.stack
@pytest.mark.parametrize("world", ["one machine"], indirect=True)
def test_an_image_that_is_pushed_while_it_is_erased_is_erased_again(world):
    world.run("victim", "cat.jpg")
    dagster, pushes = world.stores.orchestrator, iter([True, False, False])

    class Pushed:
        count_runs, end_runs = dagster.count_runs, dagster.end_runs

        def remove(self, image_id):
            if next(pushes, True):
                world.stores.catalogue.accept([Upload(image_id)])
            return dagster.remove(image_id)

    pushed = replace_orchestrator(world, Pushed())
    erase(pushed, "victim")
    assert world.stores.catalogue.get("victim") is None
    world.run("victim", "cat.jpg")
    with pytest.raises(StackError, match="pushed again and again"):
        erase(pushed, "victim")


@pytest.mark.stack
@pytest.mark.parametrize("world", ["one machine"], indirect=True)
def test_a_run_that_does_not_end_stops_the_erasing(world, monkeypatch):
    monkeypatch.setattr(erasure, "END_SECONDS", 0)
    world.run("victim", "cat.jpg")
    run = dg.DagsterRun(
        job_name=process_upload.name,
        run_id=hashlib.md5(b"run").hexdigest(),
        status=dg.DagsterRunStatus.STARTED,
        tags={"dagster/partition": "victim"},
    )
    world.instance.add_run(run)
    with pytest.raises(StackError, match=f"run {run.run_id} of victim does not end"):
        erase(world, "victim")
    assert world.stores.catalogue.get("victim")["status"] == "completed"
    world.instance.report_run_failed(run)
    assert erase(world, "victim")[0].runs == 2


def replace_orchestrator(world: World, orchestrator: Any) -> World:
    return replace(world, stores=replace(world.stores, orchestrator=orchestrator))

"""Runs are killed or frozen before and after each of their effects; images still complete once.

A run is a process that executes Dagster's job on a real instance. It kills or stops itself with a
signal right before or after an effect. The reconciler then hands the image over, and a second run
processes it again.
"""

import io
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml
from PIL import Image

from imagepipeline.defs.reconciler import STALL_SECONDS, StandstillWatch, reconcile
from imagepipeline.models import (
    ImageMetadata,
    Upload,
    VariantSpec,
    build_variant_specs,
)
from imagepipeline.runtime.worker import is_stopped
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.stores.broker import TaskQueue
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import PHOTOS, count_answers
from imagepipeline_tests.end_to_end.one_run import CONTEXT, EFFECTS, execute

pytestmark = pytest.mark.drills

# Runs die at each effect on SQLite; where a claim changes hands, also on Postgres.
CHANGES_OF_THE_CLAIM = ("claim", "final status")
# Runs freeze where the catalogue changes on Postgres, and elsewhere on SQLite.
CHANGES_OF_THE_CATALOGUE = ("store the answer", "variant rows", "result", "final status")
# Never contacted, because these runs have no task.
TASKS = TaskQueue("redis://unused", "test")
LEGAL = {  # the events that may follow an event in an image's history
    None: {"accepted"},
    "accepted": {"claimed"},
    "claimed": {"made", "reused", "recovered", "handed_back", "failed", "completed"},
    "made": {"made", "reused", "recovered", "completed"},
    "reused": {"made", "reused", "recovered", "completed"},
    "recovered": {"handed_back"},
    "handed_back": {"claimed"},
    "completed": set(),
}


@pytest.fixture(params=["sqlite", "postgres"])
def database_urls(request):
    """The URLs of the catalogue and of Dagster, once on SQLite and once on Postgres.

    Dagster's is None on SQLite, where it uses files in its home.
    """
    is_postgres = request.param == "postgres"
    dagster_url = request.getfixturevalue("dagster_postgres_url") if is_postgres else None
    return request.getfixturevalue(f"{request.param}_catalogue_url"), dagster_url


@pytest.fixture
def world(tmp_path, database_urls):
    """The stores of one pending image, `cat`, and a Dagster instance."""
    return World(tmp_path, *database_urls)


class World:
    def __init__(self, folder: Path, catalogue_url: str, dagster_url: str | None) -> None:
        self.folder = folder
        self.catalogue_url = catalogue_url
        self.catalogue = Catalogue(catalogue_url)
        self.files = FileStore(folder / "storage")
        self.files.put_original("cat", (PHOTOS / "cat.jpg").read_bytes(), "jpg")
        self.catalogue.accept([Upload("cat")])
        storage = {
            "module": "imagepipeline.instance.postgres_storage",
            "class": "PooledPostgresStorage",
            "config": {"postgres_url": dagster_url},
        }
        if dagster_url is None:
            storage = {
                "module": "imagepipeline.instance.sqlite_storage",
                "class": "PooledSqliteStorage",
                "config": {"base_dir": str(folder / "storage-of-dagster")},
            }
        config = {"telemetry": {"enabled": False}, "storage": {"custom": storage}}
        (folder / "dagster.yaml").write_text(yaml.safe_dump(config))

    def start_run(
        self,
        *fault: str,
        redis_url: str | None = None,
        specs: Sequence[VariantSpec] = build_variant_specs(),
    ) -> Any:
        """Starts a process that executes a run of the image's current generation."""
        generation = self.catalogue.get("cat")["generation"]
        arguments = (self.folder, self.catalogue_url, generation, fault, redis_url, specs)
        process = CONTEXT.Process(target=execute, args=arguments)
        process.start()
        return process

    def finish(self, process: Any) -> int:
        """Waits until a run's process has ended; returns its exit code."""
        process.join()
        return process.exitcode

    def hand_over(self) -> list[str]:
        """Runs the reconciler after the run has had no heartbeat for long enough."""
        now = [0.0]
        watch = StandstillWatch(lambda: now[0])
        with dg.DagsterInstance.from_config(str(self.folder)) as instance:
            reconcile(self.catalogue, instance, TASKS, watch)
            now[0] += STALL_SECONDS
            return reconcile(self.catalogue, instance, TASKS, watch)

    def check(self) -> None:
        """Checks the invariants of a completed image and of its history."""
        row = self.catalogue.get("cat")
        assert row["status"] == "completed"
        assert len(row["variants"]) == 6
        for variant in row["variants"]:
            content = self.files.read(variant["path"])
            image = Image.open(io.BytesIO(content))
            image.load()
            assert (len(content), *image.size) == (
                variant["size"],
                variant["width"],
                variant["height"],
            )
        leftovers = list((self.files.root / "variants").rglob("*.tmp"))
        assert len(leftovers) <= 1  # left by the killed process, and never read
        index = EmbeddingIndex(str(self.folder / "lancedb"))
        embedded = index.nearest(LocalEmbedder().embed("cat"), 9)
        assert [neighbour.image_id for neighbour in embedded] == ["cat"]
        stored = index.get("cat", LocalEmbedder.recipe.version)
        assert stored["text"] == ImageMetadata.model_validate(row["metadata"]).embedding_text
        assert stored["fence"] <= row["fence"]  # a vector that is current is not stored again
        previous = None
        for event, following in zip(row["history"], row["history"][1:], strict=False):
            assert following["generation"] >= event["generation"]
            assert following["fence"] >= event["fence"]
        for event in row["history"]:
            assert event["event"] in LEGAL[previous], [e["event"] for e in row["history"]]
            previous = event["event"]
        assert [e["event"] for e in row["history"]].count("completed") == 1


def on_databases(sqlite, postgres):
    """Parametrizes a test with a database and one of the effects that are tried on it."""
    cases = [("sqlite", effect) for effect in sqlite]
    cases += [("postgres", effect) for effect in postgres]
    return pytest.mark.parametrize(
        ("database_urls", "effect"), cases, indirect=["database_urls"], ids=map("-".join, cases)
    )


# Before any other effect, the world is as after the one before it.
KILLED_BEFORE = ("claim", "embed", "final status")


@on_databases(EFFECTS, CHANGES_OF_THE_CLAIM)
def test_the_image_of_a_run_killed_after_an_effect_is_completed_once_by_another(world, effect):
    check_killed(world, effect, "after")


@pytest.mark.parametrize("effect", KILLED_BEFORE)
@pytest.mark.parametrize("database_urls", ["sqlite"], indirect=True)
def test_the_image_of_a_run_killed_before_an_effect_is_completed_once_by_another(world, effect):
    check_killed(world, effect, "before")


def check_killed(world, effect, moment):
    process = world.start_run(effect, moment, "SIGKILL")
    assert world.finish(process) == -signal.SIGKILL
    world.hand_over()
    if world.catalogue.get("cat")["status"] != "completed":
        assert world.finish(world.start_run()) == 0
    world.check()


@pytest.mark.parametrize(
    ("database_urls", "effect", "moment"),
    [
        ("sqlite", "rename", "after"),
        ("postgres", "result", "after"),
        ("sqlite", "removed file", "after"),
    ],
    indirect=["database_urls"],
)
def test_a_run_killed_while_the_set_of_variants_changes_leaves_no_stray_and_no_gap(
    world, effect, moment
):
    def list_states():
        folder = world.files.root / "variants"
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    assert world.finish(world.start_run()) == 0
    before = list_states()
    world.catalogue.accept([Upload("cat")])
    specs = [VariantSpec("xs", 320, "webp", 80), *build_variant_specs()[::2]]
    run = world.start_run(effect, moment, "SIGKILL", specs=specs)
    assert world.finish(run) == -signal.SIGKILL
    with sa.create_engine(world.catalogue_url).connect() as connection:
        shown = connection.exec_driver_sql("SELECT path FROM published_variants_v1").scalars()
        published = {Path(path).name for path in shown}
    assert published <= list_states().keys()
    world.hand_over()
    assert world.finish(world.start_run(specs=specs)) == 0
    row = world.catalogue.get("cat")
    assert row["status"] == "completed"
    after = {name: at for name, at in list_states().items() if not name.endswith(".tmp")}
    assert {Path(one["path"]).name for one in row["variants"]} == after.keys()
    assert {name for name in after if after[name] != before.get(name)} == {"cat-xs.webp"}


@pytest.mark.parametrize("effect", ["store the answer", "variant rows", "index commit"])
def test_a_call_whose_run_is_killed_is_not_paid_for_again(world, redis_url, effect):
    process = world.start_run(effect, "before", "SIGKILL", redis_url=redis_url)
    assert world.finish(process) == -signal.SIGKILL
    world.hand_over()
    assert world.finish(world.start_run(redis_url=redis_url)) == 0
    assert world.catalogue.get("cat")["status"] == "completed"
    ledger = Ledger(world.catalogue_url)
    calls = {row["stage"]: row["calls"] for row in ledger.summarize("stage")}
    assert calls == {"metadata": 1, "embedding": 1}
    assert count_answers(world.catalogue_url) == 0


@on_databases(("rename", "index commit", "final status"), CHANGES_OF_THE_CATALOGUE)
def test_a_frozen_run_that_continues_after_its_replacement_changes_nothing(world, effect):
    zombie = world.start_run(effect, "before", "SIGSTOP")
    while not is_stopped(zombie.pid):
        assert zombie.is_alive()
        time.sleep(0.02)
    assert world.hand_over()
    assert world.finish(world.start_run()) == 0
    world.check()
    before = world.catalogue.get("cat")
    files = {path: path.stat().st_size for path in (world.files.root / "variants").iterdir()}
    os.kill(zombie.pid, signal.SIGCONT)
    assert world.finish(zombie) == 0  # it ends quietly
    assert world.catalogue.get("cat") == before
    assert {
        path: path.stat().st_size for path in (world.files.root / "variants").iterdir()
    } == files
    world.check()

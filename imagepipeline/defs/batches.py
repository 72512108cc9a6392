"""The bulk lane: one run makes what many images need, several at a time."""

import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from pydantic import Field

from imagepipeline.dagster_records import DagsterRecords
from imagepipeline.defs.assets import OWNERS
from imagepipeline.defs.attempts import (
    MACHINE_TAG,
    Work,
    interrupt_work,
    settle,
    start_heartbeat,
    stop_heartbeat,
)
from imagepipeline.defs.outcomes import build_outcome, report_outcome
from imagepipeline.defs.restoring import CODE_VERSION_TAG, DATA_VERSION_TAG, relate, restore
from imagepipeline.defs.showing import link_to
from imagepipeline.defs.stages import Made, make_embedding, make_metadata, make_variants
from imagepipeline.errors import PostponedError
from imagepipeline.filters import Filter
from imagepipeline.imaging.variants import Renderer
from imagepipeline.index import EmbeddingStore
from imagepipeline.models import ASSETS, BULK_PRIORITY, MAX_COUNT, Claim, Recipe
from imagepipeline.originals import Originals
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.planning import Applier
from imagepipeline.prices import MAX_USD
from imagepipeline.services.embedder import Embedder
from imagepipeline.services.vision import VisionModel
from imagepipeline.storage import Storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.tenants import Tenants

LANE_TAG = "imagepipeline/lane"  # dagster.yaml limits the runs of `bulk`
WORK_TAG = "imagepipeline/work"  # `planned`, `pictures` of planned images, `backlog` of uploads
MAX_BATCH_RUNS = 2
IMAGES_AT_ONCE = 4  # in one run: while some wait for a provider, others use the CPU
MAX_SECONDS = 60  # then a run takes no more images: a worker that drains waits no longer
LINGER_SECONDS = 2  # without images: the next tick of the sensor may bring some
# What materializations show, so that they take few bytes of Dagster's tables: of an asset how it
# was made, and of the image (`original`) what was made and where to find the rest.
SHOWN = ("cost_usd", "cause", "bytes_out", "problems", "cpu_seconds")
SHOWN_OF_IMAGE = ("status", "reason", "error", "waits_because", "flaw", "picture")
SHOWN_OF_MADE = {
    "metadata": ("description", "tags", "category", "languages"),
    "variants": ("variants", "bytes_in"),
    "embedding": (),
}


@dataclass(frozen=True)
class Stages:
    """What is done for an image, by asset, and by which recipe."""

    makers: Mapping[str, Callable[[Work], Made]]
    recipes: Mapping[str, Recipe]


@dataclass
class Batch:
    """The images of one run. Its threads claim and process them; the run reports the events.

    Args:
        catalogue: where images are claimed.
        stages: what is done for each.
        originals: holds what was read of an image until it has ended.
        ledger: knows whether a person has paused all work; then the run takes no more images.
        run_id: the run that holds the claims.
        max_images: how many images it takes.
        uploads_left: how many uploads it leaves to runs of their own; None if it takes no uploads,
            but planned images.
        find_limit: how many images of a tenant may be in runs at once.
        has_pictures_only: whether it makes variants alone, of images that lack them.
    """

    catalogue: Catalogue
    stages: Stages
    originals: Originals
    ledger: Ledger
    run_id: str
    max_images: int
    uploads_left: int | None = None
    find_limit: Callable[[str], float] = lambda tenant: math.inf
    has_pictures_only: bool = False
    claims: dict[tuple[str, int], Claim] = field(default_factory=dict)  # that this run holds
    _events: "queue.SimpleQueue[Event | None]" = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _taken: int = 0
    _deadline: float = 0

    def run(self) -> Iterator["Event"]:
        """Processes images until enough are taken, time is over, or none waits; yields events.

        It takes no more, too, once paid work must wait.
        """
        self._deadline = time.monotonic() + MAX_SECONDS
        threads = [
            threading.Thread(target=self._work, name=f"image {number}", daemon=True)
            for number in range(IMAGES_AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            event = self._events.get()
            if event is None:
                left -= 1
                continue
            yield event
            event.is_recorded.set()

    def stop(self) -> None:
        """Lets threads take no more images and begin no more work."""
        self._stopping.set()

    @property
    def _assets(self) -> Sequence[str]:
        return ("variants",) if self.has_pictures_only else ASSETS

    def _work(self) -> None:
        try:
            while (claim := self._take()) is not None:
                self._process(claim)
        except PostponedError as error:  # the catalogue does not answer; the reconciler recovers
            self._events.put(Event(f"The run ends early: {error}"))
        except Exception as error:
            self._events.put(Event(f"The run ends early: {type(error).__name__}: {error}"))
        finally:
            self._events.put(None)

    def _take(self) -> Claim | None:
        """Claims the next image; waits a little for one."""
        give_up = time.monotonic() + LINGER_SECONDS
        while not self._stopping.is_set() and time.monotonic() < self._deadline:
            with self._lock:
                if self._taken >= self.max_images or self.ledger.find_full_pause():
                    return None
                lacking = self.stages.recipes["variants"] if self.has_pictures_only else None
                claim = self.catalogue.claim_next(
                    self.run_id, self.uploads_left, self.find_limit, lacking
                )
                if claim is not None:
                    self._taken += 1
                    self.claims[claim.key] = claim
                    return claim
            if time.monotonic() > give_up:
                return None
            self._stopping.wait(0.2)
        return None

    def _process(self, claim: Claim) -> None:
        start_heartbeat(self.catalogue, claim)
        try:
            # Before anything is made, so that only earlier results can count as restored.
            self._await(begun := Event(image_id=claim.image_id, is_begun=True))
            changed, made = [], None
            for asset in self._assets:
                made = self._make(claim, asset)
                if made is None or not made.is_current:
                    changed.append(asset)
                if made is None:
                    break
            if made is not None:
                self._events.put(Event(image_id=claim.image_id))
            shown = ASSETS if begun.is_new_to_dagster else changed
            if shown:
                self._show_outcome(claim, shown, is_made=made is not None)
        finally:
            self.originals.release(claim)
            stop_heartbeat(claim)
            self.claims.pop(claim.key, None)

    def _make(self, claim: Claim, asset: str) -> Made | None:
        """Makes one asset of an image, in up to three attempts; returns None if it failed."""
        number = 0
        while not self._stopping.is_set():
            number += 1
            try:
                self.catalogue.record_attempt(claim, number)
                made = self.stages.makers[asset](Work(claim, number, frozenset(), self._report))
                if not made.is_current:
                    self._record(claim, asset, made)
                if asset == self._assets[-1] and not self._stopping.is_set():
                    self.catalogue.finish(claim)
                return made
            except Exception as error:
                verdict = settle(self.catalogue, claim, asset, number, error)
                self._report(verdict.text)
                if isinstance(error, PostponedError) and not error.wait_seconds:
                    self._deadline = 0  # or it would take the same image at once, again and again
                if verdict.wait_seconds is None:
                    return None
                self._stopping.wait(verdict.wait_seconds)
        return None

    def _record(self, claim: Claim, asset: str, made: Made) -> None:
        """Has Dagster record a materialization, before the image can be `completed`."""
        tags = {
            DATA_VERSION_TAG: made.data_version,
            CODE_VERSION_TAG: self.stages.recipes[asset].version,
        }
        shown = {key: value for key, value in made.metadata.items() if key in SHOWN}
        shown["see_original"] = link_to("original", claim.image_id)
        self._put(
            dg.AssetMaterialization(asset, partition=claim.image_id, metadata=shown, tags=tags)
        )

    def _show_outcome(self, claim: Claim, changed: Sequence[str], is_made: bool) -> None:
        """Has Dagster record what became of an image; of one that is made in part, that part."""
        with suppress(PostponedError):  # the row has it
            if not self.catalogue.get_states([claim.image_id]):  # it was erased meanwhile
                return
            if len(changed) == len(ASSETS) or not is_made:
                thumbnail = self.originals.find_thumbnail(claim)
                self._put(build_outcome(self.catalogue, claim.image_id, thumbnail))
                return
            outcome = build_outcome(self.catalogue, claim.image_id)
            names = {*SHOWN_OF_IMAGE, *(f"see_{asset}" for asset in ASSETS if asset not in changed)}
            names.update(*(SHOWN_OF_MADE[asset] for asset in changed))
            shown = {name: value for name, value in outcome.metadata.items() if name in names}
            self._put(outcome._replace(metadata=shown))

    def _put(self, materialization: dg.AssetMaterialization) -> None:
        self._await(Event(image_id=materialization.partition, materialization=materialization))

    def _await(self, event: "Event") -> None:
        self._events.put(event)
        while not (event.is_recorded.wait(1) or self._stopping.is_set()):
            pass

    def _report(self, line: str) -> None:
        self._events.put(Event(line))


@dataclass
class Event:
    """What a thread asks the run to record.

    A line for its log, that work on an image begins or has ended, or a materialization of it.
    """

    line: str | None = None
    image_id: str | None = None
    is_begun: bool = False
    is_new_to_dagster: bool = False  # the run's answer: it had no partition when work began
    materialization: dg.AssetMaterialization | None = None
    is_recorded: threading.Event = field(default_factory=threading.Event)


class BatchConfig(dg.Config):
    """Which images a run of the bulk lane takes."""

    uploads_left: int | None = Field(
        None,
        ge=0,
        description="Take uploads of a backlog, and leave so many, the first in line, to runs of "
        "their own; without it, take planned images.",
    )
    pictures_only: bool = Field(
        False, description="Make variants alone, of images that lack them: they need no paid call."
    )
    max_images: int | None = Field(
        None, ge=1, description="Take so many images, instead of IMAGEPIPELINE_BATCH_SIZE."
    )


@dg.op(tags={"owner": OWNERS[0].replace(":", "/")})
def process_images(
    context: dg.OpExecutionContext,
    config: BatchConfig,
    catalogue: dg.ResourceParam[Catalogue],
    files: dg.ResourceParam[Storage],
    background_originals: dg.ResourceParam[Originals],
    vision: dg.ResourceParam[VisionModel],
    renderer: dg.ResourceParam[Renderer],
    embedder: dg.ResourceParam[Embedder],
    index: dg.ResourceParam[EmbeddingStore],
    paid_calls: dg.ResourceParam[PaidCalls],
    ledger: dg.ResourceParam[Ledger],
    batch_size: dg.ResourceParam[int],
    tenants: dg.ResourceParam[Tenants],
) -> None:
    """Makes what images of the bulk lane need, several at a time.

    Each image is claimed, tried and ended by itself, as in a run of its own. The run takes images
    until there are none, it has had enough, or a minute is over. Materializations appear on the
    images' partitions; images that fail are in this run's log and in `imagepipeline failed list`.
    """
    originals = background_originals  # also for uploads: those in runs of their own go before
    makers = {
        "metadata": partial(
            make_metadata,
            catalogue=catalogue,
            files=files,
            originals=originals,
            vision=vision,
            paid_calls=paid_calls,
            renderer=renderer,
        ),
        "variants": partial(
            make_variants, catalogue=catalogue, files=files, originals=originals, renderer=renderer
        ),
        "embedding": partial(
            make_embedding,
            catalogue=catalogue,
            embedder=embedder,
            index=index,
            paid_calls=paid_calls,
        ),
    }
    recipes = {
        "metadata": vision.recipe,
        "variants": renderer.recipe,
        "embedding": embedder.recipe,
    }
    stages = Stages(makers, recipes)
    batch = Batch(
        catalogue,
        stages,
        originals,
        ledger,
        context.run_id,
        config.max_images or batch_size,
        config.uploads_left,
        tenants.find_max_runs if config.pictures_only else tenants.find_max_paid_runs,
        config.pictures_only,
    )
    context.instance.add_run_tags(context.run_id, {MACHINE_TAG: socket.gethostname()})
    records = DagsterRecords(context.instance)
    finished = 0
    try:
        for event in batch.run():
            if event.line:
                context.log.warning(event.line)
            if event.is_begun:
                event.is_new_to_dagster = not records.has_partition(str(event.image_id))
                if event.is_new_to_dagster:
                    restore(context.instance, catalogue, str(event.image_id))
            elif event.materialization:
                # Not as an output of the step, whose handles take half a kilobyte in each event.
                materialization = relate(context.instance, event.materialization)
                report_outcome(context.instance, context.run, materialization)
            elif event.image_id:
                finished += 1
    except DagsterExecutionInterruptedError:
        batch.stop()
        for claim in list(batch.claims.values()):
            context.log.warning(interrupt_work(context, catalogue, claim).text)
        raise
    finally:
        batch.stop()  # after another error, the reconciler recovers its images
    context.log.info(f"{finished} images are made.")


@dg.job(
    tags={LANE_TAG: "bulk", "dagster/priority": str(BULK_PRIORITY)},
    description="Makes what many images need, such as after a change of model. The sensor starts "
    "it for `imagepipeline apply`, `import`, and a backlog of uploads; at most two run at a time.",
    executor_def=dg.in_process_executor,
)
def process_batch() -> None:
    """See the description."""
    process_images()


class AssetName(Enum):
    """An asset, so that the launchpad offers them."""

    metadata = "metadata"
    variants = "variants"
    embedding = "embedding"


class ApplyConfig(dg.Config):
    """What a person asks to be made of the plan."""

    limit: int | None = Field(None, ge=1, le=MAX_COUNT, description="Stop after this many images.")
    budget_usd: float | None = Field(
        None,
        gt=0,
        le=MAX_USD,
        allow_inf_nan=False,
        description="Begin no more images after this many US dollars.",
    )
    assets: list[AssetName] = Field(
        [],
        description="Only images that need one of these; none means all. Those that begin get "
        "everything they need.",
    )
    where: list[str] = Field([], description="Only these images, such as `category=animal`.")


@dg.op
def start_apply(
    context: dg.OpExecutionContext, config: ApplyConfig, applier: dg.ResourceParam[Applier]
) -> None:
    """Lets runs of the bulk lane make what is outdated, and returns at once."""
    assets = [asset.value for asset in config.assets]
    where = Filter.parse(config.where)
    apply, count = applier.start(assets, config.limit, config.budget_usd, where)
    context.log.info(
        f"Apply {apply.id} has begun: {count} images are outdated. Runs of process_batch make "
        "them; `imagepipeline apply --stop` stops them."
    )


@dg.job(
    description="Makes everything that today's settings would make differently, like `imagepipeline"
    " apply`. `imagepipeline plan` says what that is and what it costs.",
    executor_def=dg.in_process_executor,
)
def apply_plan() -> None:
    """See the description."""
    start_apply()

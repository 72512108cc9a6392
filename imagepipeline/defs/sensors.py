"""The upload sensor: records uploads from the Redis list, then starts runs for pending images."""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import dagster as dg

from imagepipeline.dagster_records import UNFINISHED
from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.batches import (
    IMAGES_AT_ONCE,
    MAX_BATCH_RUNS,
    WORK_TAG,
    process_batch,
)
from imagepipeline.defs.jobs import process_upload
from imagepipeline.defs.partitions import uploads
from imagepipeline.defs.restoring import restore
from imagepipeline.defs.sharing import TENANT_TAG, VARIANTS, InFlight, choose
from imagepipeline.errors import InvalidUploadError, PostponedError, StackError
from imagepipeline.models import Pause, Recipe, Upload, check_image_id, is_image_id
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.planning import Applier
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.reader import Pending
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.tenants import Tenants

ENTRIES_AT_ONCE = 500  # in one transaction, of about a quarter of a second
INTAKE_SECONDS = 2  # after which a tick starts runs, whatever is left on the list
# The backlog waits in the catalogue, where priorities can change; Dagster's queue holds enough runs
# to keep its slots busy.
RUNS_PER_SLOT, DEFAULT_SLOTS = 3, 5
BATCH_PRIORITY = 1_000_000  # above all that `InFlight.rank` gives
BACKLOG_IMAGES = 50  # waiting uploads from which on runs of the bulk lane share the work
MAX_WAIT_SECONDS = 4  # for an entry; under the 5 s after which a silent Redis counts as down
# Dagster abandons a tick after a minute and starts another while ours may still run: both would
# remove from the list what one has read. A catalogue has one code server (`Catalogue.bind`), so a
# lock is enough.
_taking_in = threading.Lock()


@dg.sensor(
    jobs=[process_upload, process_batch],
    minimum_interval_seconds=1,  # 0 would silently mean 30
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def upload_sensor(
    context: dg.SensorEvaluationContext,
    queue: dg.ResourceParam[UploadQueue],
    catalogue: dg.ResourceParam[Catalogue],
    ledger: dg.ResourceParam[Ledger],
    paid_calls: dg.ResourceParam[PaidCalls],
    applier: dg.ResourceParam[Applier],
    tenants: dg.ResourceParam[Tenants],
) -> dg.SensorResult | dg.SkipReason:
    """Moves uploads from the Redis list into the catalogue and starts runs of pending images.

    The list is `image-processing:wait`; malformed entries go to `image-processing:dead`. If Redis
    is down, images in the catalogue still get their runs. While paid calls are paused or behind
    their rate limit, runs make variants alone, and images stay `pending` for the rest; after a
    pause one is tried first. While a person has paused all work, no run is started.
    """
    problem = None
    try:
        # Without work, a tick waits for it: the daemon would start the next one too late.
        is_busy = applier.is_busy or catalogue.count_bulk()["pending"]
        if not (is_busy or catalogue.list_pending(1)):
            queue.wait(MAX_WAIT_SECONDS)
        if _taking_in.acquire(blocking=False):
            try:
                deadline = time.monotonic() + INTAKE_SECONDS
                while lines := take_in(queue, catalogue):
                    context.log.info("\n".join(lines))
                    if time.monotonic() > deadline:
                        break
            finally:
                _taking_in.release()
        queue.show_active({row.image_id: row.run_id for row in catalogue.list_processing()})
    except StackError as error:
        problem = str(error)
        context.log.error(problem)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    try:
        if full := ledger.find_full_pause():
            return dg.SkipReason(f"A person has paused all work: {full.message}.")
    except PostponedError as error:
        return dg.SkipReason(str(error))
    in_flight = find_unfinished(context.instance)
    slots = find_slots(context.instance)
    limit = RUNS_PER_SLOT * slots
    try:
        pauses = paid_calls.update_pauses()
        affordable, problem_of_rates = paid_calls.count_affordable()
        for line in reopen_failures(catalogue, ledger, pauses):
            context.log.warning(line)
        if ended := applier.feed():
            context.log.info(ended)
        held = Counter(
            row.tenant
            for row in catalogue.list_processing()
            if (row.image_id, row.generation) not in in_flight.images
        )
        held.update({tenant: len(all_of) for tenant, all_of in in_flight.priorities.items()})
        pending = choose(
            catalogue,
            limit,
            held,
            tenants.find_max_paid_runs,
            in_flight.images,
            is_rotating=bool(pauses),
        )
    except PostponedError as error:
        return dg.SkipReason(str(error))
    for line in end_invalid(catalogue, pending):
        context.log.error(line)
    pending = [image for image in pending if is_image_id(image.image_id)]
    most = limit if affordable is None else min(limit, affordable)
    chosen = pending[: count_room(pauses, most, in_flight.full_count)]
    pictures = []
    if pauses or affordable is not None or tenants.has_budgets:
        taken = in_flight.images | {(image.image_id, image.generation) for image in chosen}
        held.update(image.tenant for image in chosen)
        room = max(0, limit - len(taken))
        pictures = list_pictures(catalogue, room, held, tenants, taken)
    try:
        is_scarce = affordable is not None and affordable < MAX_BATCH_RUNS * IMAGES_AT_ONCE
        batches = request_batches(
            catalogue,
            context.instance,
            tenants,
            applier.recipes["variants"] if pauses or is_scarce or tenants.find_spent() else None,
            pauses,
            is_upload_tried=bool(chosen or in_flight.full_count),
            is_rate_used_up=bool(problem_of_rates),
        )
        if not pauses and affordable is None:
            batches += request_backlog_batches(catalogue, context.instance, slots, tenants)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    if not chosen and not pictures and not batches:
        paused = (
            f"Paused ({pauses[0].reason}): {pauses[0].message}." if pauses and pending else None
        )
        if pending and problem_of_rates and not paused:
            paused = f"Paused: {problem_of_rates}."
        waiting = pending or catalogue.list_pending(1, in_flight.images)
        idle = explain_idleness(bool(waiting), len(in_flight.images))
        return dg.SkipReason(paused or problem or idle)
    following = [*chosen, *pictures]
    assets = [None] * len(chosen) + [VARIANTS] * len(pictures)
    requests = map(build_run_request, following, in_flight.rank(following, limit), assets)
    image_ids = [image.image_id for image in following]
    for image_id in catalogue.find_gone(image_ids):
        restore(context.instance, catalogue, image_id)
    return dg.SensorResult(
        run_requests=[*requests, *batches],
        dynamic_partitions_requests=[uploads.build_add_request(image_ids)],
    )


def list_pictures(
    catalogue: Catalogue,
    room: int,
    held: Mapping[str, int],
    tenants: Tenants,
    except_for: Set[tuple[str, int]],
) -> list[Pending]:
    """Images whose variants can be made now, while their paid calls must wait."""
    pending = choose(
        catalogue,
        room,
        held,
        tenants.find_max_runs,
        except_for,
        has_no_variants=True,
    )
    return [image for image in pending if is_image_id(image.image_id)]


def find_slots(instance: dg.DagsterInstance) -> int:
    """How many runs may run at once."""
    queue = instance.get_concurrency_config().run_queue_config
    return queue.max_concurrent_runs if queue else DEFAULT_SLOTS


def count_room(pauses: Sequence[Pause], limit: int, full_count: int) -> int:
    """How many runs of all assets may start beside those that have not ended.

    None in a pause, and one at a time while it is on probation.
    """
    if any(not pause.is_over for pause in pauses):
        return 0
    return max(0, (1 if pauses else limit) - full_count)


def reopen_failures(catalogue: Catalogue, ledger: Ledger, pauses: Sequence[Pause]) -> list[str]:
    """Reopens images that failed because a provider was down, before that was known."""
    lines = []
    for pause in pauses:
        if pause.reason == "provider_down":
            count = catalogue.reopen("provider_unavailable", ledger.find_streak_start(pause.stage))
            lines += (
                [f"{count} images that had failed as provider_unavailable are pending again."]
                if count
                else []
            )
    return lines


def end_invalid(catalogue: Catalogue, pending: Sequence[Pending]) -> list[str]:
    """Fails images with invalid IDs, which old versions accepted from partitions made by hand."""
    lines = []
    for image in pending:
        try:
            check_image_id(image.image_id)
        except InvalidUploadError as error:
            if catalogue.fail_pending(image, "invalid_id", str(error)):
                lines.append(f"An image has failed: {error}.")
    return lines


def take_in(queue: UploadQueue, catalogue: Catalogue) -> list[str]:
    """Records the oldest entries of the Redis list and removes them; returns a log line for each.

    It may be interrupted anywhere, and run twice at once: an entry is removed only after the
    catalogue has committed, and recording an upload twice changes nothing.
    """
    lines = []
    uploads: dict[bytes, Upload] = {}
    unreadable: dict[bytes, str] = {}
    entries = queue.read(ENTRIES_AT_ONCE)
    if not entries:
        return []
    for entry in entries:
        try:
            uploads[entry] = Upload.from_entry(entry)
        except InvalidUploadError as error:
            unreadable[entry] = str(error)
    for entry, owner in catalogue.find_owners(uploads).items():
        upload = uploads.pop(entry)
        unreadable[entry] = (
            f"{upload.path!r:.100} is the original of {owner}, not of {upload.image_id}"
        )
    begun = catalogue.accept(uploads.values())
    queue.acknowledge({entry: entries[entry] for entry in uploads})
    for upload in uploads.values():
        if upload.image_id in begun:
            lines.append(f"{upload.image_id} was accepted.")
        else:
            lines.append(
                f"{upload.image_id} was pushed again before it ended; its next run covers that."
            )
        if upload.ignored:
            lines.append(
                f"{upload.image_id}: unknown fields were ignored: "
                f"{', '.join(upload.ignored)!r:.200}"
            )
    for entry, reason in unreadable.items():  # last: a full Redis has room for them only now
        queue.dead_letter(entry, entries[entry], reason)
        lines.append(f"An entry went to the dead list: {reason}")
    return lines


def find_unfinished(instance: dg.DagsterInstance) -> InFlight:
    """The runs of single uploads that have not ended."""
    return InFlight.read(list_unfinished(instance, process_upload.name))


def list_unfinished(instance: dg.DagsterInstance, job_name: str) -> list[dg.DagsterRun]:
    """A job's runs that have not ended.

    Filtered here, because with both conditions SQLite would read every run of the job.
    """
    records = instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED))
    return [record.dagster_run for record in records if record.dagster_run.job_name == job_name]


def build_run_request(
    image: Pending, priority: int, assets: Sequence[dg.AssetKey] | None = None
) -> dg.RunRequest:
    """The request for an image's run, of all assets or of some.

    A repeated request has no effect, because a run key is used once.
    """
    return dg.RunRequest(
        job_name=process_upload.name,
        run_key=f"{image.image_id}:{image.generation}",
        partition_key=image.image_id,
        asset_selection=assets,
        tags={
            GENERATION_TAG: str(image.generation),
            "dagster/priority": str(priority),
            **({TENANT_TAG: image.tenant} if image.tenant else {}),
        },
    )


def request_batches(
    catalogue: Catalogue,
    instance: dg.DagsterInstance,
    tenants: Tenants,
    lacking: Recipe | None,
    pauses: Sequence[Pause],
    is_upload_tried: bool,
    is_rate_used_up: bool,
) -> list[dg.RunRequest]:
    """Runs of the bulk lane for planned images: one for each `IMAGES_AT_ONCE` that wait.

    While paid calls must wait, one of them makes variants alone, of images without variants by the
    recipe `lacking`; the other starts only if the rate limit permits its calls in time. When pauses
    are over, one image is tried, unless it is an upload.
    """
    waiting = catalogue.count_bulk()["pending"]
    if not waiting:
        return []
    unfinished = count_batches(instance)
    most = min(MAX_BATCH_RUNS, -(-waiting // IMAGES_AT_ONCE))
    room = most - unfinished["planned"] - unfinished["pictures"]
    requests = []
    if (
        lacking is not None
        and room > 0
        and not unfinished["pictures"]
        and catalogue.has_next(None, tenants.find_max_runs, lacking)
    ):
        requests.append(_request_batch("pictures", pictures_only=True))
    room -= len(requests)
    if pauses:
        is_probation = all(pause.is_over for pause in pauses)
        is_busy = is_upload_tried or unfinished["planned"]
        room = int(is_probation and not is_busy)
    if room > 0 and not is_rate_used_up and catalogue.has_next(None, tenants.find_max_paid_runs):
        config = {"max_images": 1} if pauses else {}
        requests += [_request_batch("planned", **config)] * room
    return requests


def _request_batch(work: str, priority: int | None = None, **config: Any) -> dg.RunRequest:
    return dg.RunRequest(
        job_name=process_batch.name,
        run_config={"ops": {"process_images": {"config": config}}} if config else None,
        tags={WORK_TAG: work, **({} if priority is None else {"dagster/priority": str(priority)})},
    )


def request_backlog_batches(
    catalogue: Catalogue, instance: dg.DagsterInstance, slots: int, tenants: Tenants
) -> list[dg.RunRequest]:
    """Runs of the bulk lane for a backlog of uploads, in at most half of the slots.

    They go before the runs of single uploads, which would otherwise keep them waiting.
    """
    uploads_left = RUNS_PER_SLOT * slots
    if catalogue.count_uploads(BACKLOG_IMAGES + 1) <= BACKLOG_IMAGES or not catalogue.has_next(
        uploads_left, tenants.find_max_paid_runs
    ):
        return []
    count = min(MAX_BATCH_RUNS, slots // 2) - count_batches(instance)["backlog"]
    return [_request_batch("backlog", BATCH_PRIORITY, uploads_left=uploads_left)] * count


def count_batches(instance: dg.DagsterInstance) -> Counter[str | None]:
    """How many runs of the bulk lane have not ended, by their work."""
    runs = list_unfinished(instance, process_batch.name)
    return Counter(run.tags.get(WORK_TAG) for run in runs)


def explain_idleness(is_waiting: bool, unfinished_count: int) -> str:
    """Why a tick starts no run, as a sentence."""
    if is_waiting:
        count = f"{unfinished_count} runs are queued or running"
        return f"{count}, so there is no room for more, or not for that tenant; the rest waits."
    return "No upload waits."

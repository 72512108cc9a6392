"""What must hold after the soak, over the whole history: each function returns what does not."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from PIL import Image

from imagepipeline.defs.attempts import MAX_ATTEMPTS
from imagepipeline.models import ImageMetadata, Recipe, Status
from imagepipeline.storage import Storage
from imagepipeline.stores.tables import (
    call_sums,
    events,
    image_history,
    image_results,
    image_variants,
    images,
    provider_calls,
)
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.end_to_end.soak_faults import Hit
from imagepipeline_tests.end_to_end.soak_pictures import read_number
from imagepipeline_tests.end_to_end.soak_provider import Call, find_number
from imagepipeline_tests.end_to_end.soak_uploads import Expected

ENDS = ("completed", "failed", "handed_back")
ONCE = ("accepted", "completed", "failed")  # in each generation
OF_THE_PROVIDER = ("bad_output", "provider_unavailable", "timed_out")
# Keys in Redis that may stay: events, the workers' bindings, results of failed tasks for an hour.
KEYS_THAT_STAY = ("events", "runs:_kombu.binding", "runs:celery-task-meta-", "dead")


@dataclass(frozen=True)
class Evidence:
    """Everything that is known when all is calm."""

    expected: Mapping[str, Expected]
    unreadable: int
    calls: Sequence[Call]
    hits: Sequence[Hit]
    rows: Mapping[str, Mapping[str, Any]]
    history: Mapping[str, list[Mapping[str, Any]]]
    events: Sequence[Mapping[str, Any]]
    ledger: Sequence[Mapping[str, Any]]
    variants: Mapping[str, list[Mapping[str, Any]]]
    results: Mapping[tuple[str, str], Mapping[str, Any]]
    sums: Mapping[str, int]


def gather(
    url: str,
    expected: Mapping[str, Expected],
    unreadable: int,
    calls: Sequence[Call],
    hits: Sequence[Hit],
) -> Evidence:
    """Reads the catalogue at that URL."""
    engine = sa.create_engine(url)

    def read(table: sa.Table, *order: sa.Column[Any]) -> list[Mapping[str, Any]]:
        with engine.connect() as connection:
            return [*connection.execute(sa.select(table).order_by(*order)).mappings()]

    history, variants = defaultdict(list), defaultdict(list)
    for row in read(image_history, image_history.c.seq):
        history[row["image_id"]].append(row)
    for row in read(image_variants, image_variants.c.id):
        variants[row["image_id"]].append(row)
    sums: Counter[str] = Counter()
    for row in read(call_sums):
        sums.update({name: row[name] for name in ("calls", "answered", "tokens_in")})
    return Evidence(
        expected=expected,
        unreadable=unreadable,
        calls=calls,
        hits=hits,
        rows={row["id"]: row for row in read(images)},
        history=history,
        events=read(events, events.c.seq),
        ledger=read(provider_calls, provider_calls.c.seq),
        variants=variants,
        results={(row["image_id"], row["asset"]): row for row in read(image_results)},
        sums=sums,
    )


def find_lost(seen: Evidence) -> Iterator[str]:
    """Images that have not ended, or otherwise than they should."""
    for image_id, one in seen.expected.items():
        row = seen.rows.get(image_id)
        if one.status == "erased":
            if row is not None:
                yield f"{image_id} was erased and has a row ({row['status']})"
        elif row is None:
            yield f"{image_id} has no row"
        elif (row["status"], row["reason"]) != (one.status, one.reason) and not (
            row["reason"] in OF_THE_PROVIDER and has_failed_rightly(seen, one)
        ):
            told = [event["event"] for event in seen.history[image_id]]
            yield (
                f"{image_id} is {row['status']} ({row['reason']}: {row['error']}), "
                f"not {one.status} ({one.reason}): {' '.join(told)}"
            )
    for image_id in seen.rows.keys() - seen.expected.keys():
        yield f"{image_id} was never pushed"


def has_failed_rightly(seen: Evidence, one: Expected) -> bool:
    """Whether all attempts at a call met faults of the provider, as in an outage of seconds."""
    faulty = Counter(
        call.stage
        for call in seen.calls
        if call.picture == one.pictures[-1] and call.fault not in (None, "slow")
    )
    return max(faulty.values(), default=0) >= MAX_ATTEMPTS


def find_wrong(seen: Evidence, files: Storage, index: EmbeddingIndex) -> Iterator[str]:
    """Completed images without their files, description or vector, or with those of others."""
    for image_id, one in seen.expected.items():
        row = seen.rows.get(image_id)
        if row is None or row["status"] != Status.COMPLETED:
            continue
        number = one.pictures[-1]
        if (row["width"], row["height"]) != one.size:
            yield f"{image_id} is {row['width']} x {row['height']}, not {one.size}"
        yield from _find_wrong_files(image_id, seen.variants[image_id], number, files)
        metadata = ImageMetadata.model_validate(row["metadata"])
        if find_number(metadata.description) != number:
            yield f"{image_id} shows {number}: {metadata.description}"
        made = seen.results[image_id, "embedding"]
        recipe = Recipe(made["provider"], made["model"], made["settings"])
        vector = index.get(image_id, recipe.version)
        if vector is None or vector["text"] != metadata.embedding_text:
            yield f"{image_id} has the vector of {vector and vector['text']!r:.60}"
        elif vector["fence"] > row["fence"]:
            yield f"{image_id} has a vector with fence {vector['fence']}, the row {row['fence']}"
        if (count := index.count_rows_of([image_id])) != 1:
            yield f"{image_id} has {count} rows in the index"
    for image_id, one in seen.expected.items():
        if one.status == "erased" and index.count_rows_of([image_id]):
            yield f"{image_id} was erased and has a vector"


def _find_wrong_files(
    image_id: str, variants: Sequence[Mapping[str, Any]], number: int, files: Storage
) -> Iterator[str]:
    if len(variants) != 6:
        yield f"{image_id} has {len(variants)} variants"
    for variant in variants:
        content = files.read(variant["path"])
        picture = Image.open(io.BytesIO(content))
        found = (picture.format or "").lower(), picture.size, len(content), read_number(picture)
        size = (variant["width"], variant["height"])
        right = variant["format"], size, variant["size"], number
        if found != right or not variant["is_published"]:
            yield f"{variant['path']} is {found}, not {right}"


def find_stray_files(seen: Evidence, files: Storage) -> Iterator[str]:
    """Files that belong to no image."""
    known = {variant["path"] for all_of in seen.variants.values() for variant in all_of}
    known |= {
        f"original/{image_id}.{one.extension}"
        for image_id, one in seen.expected.items()
        if one.status != "erased"
    }
    for file in files.list_files():
        if file.path.startswith(("original/", "variants/")) and file.path not in known:
            yield f"{file.path} belongs to no image"


def find_doubles(seen: Evidence) -> Iterator[str]:
    """Events that happened twice, and images that two runs held at the same time."""
    for image_id, rows in seen.history.items():
        counts = Counter((row["generation"], row["event"]) for row in rows)
        for (generation, event), count in counts.items():
            if event in ONCE and count > 1:
                yield f"{image_id} was {event} {count} times in generation {generation}"
        fence, holder = 0, None
        for row in rows:
            if row["fence"] < fence:
                yield f"{image_id}: the fence fell from {fence} to {row['fence']}"
            fence = row["fence"]
            if row["event"] == "claimed":
                if holder is not None:
                    yield f"{image_id}: {row['run_id']} claimed it while {holder} held it"
                holder = row["run_id"], fence
            elif row["event"] in ("made", "reused") and (holder is None or holder[1] != fence):
                yield f"{image_id}: fence {fence} wrote, {holder} held it"
            elif row["event"] in ENDS:
                holder = None
        if holder is not None:
            yield f"{image_id} is still held by {holder}"


def find_wrong_events(seen: Evidence, streamed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Events that were not told, told wrongly, or told in another order."""
    told: Counter[tuple[str, int, str]] = Counter()
    for event in seen.events:
        told[event["image_id"], event["generation"], event["type"]] += 1
    for image_id, rows in seen.history.items():
        for row in rows:
            key = (image_id, row["generation"], f"image.{row['event']}")
            if row["event"] in ("completed", "failed") and told[key] != 1:
                yield f"{image_id}: generation {row['generation']} has {told[key]} of {key[2]}"
    order = {event["event_id"]: event["seq"] for event in seen.events}
    first: dict[str, None] = dict.fromkeys(event["eventId"] for event in streamed)
    for missing in order.keys() - first.keys():
        yield f"event {missing} is not on the stream"
    last: dict[str, int] = defaultdict(int)
    by_id = {event["eventId"]: event for event in streamed}
    for event_id in first:
        event = by_id[event_id]
        image_id = event["imageId"]
        if order.get(event_id, last[image_id]) < last[image_id]:
            yield f"{image_id}: {event['type']} came too late"
        last[image_id] = order.get(event_id, last[image_id])
        said = event.get("description")
        if said and find_number(said) not in seen.expected[image_id].pictures:
            yield f"{image_id}: an event said {said!r}, which is another image's"


def find_paid_twice(seen: Evidence) -> tuple[list[str], Counter[str]]:
    """Calls that were paid again without need, and how often which fault was the need.

    A call is paid for when its answer was sent completely and is valid. It may be made again only
    if a fault near it can be why the answer was lost: the machine that asked lost a run, or all, or
    its network. Two images with the same picture may ask at the same moment, and one may ask again
    after the other was replaced or erased.
    """
    wrong, causes = [], Counter()
    asked: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in seen.calls:
        if call.is_answered:
            asked[call.stage, call.picture].append(call)
    owners: dict[int, list[Expected]] = defaultdict(list)
    for expected in seen.expected.values():
        for picture in expected.pictures:
            owners[picture].append(expected)
    for (stage, picture), calls in asked.items():
        for earlier, later in pairwise(calls):
            assert earlier.answered is not None
            cause = _find_cause(seen.hits, earlier)
            if len(owners[picture]) > 1 and cause is None:
                cause = _find_cause_of_twins(owners[picture], picture, earlier, later)
            if cause is None:
                wrong.append(f"{stage} of {picture}: call {later.number} repeats {earlier.number}")
            causes[cause or "none"] += 1
    return wrong, causes


def _find_cause_of_twins(
    owners: Sequence[Expected], picture: int, earlier: Call, later: Call
) -> str | None:
    assert earlier.answered is not None
    if later.asked < earlier.answered + 5:
        return "twins at the same moment"
    is_kept = all(one.status == "completed" and one.pictures[-1] == picture for one in owners)
    return None if is_kept else "its twin was replaced"


def find_unrecorded(seen: Evidence) -> tuple[list[str], Counter[str]]:
    """Differences between the ledger and the provider, and how often which fault was the cause."""
    wrong, causes = [], Counter()
    sent = {call.number: call for call in seen.calls if call.is_answered}
    useless = {call.number for call in seen.calls if call.fault in ("malformed", "html")}
    recorded = Counter(row["tokens_in"] for row in seen.ledger if row["tokens_in"])
    for number, count in recorded.items():
        if count > 1:
            wrong.append(f"call {number} is {count} times in the ledger")
        if number not in sent and number not in useless:
            wrong.append(f"call {number} is in the ledger and was never answered")
    for number in sent.keys() - recorded.keys():
        cause = _find_cause(seen.hits, sent[number])
        causes[cause or "none"] += 1
        if cause is None:
            wrong.append(f"call {number} ({sent[number].stage}) is not in the ledger")
    if len(seen.ledger) > len(seen.calls):
        wrong.append(f"{len(seen.ledger)} calls are in the ledger, {len(seen.calls)} were made")
    real = {
        "calls": len(seen.ledger),
        "answered": sum(row["outcome"] == "answered" for row in seen.ledger),
        "tokens_in": sum(row["tokens_in"] or 0 for row in seen.ledger),
    }
    if seen.sums != real:
        wrong.append(f"the sums of days say {dict(seen.sums)}, the calls {real}")
    return wrong, causes


def _find_cause(hits: Sequence[Hit], call: Call) -> str | None:
    answered = call.answered or call.asked
    return next(
        (hit.kind for hit in hits if hit.can_lose(call.machine, call.asked, answered)), None
    )


def find_leftovers(seen: Evidence, queue: UploadQueue) -> Iterator[str]:
    """What should be gone when all is calm, in the catalogue and in Redis."""
    counts = queue.count()
    if counts["waiting"]:
        yield f"{counts['waiting']} entries wait"
    dead = {letter["entry"] for letter in queue.list_dead()}  # one of them may be there twice
    if len(dead) != seen.unreadable:
        yield f"{len(dead)} entries are dead, {seen.unreadable} were unreadable"
    prefix = queue.wait_key.removesuffix("wait")
    for key in queue.redis.scan_iter("*"):
        name = key.decode().removeprefix(prefix)
        if not name.startswith(KEYS_THAT_STAY):
            yield f"Redis has the key {key.decode()}"


def read_stream(queue: UploadQueue) -> list[dict[str, Any]]:
    """All events on the Redis stream."""
    key = queue.wait_key.removesuffix("wait") + "events"
    return [json.loads(fields[b"event"]) for _, fields in queue.redis.xrange(key)]

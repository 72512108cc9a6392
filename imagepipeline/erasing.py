"""Erasing images: everything that shows one or tells of it is removed, wherever it is.

The order makes it safe at any time, and safe to repeat after a crash: the image is ended under its
fence, so that no run can write to it; its runs end, so that none writes a file; files, vectors and
Dagster's events go; the rows go last, because they say where the rest is.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from imagepipeline.errors import MissingOriginalError, StackError, UnsafePathError
from imagepipeline.models import (
    ASSETS,
    Embedding,
    ImageMetadata,
    Recipe,
    VariantSpec,
    VisionAnswer,
    check_image_id,
)
from imagepipeline.paid_calls import Kept
from imagepipeline.storage import Storage, hash_original
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline.text import hash_text

MAX_ROUNDS = 3  # of an image that is pushed while it is erased
CANCELLED = "it is being erased"
ALWAYS_REMAINS = (
    "backups and snapshots of databases, index and storage, and old versions in a bucket",
    "copies in your app, in browsers and in a CDN",
    "its events on the Redis stream, until `image.erased` follows them there, within seconds",
    "the ID, in logs, in the ticks of sensors and in the list of erased images",
)


class Orchestrator(Protocol):
    """What Dagster knows of images."""

    def count_runs(self, image_id: str) -> int:
        """The number of an image's runs."""

    def end_runs(self, image_id: str) -> None:
        """Cancels the image's unfinished runs, and returns when they have ended.

        Raises:
            StackError: one does not end.
        """

    def remove(self, image_id: str) -> int:
        """Removes the image's runs with all their events, and its partition; counts the runs."""


@dataclass(frozen=True)
class Stores:
    """Where images are, and what today's settings would make of them."""

    catalogue: Catalogue
    erasures: Erasures
    queue: UploadQueue
    files: Storage
    index: EmbeddingIndex
    orchestrator: Orchestrator
    specs: Sequence[VariantSpec]
    recipes: Mapping[str, Recipe]


@dataclass
class Receipt:
    """What was removed of an image, or would be in a dry run, and what remains.

    Attributes:
        id: the image.
        is_known: whether anything was found.
        is_dry_run: whether nothing was changed.
        entries: removed from the Redis list.
        files: removed originals and variants.
        vectors: removed from the index; their old versions are removed, too.
        runs: removed from Dagster with all their events, and the partition with them.
        rows: removed rows of the catalogue, by table.
        remains: what cannot be removed from here, in sentences.
    """

    id: str
    is_dry_run: bool
    is_known: bool = False
    entries: int = 0
    files: list[str] = field(default_factory=list)
    vectors: int = 0
    runs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    remains: list[str] = field(default_factory=lambda: list(ALWAYS_REMAINS))

    def to_dict(self) -> dict[str, Any]:
        """The receipt as JSON."""
        return asdict(self)


def erase(stores: Stores, image_ids: Sequence[str], is_dry_run: bool) -> list[Receipt]:
    """Erases images, and returns a receipt for each.

    Raises:
        InvalidUploadError: one is not an image ID; nothing was erased.
        StackError: a run does not end, or an image is pushed again and again; what was removed
            stays removed, and a repetition goes on.
    """
    for image_id in image_ids:
        check_image_id(image_id)
    receipts = {image_id: Receipt(image_id, is_dry_run) for image_id in image_ids}
    waiting = stores.queue.find_waiting(receipts.keys())
    for image_id, receipt in receipts.items():
        receipt.entries = len(waiting.get(image_id, []))
        receipt.runs = stores.orchestrator.count_runs(image_id)
        receipt.vectors = stores.index.count_rows_of([image_id])
        receipt.rows = stores.erasures.count(image_id)
        originals, variants = _list_paths(stores, image_id, receipt)
        receipt.files = sorted(path for path in originals | variants if _exists(stores.files, path))
    if not is_dry_run:
        for image_id in image_ids:
            for entry in waiting.get(image_id, []):
                stores.queue.withdraw(entry)
            _end(stores, image_id)
        stores.index.erase(image_ids)
        for image_id in image_ids:
            _remove(stores, receipts[image_id])
        if not stores.erasures.forget_traces():
            for receipt in receipts.values():
                receipt.remains.append("the catalogue's write-ahead log, until it is next emptied")
    for receipt in receipts.values():
        counts = (receipt.entries, receipt.files, receipt.vectors, receipt.runs, receipt.rows)
        receipt.is_known = any(counts)
    return list(receipts.values())


def _end(stores: Stores, image_id: str) -> None:
    """Ends the image and its runs, so that nothing writes to it any more."""
    stores.catalogue.cancel(image_id, CANCELLED)
    stores.orchestrator.end_runs(image_id)


def _remove(stores: Stores, receipt: Receipt) -> None:
    """Removes an ended image's files, events and rows; begins again if it is pushed meanwhile."""
    image_id = receipt.id
    variants: set[str] = set()
    for _ in range(MAX_ROUNDS):
        row = stores.catalogue.get(image_id)
        keys = _list_answer_keys(stores, row)
        originals, known = _list_paths(stores, image_id, receipt)
        variants |= known
        _delete(stores, receipt, originals | variants)
        receipt.runs = max(receipt.runs, stores.orchestrator.remove(image_id))
        rows = stores.erasures.remove(image_id, row["fence"] if row else None, keys)
        if rows is not None:
            receipt.rows = rows or receipt.rows
            break
        _end(stores, image_id)
        stores.index.erase([image_id])
    else:
        raise StackError(f"{image_id} is pushed again and again: stop that, then erase it again")
    # A run that was cancelled by force may have lived until now, and may have written a variant or
    # a vector before it looked for its claim. A tick may have brought the image back to Dagster.
    if not stores.catalogue.get_states([image_id]):
        stores.orchestrator.remove(image_id)
    _delete(stores, receipt, variants)
    if stores.index.count_rows_of([image_id]):
        stores.index.erase([image_id])


def _list_paths(stores: Stores, image_id: str, receipt: Receipt) -> tuple[set[str], set[str]]:
    """Where the image's originals and its variants are, or may be, without other images' files."""
    row = stores.catalogue.get(image_id) or {}
    named = {row.get("path"), row.get("requested_path")} - {None}
    originals = {*map(str, named), *stores.files.list_originals_of(image_id)}
    variants = set()
    for spec, path in itertools.product(stores.specs, originals):
        with contextlib.suppress(UnsafePathError):  # then there is no such file
            variants.add(spec.path_for(path))
    variants |= {str(variant["path"]) for variant in row.get("variants", [])}
    foreign = stores.erasures.find_foreign(image_id, originals | variants)
    for path in sorted(foreign):
        sentence = f"{path}, which belongs to another image"
        if sentence not in receipt.remains:
            receipt.remains.append(sentence)
    return originals - foreign, variants - foreign


def _delete(stores: Stores, receipt: Receipt, paths: set[str]) -> None:
    """Deletes those files that exist, and notes them in the receipt."""
    found = {path for path in paths if _exists(stores.files, path)}
    for path in found:
        stores.files.delete(path)
    receipt.files = sorted({*receipt.files, *found})


def _exists(files: Storage, path: str) -> bool:
    try:
        files.read(path, 0)
    except MissingOriginalError:
        return False
    return True


def _list_answer_keys(stores: Stores, row: Mapping[str, Any] | None) -> list[str]:
    """The keys of paid answers about the image whose results may not be in place."""
    if row is None:
        return []
    inputs: dict[str, set[str]] = {"metadata": set(), "embedding": set()}
    if row["original_sha256"]:
        inputs["metadata"].add(row["original_sha256"])
    for path in filter(None, (row["path"], row["requested_path"])):
        if sha256 := hash_original(stores.files, path):
            inputs["metadata"].add(sha256)
    if metadata := ImageMetadata.read(row["metadata"]):
        inputs["embedding"].add(hash_text(metadata.embedding_text))
    recipes = {asset: {recipe} for asset, recipe in stores.recipes.items()}
    for asset, made in row["made_by"].items():
        recipes.setdefault(asset, set()).add(
            Recipe(made["provider"], made["model"], made["settings"])
        )
    types: dict[str, Any] = {"metadata": VisionAnswer, "embedding": Embedding}
    return [
        Kept(asset, recipe, sha256, types[asset]).key
        for asset in ASSETS
        if asset in types
        for recipe in recipes.get(asset, ())
        for sha256 in inputs[asset]
    ]

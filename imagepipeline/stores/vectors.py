"""EmbeddingIndex: a `SearchIndex` in LanceDB, with a table for each version and vector length.

lancedb and pyarrow are imported where they are used: they take two seconds and start threads.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from imagepipeline.errors import (
    DiskFullError,
    ImagePipelineError,
    ProviderRejectedError,
    StaleClaimError,
)
from imagepipeline.locks import trying_lock
from imagepipeline.models import Claim, Embedding, Neighbour, check_image_id
from imagepipeline.stores.durability import sync
from imagepipeline.stores.objects import open_bucket
from imagepipeline.text import make_printable

# Without it, five writers of the same new ID leave five rows. It is part of the schema, so that no
# table exists without it.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}

T = TypeVar("T")
Write = tuple[Claim, Embedding]
MIN_COMMITS = 20
TIDY_SHARE = 8  # of the commits after which compaction is due; a pause allows it earlier
MAX_CONFLICTS = 10
SETTLE_SECONDS = 3  # reads and writes take less
# Of files and versions of the index. Every upsert adds some, and LanceDB's own limit is far higher.
METADATA_CACHE_BYTES = 4_000_000
# How long a reader may use an old version; each may be a copy of all rows. A read takes seconds.
READERS_PATIENCE = timedelta(minutes=2)
# How long a write goes on after conflicts with other machines' writes; less than a run waits for
# the resident. LanceDB's 30 s are too short for a busy machine.
WRITE_PATIENCE = timedelta(minutes=4)
log = logging.getLogger(__name__)


# How long an erasure waits for a compaction to end, before it goes on all the same.
MAINTENANCE_SECONDS = 30


class EmbeddingIndex:
    """The LanceDB database at `uri`, a folder or a URL.

    The first upsert into a table creates it. LanceDB retries commits that conflict. What `upsert`,
    `upsert_all` or `erase` has done is durable when it returns.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._synced: dict[str, set[str]] = {}  # names of files and folders, by folder

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """See `EmbeddingStore.upsert`."""
        error = self.upsert_all([(claim, embedding)])[0]
        if error is not None:
            raise error

    def upsert_all(self, writes: Sequence[Write]) -> list[ImagePipelineError | None]:
        """Stores several with one commit for each table.

        Returns:
            For each write the error that `upsert` would raise, or None.

        Raises:
            DiskFullError: there is no room; some may be stored.
        """
        errors: list[ImagePipelineError | None] = [None] * len(writes)
        by_table: dict[str, list[int]] = {}
        for position, (_, embedding) in enumerate(writes):
            by_table.setdefault(_table_name(embedding), []).append(position)
        for positions in by_table.values():
            embedding = writes[positions[0]][1]
            known = self.list_dimensions(embedding.version)
            if known and len(embedding.vector) not in known:
                refusal = ProviderRejectedError(
                    f"{embedding.version} gave {len(embedding.vector)} dimensions, the index holds "
                    f"{known[0]}: the model behind the name has changed, so set another "
                    "IMAGEPIPELINE_EMBEDDING_MODEL"
                )
                for position in positions:
                    errors[position] = refusal
                continue
            # One row for each image: the last one with its highest fence.
            latest = {
                writes[p][0].image_id: p
                for p in sorted(positions, key=lambda p: writes[p][0].fence)
            }
            with _explained_full_disk():
                chosen = [writes[position] for position in latest.values()]
                fences = _repeat_if_overtaken(functools.partial(self._merge, chosen))
            for position in positions:
                claim = writes[position][0]
                if claim.fence < fences[claim.image_id]:
                    errors[position] = StaleClaimError(
                        f"the index holds a later embedding of {claim.image_id}"
                    )
        with _explained_full_disk():
            self._sync()
        return errors

    def get(self, image_id: str, version: str) -> dict[str, Any] | None:
        """See `EmbeddingStore.get`."""
        where = f"image_id = '{check_image_id(image_id)}'"
        for name in self._table_names():
            table = self._open(name) if name.startswith(_table_prefix(version)) else None
            rows: list[dict[str, Any]] = (
                table.search().where(where).limit(1).to_list() if table else []
            )
            if rows:
                return rows[0]
        return None

    def list_dimensions(self, version: str) -> list[int]:
        """See `SearchIndex.list_dimensions`."""
        prefix = _table_prefix(version)
        return [
            int(name.removeprefix(prefix))
            for name in self._table_names()
            if name.startswith(prefix)
        ]

    def count_rows(self, version: str | None = None) -> int:
        """See `SearchIndex.count_rows`."""
        prefix = _table_prefix(version) if version else ""
        tables = [self._open(name) for name in self._table_names() if name.startswith(prefix)]
        return sum(table.count_rows() for table in tables if table)

    def count_rows_of(self, image_ids: Sequence[str]) -> int:
        """The number of rows of these images, of all versions."""
        tables = [self._open(name) for name in self._table_names()]
        return sum(table.count_rows(_name_images(image_ids)) for table in tables if table)

    def erase(self, image_ids: Sequence[str]) -> None:
        """Removes all rows of these images, and all old versions and files that hold them.

        Others may read and write meanwhile. A file that a killed writer left, and that never became
        part of a version, is removed after a week by compaction.
        """
        with self._maintaining(MAINTENANCE_SECONDS):
            self._erase(image_ids)

    def _erase(self, image_ids: Sequence[str]) -> None:
        names = self._table_names()
        for name in names:
            _repeat_if_overtaken(functools.partial(self._rewrite, name, image_ids))
        self._sync()  # the rows that stay, before their old files are removed
        # Whoever had opened a version before that may still read it.
        compacted = time.monotonic()
        time.sleep(SETTLE_SECONDS)
        for name in names:
            table = self._open(name)
            age = timedelta(seconds=time.monotonic() - compacted)
            _repeat_if_overtaken(functools.partial(table.optimize, cleanup_older_than=age))
        self._sync()

    def _rewrite(self, name: str, image_ids: Sequence[str]) -> None:
        """Removes rows and rewrites the files they were in."""
        table = self._database.open_table(name)
        table.delete(_name_images(image_ids))
        # Compaction leaves a file with few deleted rows alone, unless it can merge it with another:
        # a row that is written again is in a file of its own.
        if any_row := table.search().select(["image_id"]).limit(1).to_list():
            table.update(
                where=_name_images([any_row[0]["image_id"]]), values_sql={"fence": "fence"}
            )
        table.optimize()

    def nearest(self, query: Embedding, count: int) -> list[Neighbour]:
        """See `SearchIndex.nearest`."""
        table = self._open(_table_name(query))
        if table is None:
            return []
        rows = table.search(list(query.vector)).distance_type("cosine").limit(count).to_list()
        return [Neighbour(row["image_id"], 1 - row["_distance"], row["text"]) for row in rows]

    def nearest_other(self, image_id: str, version: str) -> Neighbour | None:
        """See `SearchIndex.nearest_other`."""
        row = self.get(image_id, version)
        if row is None:
            return None
        found = self.nearest(Embedding(row["text"], tuple(row["vector"]), version), count=2)
        return next((neighbour for neighbour in found if neighbour.image_id != image_id), None)

    def _merge(self, writes: Sequence[Write]) -> dict[str, int]:
        """Stores writes of different images in one table; returns each row's fence afterwards."""
        import pyarrow as pa

        table = self._open_or_create(writes[0][1])
        rows = [
            {
                "image_id": claim.image_id,
                "generation": claim.generation,
                "fence": claim.fence,
                "model": embedding.version,
                "text": embedding.text,
                "vector": list(embedding.vector),
            }
            for claim, embedding in writes
        ]
        result = (
            table.merge_insert("image_id")
            .when_matched_update_all(where="target.fence <= source.fence")
            .when_not_matched_insert_all()
            .use_index(False)  # with one, concurrent writers of a new ID leave a row each
            .execute(pa.Table.from_pylist(rows, schema=table.schema), timeout=WRITE_PATIENCE)
        )
        if result.num_inserted_rows + result.num_updated_rows == len(rows):
            return {claim.image_id: claim.fence for claim, _ in writes}
        table.checkout_latest()  # another process may have written those rows
        known = ", ".join(f"'{check_image_id(claim.image_id)}'" for claim, _ in writes)
        query = (
            table.search()
            .where(f"image_id IN ({known})")
            .select(["image_id", "fence"])
            .limit(len(rows))
        )
        return {row["image_id"]: row["fence"] for row in query.to_list()}

    @contextlib.contextmanager
    def _maintaining(self, patience_seconds: float) -> Iterator[bool]:
        """Whether no other process compacts the index or erases from it; in a bucket, nobody knows.

        A compaction that loses to an erasure leaves a file with the erased rows, for a week.
        """
        if "://" in self._uri or not Path(self._uri).is_dir():
            yield True
            return
        with trying_lock(Path(self._uri, ".maintenance"), patience_seconds) as is_alone:
            yield is_alone

    def _sync(self) -> None:
        """Makes all changes in a folder durable, because LanceDB syncs nothing; a bucket does.

        The first call syncs all files, later ones the new ones, and folders that have changed.
        That takes 2 to 12 ms for each commit, however many images share it. A sync of the file
        system took 1 ms, but it would wait for whatever others write there. LanceDB manages without
        its hint at the latest version, the only file that it replaces.
        """
        if "://" in self._uri or not Path(self._uri).is_dir():
            return
        if not self._synced:
            sync(Path(self._uri).absolute().parent)
        synced = {}
        for folder, folders, files in os.walk(self._uri):
            names, earlier = {*folders, *files}, self._synced.get(folder)
            if names != earlier:
                for name in set(files) - (earlier or set()):
                    with contextlib.suppress(FileNotFoundError):  # compaction has removed it
                        sync(os.path.join(folder, name))
                sync(folder)
            synced[folder] = names
        self._synced = synced

    @functools.cached_property
    def _database(self) -> Any:
        import lancedb

        return lancedb.connect(
            self._uri,
            # Plain HTTP is used only if the operator sets such an address in AWS_ENDPOINT_URL.
            storage_options={"allow_http": "true"} if "://" in self._uri else None,
            session=lancedb.Session(metadata_cache_size_bytes=METADATA_CACHE_BYTES),
        )

    def _table_names(self) -> list[str]:
        return list(self._database.list_tables(limit=1000).tables)

    def _open(self, name: str) -> Any:
        """That table, or None if it does not exist, or not completely yet."""
        try:
            return self._database.open_table(name)
        except ValueError:
            return None

    def _open_or_create(self, embedding: Embedding) -> Any:
        name = _table_name(embedding)
        table = self._open(name)
        if table is None:
            create_table(self._uri, name, build_schema(len(embedding.vector)))
            table = self._database.open_table(name)
        return table


class BatchingIndex(EmbeddingIndex):
    """An index whose concurrent upserts share commits: those that arrive during one share the next.

    A commit costs the same for one row as for a hundred, and adds a version and a file to read;
    compaction merges these from time to time. Each machine has one process with such an index.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._commits = 0  # since the last compaction
        self._has_copies = False  # whether compaction has left older versions of all rows
        self._tidying = threading.Timer(0, self._tidy)
        self._waiting: queue.SimpleQueue[tuple[Write, Future[None]]] = queue.SimpleQueue()
        self._writing = threading.Lock()

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """See `EmbeddingStore.upsert`."""
        done: Future[None] = Future()
        self._waiting.put(((claim, embedding), done))
        with self._writing:
            if not done.done():  # else another thread has written it
                self._write_waiting()
        done.result()

    def _write_waiting(self) -> None:
        batch = []
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(self._waiting.get_nowait())
        try:
            errors: Sequence[Exception | None] = self.upsert_all([write for write, _ in batch])
        except Exception as error:
            errors = [error] * len(batch)
        for (_, done), failure in zip(batch, errors, strict=True):
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)
        self._commits += 1
        if self._commits >= MIN_COMMITS and self._commits >= self._find_limit():
            self._compact(was_written=True)
            self._has_copies = True
        self._tidy_later()

    def _tidy_later(self) -> None:
        self._tidying.cancel()
        self._tidying = threading.Timer(READERS_PATIENCE.total_seconds(), self._tidy)
        self._tidying.daemon = True
        self._tidying.start()

    def _find_limit(self) -> float:
        """After how many commits compaction is due.

        Compaction of n rows costs about as much as n / 4 reads of one more file, so the sum of both
        is least at every sqrt(n / 2) commits (measured up to 600 rows, calculated beyond).
        """
        return math.sqrt(self.count_rows() / 2)

    def _tidy(self) -> None:
        """Compacts after the last of many writes, and once more to remove what nobody reads then.

        Not after a few: it would write a large index anew for a single upload.
        """
        with self._writing:
            was_written = self._commits > 0
            if self._has_copies or self._commits > self._find_limit() / TIDY_SHARE:
                self._compact(was_written)
                self._has_copies = was_written
                if was_written:
                    self._tidy_later()

    def _compact(self, was_written: bool) -> None:
        for name in self._table_names():
            try:
                with self._maintaining(0) as is_alone:
                    if is_alone:  # otherwise the next commit tries again
                        self._commits = 0
                        self._compact_table(name, was_written)
            except Exception as error:  # no image depends on it, and it will be tried again
                # A conflict: another process has written meanwhile.
                is_conflict = "commit conflict" in str(error)
                level = logging.DEBUG if is_conflict else logging.WARNING
                log.log(level, "index compaction failed: %s", make_printable(str(error)))

    def _compact_table(self, name: str, was_written: bool) -> None:
        patience = READERS_PATIENCE
        if was_written:  # the newest version stays until the compacted files are durable
            newest = self._database.open_table(name).list_versions()[-1]["timestamp"]
            patience += max(datetime.now() - newest, timedelta(0))
        self._database.open_table(name).optimize(cleanup_older_than=patience)
        self._sync()


def measure_files(uri: str) -> dict[str, int]:
    """Bytes of a local index and its number of fragments (files of rows), of all tables.

    They include files that only earlier versions use, until compaction removes them. LanceDB is not
    needed. Returns nothing for a bucket, or where there is no index.
    """
    if "://" in uri or not Path(uri).is_dir():
        return {}
    size, fragments = 0, 0
    for path in filter(Path.is_file, Path(uri).rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # compaction may remove it now
            size += path.stat().st_size
            fragments += path.parent.name == "data"
    return {"index_bytes": size, "fragment_count": fragments}


def build_schema(dimensions: int) -> Any:
    """A table's columns as an Arrow schema."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False, metadata=PRIMARY_KEY),
            pa.field("generation", pa.int64()),
            pa.field("fence", pa.int64()),
            pa.field("model", pa.string()),
            pa.field("text", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), dimensions)),
        ]
    )


def create_table(uri: str, name: str, schema: Any) -> None:
    """Creates an empty table, unless another process has done so meanwhile.

    If two processes create a table, LanceDB lets the later one overwrite the rows of the earlier.
    So it is created in a temporary folder and copied; its first manifest is copied last, and only
    if there is none. https://github.com/lance-format/lance/issues/4451
    """
    import lancedb
    import obstore
    from obstore.exceptions import AlreadyExistsError

    place = open_bucket(uri) if "://" in uri else obstore.store.LocalStore(uri, mkdir=True)
    with tempfile.TemporaryDirectory() as folder:
        lancedb.connect(folder).create_table(name, schema=schema)
        [manifest] = Path(folder).glob(f"{name}.lance/_versions/*.manifest")
        for path in [*Path(folder).glob(f"{name}.lance/_transactions/*"), manifest]:
            with contextlib.suppress(AlreadyExistsError):
                obstore.put(
                    place,
                    str(path.relative_to(folder)),
                    path.read_bytes(),
                    mode="create",
                    use_multipart=False,
                )


@contextlib.contextmanager
def _explained_full_disk() -> Iterator[None]:
    """Turns LanceDB's error on a full disk, which only its text tells from others, into ours."""
    try:
        yield
    except Exception as error:
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            raise DiskFullError("no room for the index") from error
        raise


def _name_images(image_ids: Sequence[str]) -> str:
    """A condition for the rows of these images."""
    return "image_id IN ({})".format(", ".join(f"'{check_image_id(one)}'" for one in image_ids))


def _repeat_if_overtaken(change: Callable[[], T]) -> T:
    """Repeats a change that another writer has overtaken; returns what the change returns.

    Either the other has committed first, or it is an erasure that removed the version on which the
    change is based: on a busy machine, a write may take longer than SETTLE_SECONDS.
    """
    for _ in range(MAX_CONFLICTS):
        try:
            return change()
        except Exception as error:
            if not any(sign in str(error).lower() for sign in ("conflict", "not found")):
                raise
    return change()


def _table_name(embedding: Embedding) -> str:
    return f"{_table_prefix(embedding.version)}{len(embedding.vector)}"


def _table_prefix(version: str) -> str:
    return "embeddings_" + re.sub(r"[^A-Za-z0-9]+", "-", version) + "_"

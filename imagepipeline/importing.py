"""Import: takes the images of a folder or a bucket in, each once, after all uploads.

`plan` looks at every file and changes nothing. `carry_out` takes in what the plan calls new: it
stores an original, and only then records the image in the catalogue. An original never replaces
another one, and an image that is known stays as it is. So an import may be killed anywhere and run
again: what it finds in storage or catalogue, with the same bytes, is done.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TypeVar

from imagepipeline.errors import (
    InvalidUploadError,
    MissingOriginalError,
    UnsupportedFormatError,
)
from imagepipeline.imaging.formats import identify
from imagepipeline.models import StoredFile, Upload, check_image_id, choose_extension
from imagepipeline.storage import Storage, hash_original
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore

T = TypeVar("T")
R = TypeVar("R")
HEAD_BYTES = 4096  # enough to tell a format
THREADS = 8  # they wait for disks and buckets
TAKEN_TOGETHER = 100  # files between two commits
LOOKED_UP_TOGETHER = 500  # IDs in one query
Progress = Callable[[str, int, int], None]  # is told what is done, and how many of how many files


class State(StrEnum):
    """What becomes of a file; all but the first four are problems."""

    NEW = "new"  # it will be imported
    IMPORTED = "imported"
    KNOWN = "known"  # the catalogue has the image, with these bytes
    DUPLICATE = "duplicate"  # of a file with the same bytes, which has the same ID
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NOT_AN_IMAGE = "not_an_image"
    INVALID_ID = "invalid_id"
    SAME_ID = "same_id"  # as a file with other bytes
    OTHER_BYTES = "other_bytes"  # than the original that there is for the ID
    ERASED = "erased"
    CHANGED = "changed"  # since the plan


class Mode(StrEnum):
    """How originals come into the storage; `link` and `move` make hard links where they can."""

    COPY = "copy"
    MOVE = "move"
    LINK = "link"


FINE = (State.NEW, State.IMPORTED, State.KNOWN, State.DUPLICATE)


@dataclass(frozen=True)
class File:
    """A file of the source: its path there, its size in bytes, and what becomes of it."""

    name: str
    size: int
    state: State = State.NEW
    image_id: str | None = None
    error: str | None = None

    def fail(self, state: State, error: str) -> "File":
        """The file with a problem."""
        return replace(self, state=state, error=error)


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        files: the folder or bucket.
        id_from: of what IDs are made: `name`, `path` or `hash`.
        max_bytes: what is larger is not taken.
    """

    files: Storage
    id_from: str
    max_bytes: int

    def read(self, name: str, max_bytes: int) -> bytes:
        """A file; of a longer one the first `max_bytes + 1` bytes.

        Raises:
            MissingOriginalError: it cannot be read.
        """
        try:
            return self.files.read(name, max_bytes)
        except OSError as error:
            raise MissingOriginalError(f"it cannot be read: {error.strerror}") from None

    def build_id(self, name: str, content: bytes) -> str:
        """The ID of a file.

        Raises:
            InvalidUploadError: the file's name makes none.
        """
        if self.id_from == "hash":
            return _hash(content)
        path = PurePosixPath(name)
        if self.id_from == "path":
            words = re.sub(r"[^A-Za-z0-9_-]+", "-", str(path.with_suffix("")))
            return check_image_id(words.strip("-_"))
        return check_image_id(path.stem)


@dataclass
class Plan:
    """All files of a source by name, and the paths at which originals are stored already."""

    files: dict[str, File] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)  # by image ID

    def select(self, *states: State) -> list[File]:
        """The files in these states."""
        return [file for file in self.files.values() if file.state in states]

    @property
    def problems(self) -> list[File]:
        """The files that cannot be imported."""
        return [file for file in self.files.values() if file.state not in FINE]

    def count(self) -> dict[str, int]:
        """The number of files in each state that occurs."""
        counts = Counter(file.state for file in self.files.values())
        return {state.value: counts[state] for state in State if counts[state]}

    def note(self, files: Iterable[File]) -> None:
        """Replaces what is known of some files."""
        self.files.update((file.name, file) for file in files)


def plan(source: Source, files: Storage, catalogue: Catalogue, progress: Progress) -> Plan:
    """Looks at all files of a source and says what would become of each; changes nothing.

    Those of which an original is there already are read whole, to compare them.
    """
    planned = Plan()
    planned.note(find_images(source, progress))
    planned.note(_find_same_ids(planned.select(State.NEW), source))
    originals = files.list_originals(with_new=True)
    planned.stored = {image_id: file.path for image_id, file in originals.items()}
    new = planned.select(State.NEW)
    for portion in _divide(new, LOOKED_UP_TOGETHER):
        planned.note(_compare(portion, source, files, catalogue, planned.stored))
        progress("comparing", len(portion), len(new))
    return planned


def find_images(source: Source, progress: Progress) -> list[File]:
    """All files of a source: images with their IDs, and what is none with its problem."""
    found = [_look(listed, source.max_bytes) for listed in source.files.list_files()]
    looked_at = []
    for portion in _divide(found, TAKEN_TOGETHER):
        looked_at += _in_threads(lambda file: _identify(file, source), portion)
        progress("reading", len(portion), len(found))
    return looked_at


def carry_out(
    planned: Plan,
    source: Source,
    files: Storage,
    catalogue: Catalogue,
    mode: Mode,
    progress: Progress,
    tenant: str = "",
) -> None:
    """Takes in the files that the plan calls new, and notes in it what became of each.

    Raises:
        PostponedError: storage or catalogue does not answer, or is full; a repetition goes on.
    """
    new = planned.select(State.NEW)
    for portion in _divide(new, TAKEN_TOGETHER):
        # An app may have pushed some of them since, or a person may have erased one.
        portion = _compare(portion, source, files, catalogue, {})
        taken = _in_threads(lambda file: _store(file, planned, source, files, mode), portion)
        stored = [file for file in taken if file.state is State.IMPORTED]
        catalogue.accept_imported(
            Upload(str(file.image_id), planned.stored[str(file.image_id)], tenant=tenant)
            for file in stored
        )
        if mode is Mode.MOVE:
            for file in stored:
                source.files.delete(file.name)
        planned.note(taken)
        progress("importing", len(portion), len(new))
    if mode is Mode.MOVE:
        for file in planned.select(State.KNOWN, State.DUPLICATE):
            if _is_stored(file, planned, source, files):
                source.files.delete(file.name)


def _look(listed: StoredFile, max_bytes: int) -> File:
    file = File(listed.path, listed.size)
    if listed.fault:
        return file.fail(State.UNREADABLE, listed.fault)
    if not listed.size:
        return file.fail(State.EMPTY, "it has no bytes")
    if listed.size > max_bytes:
        return file.fail(State.TOO_LARGE, _explain_size(listed.size, max_bytes))
    return file


def _identify(file: File, source: Source) -> File:
    if file.state is not State.NEW:
        return file
    is_hashed = source.id_from == "hash"
    try:
        content = source.read(file.name, source.max_bytes if is_hashed else HEAD_BYTES)
        identify(content)
        return replace(file, image_id=source.build_id(file.name, content))
    except MissingOriginalError as error:
        return file.fail(State.UNREADABLE, str(error))
    except UnsupportedFormatError as error:
        return file.fail(State.NOT_AN_IMAGE, str(error))
    except InvalidUploadError as error:
        return file.fail(State.INVALID_ID, str(error))


def _find_same_ids(files: Sequence[File], source: Source) -> Iterator[File]:
    """The files whose ID another file has, too: all but the first of equal ones, or all."""
    by_id: dict[str | None, list[File]] = {}
    for file in files:
        by_id.setdefault(file.image_id, []).append(file)
    for first, *others in by_id.values():
        if all(_is_same(first, other, source) for other in others):
            for file in others:
                yield file.fail(State.DUPLICATE, f"it has the bytes of {first.name}")
        else:
            for file, other in ((first, others[0]), *((file, first) for file in others)):
                error = (
                    f"{file.image_id} would also be the ID of {other.name}, which has other bytes"
                )
                yield file.fail(State.SAME_ID, f"{error}: rename one, or use another --id-from")


def _is_same(one: File, other: File, source: Source) -> bool:
    if one.size != other.size:
        return False
    try:
        first, second = (source.read(file.name, source.max_bytes) for file in (one, other))
    except MissingOriginalError:
        return False
    return first == second


def _compare(
    portion: Sequence[File],
    source: Source,
    files: Storage,
    catalogue: Catalogue,
    stored: Mapping[str, str],
) -> list[File]:
    """The files, as known, or as problems, or as they are."""
    image_ids = [str(file.image_id) for file in portion]
    known, erased = catalogue.find_known(image_ids), catalogue.find_erased(image_ids)
    return _in_threads(_Comparison(source, files, stored, known, erased).judge, portion)


@dataclass(frozen=True)
class _Comparison:
    """Compares files with what storage and catalogue have of their IDs."""

    source: Source
    files: Storage
    stored: Mapping[str, str]
    known: Mapping[str, tuple[str | None, str | None]]
    erased: Set[str]

    def judge(self, file: File) -> File:
        """The file, as known, or as a problem, or as it is."""
        image_id = str(file.image_id)
        if image_id in self.erased:
            return file.fail(State.ERASED, f"{image_id} was erased: `push` takes it in again")
        is_known = image_id in self.known
        if not is_known and image_id not in self.stored:
            return file
        path, sha256 = self.known.get(image_id, (None, None))
        path = path or self.stored.get(image_id)
        path = path or next(iter(self.files.find_originals_of(image_id)), None)
        try:
            content = self.source.read(file.name, self.source.max_bytes)
        except MissingOriginalError as error:
            return file.fail(State.UNREADABLE, str(error))
        if _hash(content) != (sha256 or (path and hash_original(self.files, path))):
            other = f"{image_id} has another original ({path or 'which is missing'})"
            return file.fail(State.OTHER_BYTES, f"{other}: `push --id` replaces it")
        return replace(file, state=State.KNOWN) if is_known else file


def _store(file: File, planned: Plan, source: Source, files: Storage, mode: Mode) -> File:
    """Stores a new file as its image's original, unless that is there."""
    if file.state is not State.NEW:
        return file
    image_id = str(file.image_id)
    path = f"original/{image_id}.{choose_extension(file.name)}"
    path = planned.stored.setdefault(image_id, path)
    if mode is not Mode.COPY and _link(file, path, source.files, files):
        if source.id_from != "hash" or hash_original(files, path) == image_id:
            return replace(file, state=State.IMPORTED)
        files.delete(path)
    try:
        content = source.read(file.name, source.max_bytes)
    except MissingOriginalError as error:
        return file.fail(State.CHANGED, str(error))
    is_changed = source.id_from == "hash" and _hash(content) != image_id
    if is_changed or len(content) != file.size:
        return file.fail(State.CHANGED, "it has changed: import it again")
    if not files.create(path, content) and hash_original(files, path) != _hash(content):
        return file.fail(State.OTHER_BYTES, f"{path} was written by somebody else meanwhile")
    return replace(file, state=State.IMPORTED)


def _link(file: File, path: str, source: Storage, files: Storage) -> bool:
    """Makes a hard link; False if that is not possible, or the file is not as it was planned."""
    if not (isinstance(source, FileStore) and isinstance(files, FileStore)):
        return False
    origin = Path(source.locate(file.name))
    try:
        return origin.lstat().st_size == file.size and files.link(path, origin)
    except OSError:  # another file system, for instance
        return False


def _is_stored(file: File, planned: Plan, source: Source, files: Storage) -> bool:
    """Whether a file's bytes are in the storage, so that it may be deleted."""
    try:
        content = source.read(file.name, source.max_bytes)
    except MissingOriginalError:
        return False
    path = planned.stored.get(str(file.image_id))
    return path is not None and hash_original(files, path) == _hash(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _explain_size(size: int, max_bytes: int) -> str:
    return f"it has {size:,} bytes; at most {max_bytes:,} are accepted (IMAGEPIPELINE_MAX_BYTES)"


def _divide(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    return (items[first : first + length] for first in range(0, len(items), length))


def _in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))

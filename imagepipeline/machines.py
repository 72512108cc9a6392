"""What the machines of one pipeline must share, and whether they do.

    python -m imagepipeline.machines MARK      # prints what this machine works with, as JSON

A worker is asked for it over Celery's remote control. What it answers holds no secret, and proves what it can: that it
finds a mark where the one who asks has left one.
"""

import contextlib
import json
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from imagepipeline import providers
from imagepipeline.errors import ImagePipelineError
from imagepipeline.settings import Settings
from imagepipeline.storage import Storage, open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.wire import MalformedMessageError, validate

COMMAND = "describe_machine"  # its argument is a mark
MARK = re.compile(r"[0-9a-f]{32}")
MARK_SECONDS = 60


@dataclass(frozen=True)
class Machine:
    """What a machine works with, as far as others need it too."""

    host: str
    version: str
    slots: int
    catalogue: str | None  # the ID of its owner; None if it cannot be asked
    storage: str
    index: str
    recipes: dict[str, str]  # by asset
    found: dict[str, bool]  # whether the mark is there, by place: storage, index, Redis


def describe(settings: Settings, mark: str) -> Machine:
    """This machine; `mark` is what `leave_mark` gave to whoever asks."""
    if not MARK.fullmatch(mark):
        raise ValueError(f"{mark!r:.40} is no mark")
    return Machine(
        host=socket.gethostname(),
        version=version("imagepipeline"),
        slots=settings.slots,
        catalogue=_read_owner(settings),
        storage=_without_password(settings.storage),
        index=_without_password(settings.index_uri),
        recipes={
            asset: recipe.version for asset, recipe in providers.build_recipes(settings).items()
        },
        found={
            "storage": _is_there(
                lambda: open_storage(settings.storage).read(_name_file("variants/", mark))
            ),
            "index": _is_there(lambda: open_storage(settings.index_uri).read(_name_file("", mark))),
            "Redis": _is_there(lambda: _read_key(settings, mark)),
        },
    )


@contextlib.contextmanager
def leave_mark(settings: Settings) -> Iterator[str]:
    """A new mark, for as long as the context lasts: as a file in the storage and beside the index, and in Redis."""
    mark = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        for store, path in (
            (open_storage(settings.storage), _name_file("variants/", mark)),
            (open_storage(settings.index_uri), _name_file("", mark)),
        ):
            stack.enter_context(_leave_file(store, path))
        queue = stack.enter_context(closing(UploadQueue(settings.redis_url, settings.queue_prefix)))
        queue.redis.set(_name_key(settings, mark), mark, ex=MARK_SECONDS)
        yield mark


def find_differences(settings: Settings, answers: Mapping[str, Any]) -> list[str]:
    """A sentence on each thing that a worker should share with this home and does not.

    `answers` are those to `COMMAND`, by worker.
    """
    ours = describe(settings, uuid.uuid4().hex)
    lines = []
    for worker, answer in sorted(answers.items()):
        theirs = read_answer(answer)
        if theirs is None:
            lines.append(f"{worker!r:.100} is of another version: it cannot say what it works with")
        else:
            lines += [
                f"the worker on {theirs.host} {difference}" for difference in _compare(ours, theirs)
            ]
    return lines


def read_answer(answer: Any) -> Machine | None:
    """The machine that a worker has described; None if it has not."""
    try:
        machine: Machine = validate(Machine, answer)
    except MalformedMessageError:
        return None
    return machine


def _compare(ours: Machine, theirs: Machine) -> Iterator[str]:
    if theirs.version != ours.version:
        yield f"is of version {theirs.version}, this home of {ours.version}"
    if theirs.catalogue is None:
        yield "does not reach its catalogue"
    elif theirs.catalogue != ours.catalogue:
        yield "has another catalogue (DATABASE_URL)"
    if not theirs.found.get("storage"):
        yield f"does not find the files of this home: it has {_say_place('storage', theirs.storage, ours.storage)}"
    if not theirs.found.get("index"):
        yield f"does not find the index of this home: it has {_say_place('index', theirs.index, ours.index)}"
    if not theirs.found.get("Redis"):
        yield "has another Redis for rate limits (REDIS_URL), or does not reach it"
    for asset, recipe in ours.recipes.items():
        if theirs.recipes.get(asset) != recipe:
            yield f"makes {asset} with {theirs.recipes.get(asset)}, this home with {recipe}"


def _say_place(name: str, theirs: str, ours: str) -> str:
    advice = (
        "" if "://" in theirs else ", which must be a folder that all machines share, or a bucket"
    )
    return (
        f"its {name} in {theirs}{advice}"
        if theirs == ours
        else f"its {name} in {theirs}, this home in {ours}"
    )


def _read_owner(settings: Settings) -> str | None:
    with (
        contextlib.suppress(ImagePipelineError),
        closing(Catalogue(settings.database_url)) as catalogue,
    ):
        catalogue.check()
        return catalogue.find_owner()
    return None


def _read_key(settings: Settings, mark: str) -> bytes | None:
    with closing(UploadQueue(settings.redis_url, settings.queue_prefix)) as queue:
        value: bytes | None = queue.redis.get(_name_key(settings, mark))
    return value


def _is_there(read: Callable[[], bytes | None]) -> bool:
    try:
        return read() is not None
    except Exception:  # whatever the libraries say when it cannot be reached
        return False


@contextlib.contextmanager
def _leave_file(store: Storage, path: str) -> Iterator[None]:
    store.write(path, b"")
    try:
        yield
    finally:
        store.delete(path)


def _name_file(folder: str, mark: str) -> str:
    return f"{folder}.doctor-{mark}"


def _name_key(settings: Settings, mark: str) -> str:
    return f"{settings.queue_prefix}:doctor:{mark}"


def _without_password(uri: str) -> str:
    """A folder, or a URL without what may stand before its host."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def main() -> None:
    """Prints this machine, for the worker that was asked."""
    print(json.dumps(asdict(describe(Settings.load(), sys.argv[1]))))


if __name__ == "__main__":
    main()

"""Checks that all machines of a pipeline share the same stores, settings and versions.

    python -m imagepipeline.machines MARK      # prints this machine's configuration as JSON

The doctor asks each worker for its configuration over Celery's remote control. The answer holds no
secrets. To prove that a worker uses the same stores, the doctor first leaves a mark in each of
them, and the worker reports where it finds the mark.
"""

import contextlib
import json
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from imagepipeline import providers
from imagepipeline.errors import ImagePipelineError, ResidentDownError
from imagepipeline.resident import Resident
from imagepipeline.settings import Settings
from imagepipeline.storage import Storage, open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.wire import MalformedMessageError, validate

COMMAND = "describe_machine"  # takes a mark as its argument
MARK = re.compile(r"[0-9a-f]{32}")
MARK_SECONDS = 60
PING_SECONDS = 3


@dataclass(frozen=True)
class Machine:
    """The part of a machine's configuration that all machines must agree on."""

    host: str
    version: str
    slots: int
    catalogue: str | None  # ID of the Dagster instance that owns it; None if unknown
    storage: str
    index: str
    recipes: dict[str, str]  # recipe versions, by asset
    found: dict[str, bool]  # whether the mark was found, by store: storage, index, Redis
    # Whether the worker's processes answer: resident, zygote. Not compared.
    processes: dict[str, bool] = field(default_factory=dict)


def describe(settings: Settings, mark: str) -> Machine:
    """Describes this machine and looks for `mark`, which the caller got from `leave_mark`.

    Raises:
        ValueError: `mark` is malformed.
    """
    if not MARK.fullmatch(mark):
        raise ValueError(f"{mark!r:.40} is not a mark: expected 32 hexadecimal digits")
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
    """Leaves a new mark in the storage, beside the index and in Redis until the context exits."""
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
    """Returns one sentence for each thing that a worker should share with this home but does not.

    `answers` are the workers' answers to `COMMAND`, by worker name.
    """
    ours = describe(settings, uuid.uuid4().hex)
    lines = []
    for worker, answer in sorted(answers.items()):
        theirs = read_answer(answer)
        if theirs is None:
            lines.append(
                f"{worker!r:.100} did not describe its configuration: "
                "its machine is overloaded, or it runs another version (its log says which)"
            )
        else:
            lines += [
                f"the worker on {theirs.host} {difference}" for difference in _compare(ours, theirs)
            ]
    return lines


def find_silent(answers: Mapping[str, Any]) -> list[str]:
    """Returns one sentence for each process of a worker that does not answer the worker."""
    machines = filter(None, map(read_answer, answers.values()))
    return [
        f"the {name} of the worker on {machine.host} does not answer"
        for machine in machines
        for name, is_well in sorted(machine.processes.items())
        if not is_well
    ]


def answers_ping(settings: Settings) -> bool:
    """Returns whether this machine's resident answers."""
    try:
        return bool(Resident(settings.resident_address, PING_SECONDS).call("ping", bool))
    except ResidentDownError:
        return False


def read_answer(answer: Any) -> Machine | None:
    """Returns the machine that a worker described, or None if the answer cannot be read."""
    try:
        machine: Machine = validate(Machine, answer)
    except MalformedMessageError:
        return None
    return machine


def _compare(ours: Machine, theirs: Machine) -> Iterator[str]:
    if theirs.version != ours.version:
        yield f"runs version {theirs.version}, but this home runs {ours.version}"
    if theirs.catalogue is None:
        yield "cannot reach its catalogue"
    elif theirs.catalogue != ours.catalogue:
        yield "uses another catalogue (DATABASE_URL)"
    if not theirs.found.get("storage"):
        places = _compare_places(theirs.storage, ours.storage)
        yield f"cannot find this home's files: its storage is {places}"
    if not theirs.found.get("index"):
        places = _compare_places(theirs.index, ours.index)
        yield f"cannot find this home's index: its index is {places}"
    if not theirs.found.get("Redis"):
        yield "uses another Redis for rate limits (REDIS_URL), or cannot reach it"
    for asset, recipe in ours.recipes.items():
        if theirs.recipes.get(asset) != recipe:
            yield f"makes {asset} with {theirs.recipes.get(asset)}, but this home uses {recipe}"


def _compare_places(theirs: str, ours: str) -> str:
    if theirs != ours:
        return f"{theirs}, but this home uses {ours}"
    if "://" in theirs:
        return theirs
    return f"{theirs}, which must be a folder that all machines share, or a bucket"


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
    except Exception:  # each client library has its own errors for an unreachable store
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
    """Returns a folder unchanged, or a URL without credentials and query."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def main() -> None:
    """Prints this machine's description for the worker that started this process."""
    settings = Settings.load()
    machine = asdict(describe(settings, sys.argv[1]))
    print(json.dumps(machine | {"processes": {"resident": answers_ping(settings)}}))


if __name__ == "__main__":
    main()

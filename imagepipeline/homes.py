"""The home and the folder of its sockets: made for their owner alone, and looked at again each time they are used.

What is in a home can be executed (`dagster.yaml` names classes), a socket in its folder runs code or takes uploads, and
the catalogue says what strangers' pictures show. So a home is its owner's, whoever made it and however: what we make
is private by this process' umask (`settings`), what is found open is closed. Only what is surely ours is closed: the
files at a storage root that somebody chose are as open as they made that folder (`stores.files`).
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagepipeline.errors import StackError
from imagepipeline.settings import Settings

log = logging.getLogger(__name__)

OTHERS = 0o077  # all that a mode gives to those who are not the owner
OTHERS_WRITE = 0o022
# What we make in a home. Beside it, there may be originals and variants in `storage`.
CATALOGUE = "catalogue.sqlite"
OURS = {
    *(CATALOGUE, f"{CATALOGUE}-wal", f"{CATALOGUE}-shm", f"{CATALOGUE}-journal"),
    *("dagster", "lancedb", "logs", "sockets", "stack.lock", "valkey", "worker.lock"),
}
STORAGE = "storage"


def make_home(settings: Settings) -> None:
    """Makes the home where there is none, and closes it to others as `secure_home` does.

    Raises:
        StackError: it cannot be made or written to, or is not ours alone.
    """
    with told_of(settings.home):
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        secure_home(settings)
        with tempfile.TemporaryFile(
            dir=settings.home
        ):  # also where root meets a file system that is read-only
            pass


def hold_lock(path: Path) -> int | None:
    """A descriptor that holds a lock as long as it is open, in this process or in a child; None if another has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def make_socket_folder(settings: Settings) -> None:
    """Makes the folder of the sockets where there is none; raises as `make_home`, which comes first."""
    with told_of(settings.home):
        settings.socket_folder.mkdir(exist_ok=True, mode=0o700)
    secure_home(settings)


def secure_home(settings: Settings) -> None:
    """Closes the home to others, with what is in it and with its sockets. Where there is no home it makes none.

    Raises:
        StackError: something is another user's, or cannot be closed without closing what is none of ours; the message
            says what to do.
    """
    for fault in find_faults(settings):
        if not fault.can_be_mended:
            raise StackError(f"{fault.sentence}: {fault.cure}")
        with told_of(settings.home):
            _close(fault.path, is_deep=fault.path != settings.home)
        if fault.path == settings.home:
            log.warning("%s; it has been closed to them", fault.sentence)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a folder or file, and for a person, what to do about it."""

    path: Path
    sentence: str
    cure: str
    can_be_mended: bool = False


def find_faults(settings: Settings) -> Iterator[Fault]:
    """What lets others into the home and to its sockets; found one by one, so that each may be mended first."""
    with told_of(settings.home):
        if settings.home.is_dir():
            yield from _examine_home(settings)
        yield from _examine_socket_folder(settings)


def _examine_home(settings: Settings) -> Iterator[Fault]:
    home = settings.home
    if fault := _find_owner_fault(home, "set IMAGEPIPELINE_HOME to a folder of this user"):
        yield fault
        return
    mode = home.stat().st_mode
    entries = {entry.name: entry for entry in os.scandir(home)}
    if mode & OTHERS:
        foreign = [str(home / name) for name in sorted(entries.keys() - OURS - {STORAGE})]
        if settings.storage_root is not None and Path(settings.storage).is_relative_to(home):
            foreign.append(settings.storage)
        sentence = f"{home} is open to other users ({stat.filemode(mode)[1:]})"
        if mode & stat.S_ISVTX:
            yield Fault(
                home,
                f"{sentence} and meant to be",
                "set IMAGEPIPELINE_HOME to a folder of this user's own",
            )
            return
        if foreign:
            cure = f"move that out of the home, or close the home yourself (`chmod go= {home}`)"
            yield Fault(home, f"{sentence}, and they may need {foreign[0]}", cure)
            return
        yield Fault(
            home,
            sentence,
            f"`chmod go= {home}`; `imagepipeline up` does it, too",
            can_be_mended=True,
        )
    for name in sorted(entries.keys() & OURS):
        path, found = home / name, entries[name].stat(follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):  # the owner's, such as to another disk
            continue
        if found.st_uid not in (os.geteuid(), 0):
            cure = "remove it, or give it to the user who runs this (`chown -R`)"
            yield Fault(path, f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}", cure)
        elif found.st_mode & OTHERS and found.st_uid == os.geteuid():
            yield Fault(
                path, f"{path} is open to other users", f"`chmod -R go= {path}`", can_be_mended=True
            )


def _examine_socket_folder(settings: Settings) -> Iterator[Fault]:
    folder = settings.socket_folder
    if (
        folder.parent != settings.home and folder.is_symlink()
    ):  # in /tmp anybody may make one, which we never do
        yield Fault(
            folder, f"{folder} is a link", "remove it, or set IMAGEPIPELINE_HOME to a shorter path"
        )
        return
    if folder.exists():
        if fault := _find_owner_fault(
            folder, "remove it, or set IMAGEPIPELINE_HOME to another folder"
        ):
            yield fault
            return
        if folder.stat().st_mode & OTHERS:
            yield Fault(
                folder,
                f"{folder} is open to other users",
                f"`chmod go= {folder}`",
                can_be_mended=True,
            )
    chosen = settings.code_address.parent
    if chosen != folder and chosen.exists():  # somebody's choice, so we do not close it
        cure = (
            "set IMAGEPIPELINE_CODE_SOCKET to a path in a folder that only this user may write to"
        )
        if fault := _find_owner_fault(chosen, cure):
            yield fault
        elif chosen.stat().st_mode & OTHERS_WRITE:
            yield Fault(chosen, f"other users may write to {chosen}", cure)


def _find_owner_fault(folder: Path, cure: str) -> Fault | None:
    """What is wrong with whose it is. Also for root, who would leave files there that the owner cannot change."""
    link = folder.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
        return Fault(folder, f"{folder} is a link of user {link.st_uid}", cure)
    if not folder.is_dir():
        return Fault(folder, f"{folder} is no folder", cure)
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        return Fault(folder, f"{folder} belongs to user {owner}, not to {os.geteuid()}", cure)
    return None


def _close(path: Path, is_deep: bool) -> None:
    """Takes from others all they may do with a file or folder, and with `is_deep` with all that is in it."""
    os.chmod(
        path, stat.S_IMODE(path.stat().st_mode) & ~OTHERS
    )  # first, so that nobody changes what is walked through
    if path.stat().st_mode & OTHERS:
        raise StackError(
            f"{path} cannot be closed to other users, as its file system keeps no modes: "
            "set IMAGEPIPELINE_HOME to a folder on another one"
        )
    for folder, names, files in os.walk(path) if is_deep else ():
        for name in (*names, *files):
            with contextlib.suppress(FileNotFoundError):  # the stack may be at work
                below = os.path.join(folder, name)
                found = os.lstat(below)
                if (
                    found.st_uid == os.geteuid()
                    and found.st_mode & OTHERS
                    and not stat.S_ISLNK(found.st_mode)
                ):
                    os.chmod(below, stat.S_IMODE(found.st_mode) & ~OTHERS)


@contextlib.contextmanager
def told_of(home: Path) -> Iterator[None]:
    """Names the home when something below it cannot be used."""
    try:
        yield
    except OSError as error:
        raise StackError(
            f"{home} cannot be used as the home ({error.strerror or type(error).__name__}): "
            "set IMAGEPIPELINE_HOME to a folder this user may write to"
        ) from None

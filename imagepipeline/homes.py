"""The home and its socket folder: private to their owner, and checked each time they are used.

Other users must not get into a home: `dagster.yaml` names classes that are executed, the sockets
run code and accept uploads, and the catalogue describes other people's pictures. New files are
private, because `settings` sets the umask, and access that others already have is taken away. Only
files that certainly belong to us are closed: a storage root that the operator chose stays as open
as the operator made it (`stores.files`).
"""

import contextlib
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

OTHERS = 0o077  # all permission bits of group and others
OTHERS_WRITE = 0o022
# The files and folders we create in a home, besides `storage` with originals and variants.
CATALOGUE = "catalogue.sqlite"
OURS = {
    *(CATALOGUE, f"{CATALOGUE}-wal", f"{CATALOGUE}-shm", f"{CATALOGUE}-journal"),
    *("dagster", "lancedb", "logs", "sockets", "stack.lock", "valkey", "worker.lock"),
}
STORAGE = "storage"


def make_home(settings: Settings) -> None:
    """Creates the home if it does not exist, and closes it to other users (see `secure_home`).

    Raises:
        StackError: The home cannot be created or written to, or is not private to this user.
    """
    with explain_os_errors(settings.home):
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        secure_home(settings)
        # A real write, because permission bits do not tell root that a file system is read-only.
        with tempfile.TemporaryFile(dir=settings.home):
            pass


def make_socket_folder(settings: Settings) -> None:
    """Creates the socket folder if it does not exist; call `make_home` first.

    Raises:
        StackError: The folder cannot be created, or is not private to this user.
    """
    with explain_os_errors(settings.home):
        settings.socket_folder.mkdir(exist_ok=True, mode=0o700)
    secure_home(settings)


def secure_home(settings: Settings) -> None:
    """Takes away other users' access to the home, its content and its sockets.

    Does not create a home.

    Raises:
        StackError: Something belongs to another user, or cannot be closed without closing files
            that are not ours. The message says what to do.
    """
    for fault in find_faults(settings):
        if not fault.is_fixable:
            raise StackError(f"{fault.sentence}: {fault.advice}")
        with explain_os_errors(settings.home):
            _close(fault.path, is_recursive=fault.path != settings.home)
        if fault.path == settings.home:
            log.warning("%s; their access has been removed", fault.sentence)


@dataclass(frozen=True)
class Fault:
    """A problem with a file or folder; `advice` tells a person what to do about it."""

    path: Path
    sentence: str
    advice: str
    is_fixable: bool = False


def find_faults(settings: Settings) -> Iterator[Fault]:
    """Yields everything that gives other users access to the home or its sockets.

    The search is lazy, so that the caller can fix each fault before the next one is looked for.
    """
    with explain_os_errors(settings.home):
        if settings.home.is_dir():
            yield from _examine_home(settings)
        yield from _examine_socket_folder(settings)


def _examine_home(settings: Settings) -> Iterator[Fault]:
    home = settings.home
    if fault := _find_owner_fault(home, "set IMAGEPIPELINE_HOME to a folder that this user owns"):
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
                f"{sentence} on purpose (sticky bit)",
                "set IMAGEPIPELINE_HOME to a private folder of this user",
            )
            return
        if foreign:
            advice = f"move that out of the home, or close the home yourself (`chmod go= {home}`)"
            yield Fault(home, f"{sentence}, and they may need {foreign[0]}", advice)
            return
        yield Fault(
            home,
            sentence,
            f"run `chmod go= {home}`, or `imagepipeline up`, which does the same",
            is_fixable=True,
        )
    for name in sorted(entries.keys() & OURS):
        path, found = home / name, entries[name].stat(follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):  # the owner's choice, for example to use another disk
            continue
        if found.st_uid not in (os.geteuid(), 0):
            advice = "remove it, or give it to this user with `chown -R`"
            sentence = f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}"
            yield Fault(path, sentence, advice)
        elif found.st_mode & OTHERS and found.st_uid == os.geteuid():
            yield Fault(
                path,
                f"{path} is open to other users",
                f"run `chmod -R go= {path}`",
                is_fixable=True,
            )


def _examine_socket_folder(settings: Settings) -> Iterator[Fault]:
    folder = settings.socket_folder
    # We never create a symbolic link, but in /tmp anybody could.
    if folder.parent != settings.home and folder.is_symlink():
        yield Fault(
            folder,
            f"{folder} is a symbolic link",
            "remove it, or set IMAGEPIPELINE_HOME to a shorter path",
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
                f"run `chmod go= {folder}`",
                is_fixable=True,
            )
    chosen = settings.code_address.parent
    if chosen != folder and chosen.exists():  # the operator chose it, so we do not change its mode
        advice = (
            "set IMAGEPIPELINE_CODE_SOCKET to a path in a folder that only this user may write to"
        )
        if fault := _find_owner_fault(chosen, advice):
            yield fault
        elif chosen.stat().st_mode & OTHERS_WRITE:
            yield Fault(chosen, f"other users may write to {chosen}", advice)


def _find_owner_fault(folder: Path, advice: str) -> Fault | None:
    """Returns the fault if another user owns the folder.

    This applies to root as well, who would leave files that the owner of the folder cannot change.
    """
    link = folder.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
        sentence = f"{folder} is a symbolic link that belongs to user {link.st_uid}"
        return Fault(folder, sentence, advice)
    if not folder.is_dir():
        return Fault(folder, f"{folder} is not a folder", advice)
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        return Fault(folder, f"{folder} belongs to user {owner}, not to {os.geteuid()}", advice)
    return None


def _close(path: Path, is_recursive: bool) -> None:
    """Removes all access of other users to a file or folder, and optionally to its content."""
    # The folder itself comes first, so that nobody can change its content during the walk.
    os.chmod(path, stat.S_IMODE(path.stat().st_mode) & ~OTHERS)
    if path.stat().st_mode & OTHERS:
        raise StackError(
            f"{path} cannot be closed to other users, because its file system stores no "
            "permissions: set IMAGEPIPELINE_HOME to a folder on another file system"
        )
    for folder, names, files in os.walk(path) if is_recursive else ():
        for name in (*names, *files):
            with contextlib.suppress(FileNotFoundError):  # a running stack may delete files
                below = os.path.join(folder, name)
                found = os.lstat(below)
                if (
                    found.st_uid == os.geteuid()
                    and found.st_mode & OTHERS
                    and not stat.S_ISLNK(found.st_mode)
                ):
                    os.chmod(below, stat.S_IMODE(found.st_mode) & ~OTHERS)


@contextlib.contextmanager
def explain_os_errors(home: Path) -> Iterator[None]:
    """Turns an OSError into a StackError that names the home and says what to do."""
    try:
        yield
    except OSError as error:
        raise StackError(
            f"{home} cannot be used as the home ({error.strerror or type(error).__name__}): "
            "set IMAGEPIPELINE_HOME to a folder that this user may write to"
        ) from None

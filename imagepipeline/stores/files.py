"""FileStore: a `Storage` in a folder on a disk.

It opens nothing outside its root, and follows no symbolic link, device or pipe.

Files are as accessible as the folder they are in, whatever the umask: who may enter the folder may
read them. Below a private home everything is private; below a folder that a web server may enter,
everything can be served.
"""

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from imagepipeline.errors import DiskFullError, MissingOriginalError, UnsafePathError
from imagepipeline.models import IMAGE_ID_PATTERN, StoredFile, check_image_id
from imagepipeline.stores.durability import sync

SETTLED_SECONDS, LEFTOVER_SECONDS = 60, 3600
# Tried first, because to list a folder of a million files takes a second.
USUAL_EXTENSIONS = tuple(
    spelling
    for extension in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "avif", "heic", "heif", "tif"),
        *("tiff", "bmp", "jxl", "svg", "bin"),
    )
    for spelling in (extension, extension.upper())
)
ENTER, WRITE = 0o011, 0o022  # mode bits of a folder for group and others


class FileStore:
    """Files below `root`, which is created by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make_root(self) -> None:
        """Creates the root with the permissions of its parent, but writable only by us."""
        _make_folder(self.root)

    def make_folder_of_originals(self) -> None:
        """Creates `original`, for apps that store the first file themselves."""
        _make_folder(self.root / "original")

    def find_originals_of(self, image_id: str) -> list[str]:
        """See `Storage.find_originals_of`."""
        found: dict[tuple[int, int], str] = {}
        with contextlib.suppress(OSError), self._open_folder(["original"]) as folder:
            for extension in USUAL_EXTENSIONS:
                name = f"{check_image_id(image_id)}.{extension}"
                with contextlib.suppress(FileNotFoundError):
                    state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    # Once, where the disk takes `a.jpg` and `a.JPG` for the same file.
                    found.setdefault((state.st_dev, state.st_ino), f"original/{name}")
        return sorted(found.values()) or self.list_originals_of(image_id)

    def list_originals_of(self, image_id: str) -> list[str]:
        """See `Storage.list_originals_of`."""
        prefix = f"{check_image_id(image_id)}."
        try:
            with self._open_folder(["original"]) as folder:
                return sorted(
                    f"original/{name}" for name in os.listdir(folder) if name.startswith(prefix)
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise MissingOriginalError(
                f"the folder original cannot be read: {_explain(error)}"
            ) from None

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """See `Storage.read`."""
        *parents, name = Path(path).parts
        try:
            with self._open_folder(parents) as folder:
                # Without O_NONBLOCK, opening a pipe would wait for a writer.
                descriptor = os.open(
                    name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder
                )
        except OSError as error:
            reason = _explain(error)
            raise MissingOriginalError(
                f"{path} cannot be opened below the storage root: {reason}"
            ) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise MissingOriginalError(f"{path} is not a plain file")
        with os.fdopen(descriptor, "rb") as file:
            return file.read(-1 if max_bytes is None else max_bytes + 1)

    def put_original(self, image_id: str, content: bytes, extension: str) -> str:
        """See `Storage.put_original`."""
        path = f"original/{check_image_id(image_id)}.{extension}"
        self.write(path, content)
        return path

    def write(self, path: str, content: bytes) -> None:
        """See `Storage.write`: a temporary file beside it is synced, renamed, its folder synced."""
        self._write(path, content, os.rename)

    def create(self, path: str, content: bytes) -> bool:
        """See `Storage.create`."""
        try:
            self._write(path, content, _rename_new)
        except FileExistsError:
            return False
        return True

    def link(self, path: str, source: Path) -> bool:
        """Makes a second name of a file on the same file system; False if `path` exists.

        Raises:
            OSError: it is on another file system, or hard links are not possible there.
        """
        *parents, name = Path(path).parts
        self.make_root()
        with self._open_folder(parents, is_created=True) as folder:
            try:
                os.link(source, name, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                return False
            os.fsync(folder)
        return True

    def _write(self, path: str, content: bytes, place: Callable[..., None]) -> None:
        *parents, name = Path(path).parts
        beside = f".{uuid.uuid4().hex}.tmp"  # without `name`, which may have the maximum length
        self.make_root()
        try:
            with self._open_folder(parents, is_created=True) as folder:
                try:
                    descriptor = os.open(
                        beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder
                    )
                    with os.fdopen(descriptor, "wb") as file:
                        entered_by = os.fstat(folder).st_mode & ENTER
                        _set_mode(descriptor, 0o600 | entered_by << 2)  # enter is 1, read is 4
                        file.write(content)
                        file.flush()
                        os.fsync(descriptor)
                    place(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(beside, dir_fd=folder)
                os.fsync(folder)  # before the only other copy may be deleted
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no room below the storage root for {path}") from error
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise UnsafePathError(
                    f"{path} cannot be written: a folder in it is a symbolic link or a file"
                ) from error
            raise

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        *parents, name = Path(path).parts
        with contextlib.suppress(FileNotFoundError), self._open_folder(parents) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            os.fsync(folder)  # also if a killed process has deleted it, and not synced

    def locate(self, path: str) -> str:
        """The file's absolute path."""
        return str(self.root / path)

    @property
    def free_bytes(self) -> int:
        """The free space of the disk."""
        made = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        return shutil.disk_usage(made).free

    def list_originals(self, with_new: bool = False) -> dict[str, StoredFile]:
        """See `Storage.list_originals`."""
        before = time.time() - SETTLED_SECONDS
        found = {}
        try:
            with self._open_folder(["original"]) as folder:
                for name in sorted(os.listdir(folder)):
                    try:
                        state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    except FileNotFoundError:  # deleted since
                        continue
                    is_settled = with_new or state.st_mtime < before
                    is_original = stat.S_ISREG(state.st_mode) and is_settled
                    if is_original and "." in name and IMAGE_ID_PATTERN.fullmatch(Path(name).stem):
                        changed_at = datetime.fromtimestamp(state.st_mtime, UTC)
                        found[Path(name).stem] = StoredFile(
                            f"original/{name}", state.st_size, changed_at=changed_at
                        )
        except FileNotFoundError:
            return found
        return found

    def list_files(self) -> Iterator[StoredFile]:
        """See `Storage.list_files`."""
        unread: list[OSError] = []
        for folder, names, files in os.walk(self.root, onerror=unread.append):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted({*names, *files}):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    state = path.lstat()
                    if stat.S_ISDIR(state.st_mode) or name.startswith("."):
                        continue
                    fault = None if stat.S_ISREG(state.st_mode) else "it is not a plain file"
                    if stat.S_ISLNK(state.st_mode):
                        fault = "it is a symbolic link, which is not followed"
                    yield StoredFile(path.relative_to(self.root).as_posix(), state.st_size, fault)
        for error in unread:
            path = Path(error.filename).relative_to(self.root)
            yield StoredFile(path.as_posix(), 0, f"the folder cannot be read: {error.strerror}")

    def list_leftovers(self) -> list[str]:
        """See `Storage.list_leftovers`."""
        before = time.time() - LEFTOVER_SECONDS
        found = []
        for path in self.root.rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # deleted since
                state = path.lstat()
                if stat.S_ISREG(state.st_mode) and state.st_mtime < before:
                    found.append(path.relative_to(self.root).as_posix())
        return found

    @contextlib.contextmanager
    def _open_folder(self, parts: Iterable[str], is_created: bool = False) -> Iterator[int]:
        """A folder, opened part by part from the root, so that no symbolic link is followed."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts:
                parent = folder
                is_new = is_created and _make_entry(part, parent)
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
                if is_new:  # mkdir applied the umask
                    _set_mode(folder, stat.S_IMODE(os.fstat(parent).st_mode))
                os.close(parent)
            yield folder
        finally:
            os.close(folder)


def _explain(error: OSError) -> str:
    """Why a file cannot be opened. Of a link, the system says `Not a directory`, or `Too many`."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return (
            "it or a folder in its path is a symbolic link, which is not followed, or a file is "
            "where a folder should be"
        )
    return error.strerror or type(error).__name__


def _set_mode(descriptor: int, mode: int) -> None:
    with contextlib.suppress(PermissionError):  # a file system without modes
        os.fchmod(descriptor, mode)


def _rename_new(source: str, name: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Renames a file, unless there is one of that name."""
    try:
        os.link(source, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileNotFoundError):
            os.lstat(name, dir_fd=dst_dir_fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(source, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def _make_entry(name: str, parent: int) -> bool:
    """Creates a folder, durably; returns False if it exists."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    os.fsync(parent)
    return True


def _make_folder(path: Path) -> None:
    """Creates a folder and its parents, durably.

    They have the modes of their parents, but are writable only by us.
    """
    if path.is_dir():
        return
    _make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        path.chmod(path.parent.stat().st_mode & ~WRITE & ~stat.S_ISVTX & 0o7777 | 0o700)
        sync(path.parent)

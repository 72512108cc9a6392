"""FileStore: originals and variants below one storage root on a local disk.

Paths are those of the contract: relative, with `/`, `original/…` or `variants/…`. Nothing outside the root is
opened, and no symbolic link, device or pipe is followed.
"""

import errno
import os
import stat
import time
import uuid
from pathlib import Path

from imagepipeline.errors import DiskFullError, MissingOriginalError
from imagepipeline.models import IMAGE_ID_PATTERN, check_image_id

SETTLED_SECONDS, LEFTOVER_SECONDS = 60, 3600


class FileStore:
    """Files below `root`, which is created when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_original(self, image_id: str) -> str:
        """The path of the one file `original/<image_id>.*`.

        Raises:
            MissingOriginalError: there is none, or more than one.
        """
        check_image_id(image_id)
        found = sorted(path.name for path in self.root.glob(f"original/{image_id}.*"))
        if len(found) == 1:
            return f"original/{found[0]}"
        if not found:
            raise MissingOriginalError(f"there is no original/{image_id}.* below the storage root")
        raise MissingOriginalError(f"{image_id} has {len(found)} originals ({', '.join(found)}): keep one")

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """The content of a file, of which at most `max_bytes + 1` bytes are read.

        Raises:
            MissingOriginalError: it is not there, or no plain file.
        """
        try:
            descriptor = self._open(path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise MissingOriginalError(f"{path} cannot be opened below the storage root: {reason}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise MissingOriginalError(f"{path} is not a plain file")
        with os.fdopen(descriptor, "rb") as file:
            return file.read(-1 if max_bytes is None else max_bytes + 1)

    def put_original(self, image_id: str, content: bytes, extension: str) -> str:
        """Stores an original as `original/<image_id>.<extension>` in place of any other of that ID; gives its path."""
        path = f"original/{check_image_id(image_id)}.{extension}"
        self.write(path, content)
        for other in self.root.glob(f"original/{image_id}.*"):
            if other.name != Path(path).name:
                other.unlink()
        return path

    def write(self, path: str, content: bytes) -> None:
        """Writes a file so that readers see the old content or the new, never a part, also after a power cut.

        Raises:
            DiskFullError: there is no room; the old content stays.
        """
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(beside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no room below the storage root for {path}") from error
            raise
        finally:
            beside.unlink(missing_ok=True)

    def list_originals(self) -> dict[str, str]:
        """The path of each `original/<image_id>.*`, by image ID, of files that were not touched for a minute."""
        before = time.time() - SETTLED_SECONDS
        found = {}
        for path in sorted(self.root.glob("original/*.*")):
            if IMAGE_ID_PATTERN.fullmatch(path.stem) and path.is_file() and path.stat().st_mtime < before:
                found[path.stem] = f"original/{path.name}"
        return found

    def list_leftovers(self) -> list[Path]:
        """What killed processes left half written: temporary files of more than an hour ago."""
        before = time.time() - LEFTOVER_SECONDS
        return [path for path in self.root.rglob(".*.tmp") if path.lstat().st_mtime < before]

    def _open(self, path: str) -> int:
        """Opens a path part by part from the root down, so that no link in it is followed."""
        directory = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        *parents, name = Path(path).parts
        try:
            for parent in parents:
                parent_directory = directory
                directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_directory)
                os.close(parent_directory)
            # Without O_NONBLOCK, opening a pipe would wait for its writer for ever.
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        finally:
            os.close(directory)

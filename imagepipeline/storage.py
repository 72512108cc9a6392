"""Storage of originals and variants. A backend can be written from this module alone.

`FileStore` (a folder) and `ObjectStore` (a bucket) are the two there are.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from imagepipeline.errors import MissingOriginalError
from imagepipeline.models import StoredFile
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.objects import ObjectStore


class Storage(Protocol):
    """Files by path, below one root.

    Paths are relative, use `/`, and begin with `original/` or `variants/`. Callers have checked
    them; a backend still opens nothing outside its root, for instance through a symbolic link.

    - **Atomicity:** a write or delete happens whole or not at all. Readers see the old content or
      the new, never a part, also when the writer is killed or the power fails.
    - **Visibility:** when `write` or `delete` has returned, it is durable, and every later read and
      list sees it, in any process on any machine.
    - **Ordering:** of several writes to one path, the last to finish stays. Nothing is promised
      between paths: the catalogue, not the storage, says which files belong together.
    - **Repetition:** every method is safe to repeat after an error or a crash, and to run twice at
      once. A crash leaves at most what `list_leftovers` finds.
    - **Concurrency:** processes are forked after a backend was made, and methods are called from
      several threads. So making one connects to nothing.
    - **Errors:** beside those named at each method, every method may raise StorageDownError if the
      backend does not answer or denies access: the image waits and no attempt is used. Messages
      name the path, never an address or credentials.
    """

    @property
    def free_bytes(self) -> int | None:
        """How much can still be written; None if there is no limit."""

    def find_originals_of(self, image_id: str) -> list[str]:
        """As `list_originals_of`, in the same time however many files there are.

        It may miss files with unusual extensions beside one with a usual extension.
        """

    def list_originals_of(self, image_id: str) -> list[str]:
        """The paths of all `original/<image_id>.*`, sorted; empty if there are none.

        Raises:
            InvalidUploadError: it is not an image ID; nothing was looked up.
            MissingOriginalError: the folder cannot be read.
        """

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """The content; of a longer one the first `max_bytes + 1` bytes, so that callers notice.

        No more than that may be held in memory.

        Raises:
            MissingOriginalError: there is no plain file at that path.
        """

    def put_original(self, image_id: str, content: bytes, extension: str) -> str:
        """Writes `original/<image_id>.<extension>`, over an older one if any, and returns its path.

        Raises:
            InvalidUploadError: it is not an image ID; nothing was written.
            DiskFullError: as `write`.
        """

    def write(self, path: str, content: bytes) -> None:
        """Writes a file, over an older one if any; a missing folder is created.

        If the backend serves files to browsers, a variant gets the MIME type of its format
        (`output_formats`) and an original one that browsers do not show, such as
        `application/octet-stream`.

        Raises:
            DiskFullError: there is no room. The old content stays, the image waits.
            UnsafePathError: the path leads through a link or a file.
        """

    def create(self, path: str, content: bytes) -> bool:
        """Writes a file as `write` does, or returns False if there is one already."""

    def delete(self, path: str) -> None:
        """Deletes a file; does nothing if there is none."""

    def locate(self, path: str) -> str:
        """Where a file is, as people write it: an absolute path or a URL without credentials."""

    def list_originals(self, with_new: bool = False) -> dict[str, StoredFile]:
        """Each `original/<image_id>.<extension>`, with `changed_at`, by image ID.

        Left out are files in folders, names that are not image IDs, and unless `with_new`, files
        that were written within the last minute: their uploader may be about to push them.
        """

    def list_files(self) -> Iterator[StoredFile]:
        """All files below the root, but none whose name, or a folder's, begins with a dot.

        What cannot be read, such as a symbolic link, comes with its fault.
        """

    def list_leftovers(self) -> list[str]:
        """Temporary files of killed writers, over an hour old; `delete` accepts their paths."""


def open_storage(root: str) -> Storage:
    """The storage at a folder, or at a `file://`, `s3://`, `gs://` or `az://` URL."""
    if "://" in root and not root.startswith("file://"):
        return ObjectStore(root)
    return FileStore(Path(root.removeprefix("file://")))


def hash_original(files: Storage, path: str) -> str | None:
    """The SHA-256 of a stored original, as hexadecimal digits; None if it is missing."""
    try:
        return hashlib.sha256(files.read(path)).hexdigest()
    except MissingOriginalError:
        return None

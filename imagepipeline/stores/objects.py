"""ObjectStore: a `Storage` in a bucket on S3, Google Cloud Storage or Azure.

A put is atomic in a bucket, so no temporary file is needed. Credentials are found as the cloud's
own tools find them: in the environment, or from the machine.
"""

import contextlib
import functools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from imagepipeline.errors import MissingOriginalError, StorageDownError
from imagepipeline.models import IMAGE_ID_PATTERN, StoredFile, check_image_id
from imagepipeline.output_formats import OUTPUT_FORMATS

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore as Bucket

SETTLED = timedelta(seconds=60)
TIMEOUT_SECONDS, RETRIES = 30, 3
CHUNK_BYTES = 10_000_000
# Only variants get a type that browsers show. Originals come from strangers and get none.
CONTENT_TYPES = {f".{one.suffix}": one.mime_type for one in OUTPUT_FORMATS.values()}


class ObjectStore:
    """Objects below `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`."""

    free_bytes = None  # a bucket has no limit

    def __init__(self, url: str) -> None:
        self._url = url

    def find_originals_of(self, image_id: str) -> list[str]:
        """See `Storage.find_originals_of`; a bucket lists by prefix."""
        return self.list_originals_of(image_id)

    def list_originals_of(self, image_id: str) -> list[str]:
        """See `Storage.list_originals_of`."""
        found = []
        # Starts after the longer IDs `<image_id>-…`, of which there may be many.
        for entry in self._list("original", offset=f"original/{check_image_id(image_id)}-~"):
            if not entry["path"].startswith(f"original/{image_id}."):
                break
            found.append(entry["path"])
        return found

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """See `Storage.read`."""
        content = bytearray()
        with _talking(path):
            # A chunk is read whole, so it must not be much more than what is asked for.
            chunk_bytes = min(CHUNK_BYTES, max_bytes + 1) if max_bytes is not None else CHUNK_BYTES
            for chunk in self._bucket.get(path).stream(min_chunk_size=chunk_bytes):
                content += chunk
                if max_bytes is not None and len(content) > max_bytes:
                    break
        return bytes(content if max_bytes is None else content[: max_bytes + 1])

    def put_original(self, image_id: str, content: bytes, extension: str) -> str:
        """See `Storage.put_original`."""
        path = f"original/{check_image_id(image_id)}.{extension}"
        self.write(path, content)
        return path

    def write(self, path: str, content: bytes) -> None:
        """See `Storage.write`."""
        self._put(path, content, "overwrite")

    def create(self, path: str, content: bytes) -> bool:
        """See `Storage.create`."""
        from obstore.exceptions import AlreadyExistsError

        with contextlib.suppress(AlreadyExistsError):
            self._put(path, content, "create")
            return True
        return False

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with _talking(path), contextlib.suppress(FileNotFoundError):
            self._bucket.delete(path)

    def locate(self, path: str) -> str:
        """The object's URL."""
        return f"{self._url}/{path}"

    def list_originals(self, with_new: bool = False) -> dict[str, StoredFile]:
        """See `Storage.list_originals`."""
        before = datetime.now(UTC) - SETTLED
        found = {}
        for entry in self._list("original"):
            name = PurePosixPath(entry["path"])
            is_direct = len(name.parts) == 2 and name.suffix
            is_settled = with_new or entry["last_modified"] < before
            if is_direct and is_settled and IMAGE_ID_PATTERN.fullmatch(name.stem):
                found[name.stem] = StoredFile(
                    entry["path"], entry["size"], changed_at=entry["last_modified"]
                )
        return found

    def list_files(self) -> Iterator[StoredFile]:
        """See `Storage.list_files`."""
        for entry in self._list(None):
            if not any(part.startswith(".") for part in entry["path"].split("/")):
                yield StoredFile(entry["path"], entry["size"])

    def list_leftovers(self) -> list[str]:
        """An empty list: a put leaves no temporary file."""
        return []

    def _put(self, path: str, content: bytes, mode: Literal["create", "overwrite"]) -> None:
        kind = CONTENT_TYPES.get(PurePosixPath(path).suffix, "application/octet-stream")
        options: Any = {"attributes": {"Content-Type": kind}, "mode": mode}
        with _talking(path):
            # Not in parts: those of a killed writer would stay, cost money and be hard to see.
            self._bucket.put(path, content, use_multipart=False, **options)

    def _list(self, folder: str | None, offset: str | None = None) -> "Iterator[ObjectMeta]":
        with _talking(folder or "the list of objects"):
            for page in self._bucket.list(folder, offset=offset):
                yield from page

    @functools.cached_property
    def _bucket(self) -> "Bucket":
        return open_bucket(self._url)


def open_bucket(url: str) -> "Bucket":
    """Obstore's client for a URL; it connects when first used."""
    from obstore.store import from_url

    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    return from_url(
        url,
        # Plain HTTP is used only if the operator sets such an address in AWS_ENDPOINT_URL.
        client_options={"timeout": timeout, "allow_http": True},
        retry_config={"max_retries": RETRIES, "retry_timeout": timeout},
    )


@contextlib.contextmanager
def _talking(path: str) -> Iterator[None]:
    from obstore.exceptions import AlreadyExistsError, BaseError

    try:
        yield
    except AlreadyExistsError:
        raise
    except FileNotFoundError:
        raise MissingOriginalError(f"{path} is not below the storage root") from None
    except (BaseError, PermissionError) as error:  # their texts contain addresses and replies
        raise StorageDownError(
            f"the object store does not serve {path} ({type(error).__name__})"
        ) from None

"""ObjectStore: a `Storage` in a bucket on S3, Google Cloud Storage or Azure.

A put is atomic in a bucket, so no temporary file is needed. Credentials are found as the cloud's
own tools find them: in the environment, or from the machine.
"""

import contextlib
import functools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from imagepipeline.errors import MissingOriginalError, StorageDownError
from imagepipeline.models import IMAGE_ID_PATTERN, check_image_id
from imagepipeline.output_formats import OUTPUT_FORMATS

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

SETTLED = timedelta(seconds=60)
TIMEOUT_SECONDS, RETRIES = 30, 3
# Only variants get a type that browsers show. Originals come from strangers and get none.
CONTENT_TYPES = {f".{one.name}": one.mime_type for one in OUTPUT_FORMATS.values()}


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
        for path, _ in self._list("original", offset=f"original/{check_image_id(image_id)}-~"):
            if not path.startswith(f"original/{image_id}."):
                break
            found.append(path)
        return found

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """See `Storage.read`."""
        content = bytearray()
        with _talking(path):
            for chunk in self._bucket.get(path).stream():
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
        kind = CONTENT_TYPES.get(PurePosixPath(path).suffix, "application/octet-stream")
        with _talking(path):
            # Not in parts: those of a killed writer would stay, cost money and be hard to see.
            self._bucket.put(path, content, attributes={"Content-Type": kind}, use_multipart=False)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with _talking(path), contextlib.suppress(FileNotFoundError):
            self._bucket.delete(path)

    def locate(self, path: str) -> str:
        """The object's URL."""
        return f"{self._url}/{path}"

    def list_originals(self) -> dict[str, str]:
        """See `Storage.list_originals`."""
        before = datetime.now(UTC) - SETTLED
        found = {}
        for path, modified in self._list("original", offset=None):
            name = PurePosixPath(path)
            is_direct = len(name.parts) == 2 and name.suffix
            if is_direct and modified < before and IMAGE_ID_PATTERN.fullmatch(name.stem):
                found[name.stem] = path
        return found

    def list_leftovers(self) -> list[str]:
        """An empty list: a put leaves no temporary file."""
        return []

    def _list(self, folder: str, offset: str | None) -> Iterator[tuple[str, datetime]]:
        with _talking(folder):
            for page in self._bucket.list(folder, offset=offset):
                for entry in page:
                    yield entry["path"], entry["last_modified"]

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
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise MissingOriginalError(f"{path} is not below the storage root") from None
    except (BaseError, PermissionError) as error:  # their texts contain addresses and replies
        raise StorageDownError(
            f"the object store does not serve {path} ({type(error).__name__})"
        ) from None

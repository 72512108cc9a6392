"""The embedding index, for search by meaning. A backend can be written from this module alone.

`stores.vectors.EmbeddingIndex` (LanceDB) is the one there is; `resident.ResidentIndex` passes on
what runs need of it.
"""

from typing import Any, Protocol

from imagepipeline.models import Claim, Embedding, Neighbour


class EmbeddingStore(Protocol):
    """What a run needs: one row for each image and embedding version.

    - **Atomicity:** an upsert happens whole or not at all, also when the writer is killed.
    - **Visibility:** when `upsert` has returned, the row is durable, and every later `get` and
      search sees it, in any process on any machine.
    - **Ordering:** the highest fence wins, whatever the order of arrival. A row is never replaced
      by a claim with a lower fence; a claim with the same fence replaces its own row.
    - **Repetition:** every method is safe to repeat after an error or a crash, with the same claim.
    - **Concurrency:** any number of processes and machines write at once, also the first row of a
      new version. Making an index connects to nothing, as processes are forked afterwards.
    - **Errors:** any error not named here counts as unexpected, which a run tries three times.
    """

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """Stores the claimed image's embedding in place of the one of the same version, if any.

        Rows of other versions stay.

        Raises:
            StaleClaimError: the row has a higher fence; it is unchanged.
            ProviderRejectedError: rows of this version have vectors of another length.
            DiskFullError: there is no room; the image waits.
        """

    def get(self, image_id: str, version: str) -> dict[str, Any] | None:
        """An image's row of that version, or None.

        Its keys are `image_id`, `generation`, `fence`, `model` (the version), `text`, `vector`.

        Raises:
            InvalidUploadError: it is not an image ID.
        """


class SearchIndex(EmbeddingStore, Protocol):
    """What commands need beside that."""

    def nearest(self, query: Embedding, count: int) -> list[Neighbour]:
        """Up to `count` images by cosine similarity, nearest first.

        Only rows of the query's version are compared; none if there are no such rows.
        """

    def nearest_other(self, image_id: str, version: str) -> Neighbour | None:
        """The image nearest to another one among those of that version, or None."""

    def list_dimensions(self, version: str) -> list[int]:
        """The lengths of the vectors of that version: none, one, or more if its model changed."""

    def count_rows(self, version: str | None = None) -> int:
        """The number of rows of a version, or of all."""


def open_index(uri: str) -> SearchIndex:
    """The index in a folder, or at an `s3://`, `gs://` or `az://` URL."""
    from imagepipeline.stores.vectors import EmbeddingIndex

    return EmbeddingIndex(uri)

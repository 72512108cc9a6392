"""EmbeddingIndex: image embeddings in LanceDB, one table per embedding version and number of dimensions.

lancedb and pyarrow are imported where they are used: together they take two seconds and start threads.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

from imagepipeline.errors import ProviderRejectedError, StaleClaimError
from imagepipeline.models import Claim, Embedding, check_image_id

# Without it, five writers of the same new ID leave five rows. In the schema, so that no table exists without it.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True)
class Neighbour:
    """An image near a query; `score` is the cosine similarity, -1..1, higher is nearer."""

    image_id: str
    score: float
    text: str


class EmbeddingIndex:
    """The LanceDB at `uri`, a folder or a URL; a table is created by the first upsert into it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def upsert(self, claim: Claim, embedding: Embedding) -> None:
        """Stores the claimed image's embedding in place of any older one of the same version.

        Raises:
            StaleClaimError: a later claim has already written; the table is unchanged.
            ProviderRejectedError: the model gives vectors of another length than before.
        """
        import pyarrow as pa

        known = self.list_dimensions(embedding.version)
        if known and len(embedding.vector) not in known:
            raise ProviderRejectedError(
                f"{embedding.version} gave {len(embedding.vector)} dimensions, the index holds {known[0]}: the model "
                "behind the name has changed, so give it another IMAGEPIPELINE_EMBEDDING_MODEL"
            )
        table = self._open_or_create(embedding)
        row = {
            "image_id": claim.image_id,
            "generation": claim.generation,
            "fence": claim.fence,
            "model": embedding.version,
            "text": embedding.text,
            "vector": list(embedding.vector),
        }
        result = (
            table.merge_insert("image_id")
            .when_matched_update_all(where="target.fence <= source.fence")
            .when_not_matched_insert_all()
            .use_index(False)  # with a scalar index, writers of the same new ID leave one row each
            .execute(pa.Table.from_pylist([row], schema=table.schema))
        )
        if result.num_inserted_rows + result.num_updated_rows == 0:
            raise StaleClaimError(f"the index holds a later embedding of {claim.image_id}")

    def get(self, image_id: str, version: str) -> dict[str, Any] | None:
        """An image's row of that version (image_id, generation, fence, model, text, vector), or None."""
        where = f"image_id = '{check_image_id(image_id)}'"
        for name in self._table_names():
            if name.startswith(_table_prefix(version)):
                rows: list[dict[str, Any]] = self._database.open_table(name).search().where(where).limit(1).to_list()
                if rows:
                    return rows[0]
        return None

    def list_dimensions(self, version: str) -> list[int]:
        """The numbers of dimensions of the vectors of that version; more than one if its model has changed."""
        prefix = _table_prefix(version)
        return [int(name.removeprefix(prefix)) for name in self._table_names() if name.startswith(prefix)]

    def count_rows(self) -> int:
        """The number of embeddings, of all versions."""
        return sum(self._database.open_table(name).count_rows() for name in self._table_names())

    def nearest(self, query: Embedding, count: int) -> list[Neighbour]:
        """Up to `count` images, nearest first, among those embedded with the query's version."""
        if _table_name(query) not in self._table_names():
            return []
        table = self._database.open_table(_table_name(query))
        rows = table.search(list(query.vector)).distance_type("cosine").limit(count).to_list()
        return [Neighbour(row["image_id"], 1 - row["_distance"], row["text"]) for row in rows]

    def nearest_other(self, image_id: str, version: str) -> Neighbour | None:
        """The image nearest to another one, or None if there is none."""
        row = self.get(image_id, version)
        if row is None:
            return None
        found = self.nearest(Embedding(row["text"], tuple(row["vector"]), version), count=2)
        return next((neighbour for neighbour in found if neighbour.image_id != image_id), None)

    @functools.cached_property
    def _database(self) -> Any:
        import lancedb

        return lancedb.connect(self._uri)

    def _table_names(self) -> list[str]:
        return list(self._database.list_tables(limit=1000).tables)

    def _open_or_create(self, embedding: Embedding) -> Any:
        import pyarrow as pa

        schema = pa.schema(
            [
                pa.field("image_id", pa.string(), nullable=False, metadata=PRIMARY_KEY),
                pa.field("generation", pa.int64()),
                pa.field("fence", pa.int64()),
                pa.field("model", pa.string()),
                pa.field("text", pa.string()),
                pa.field("vector", pa.list_(pa.float32(), len(embedding.vector))),
            ]
        )
        return self._database.create_table(_table_name(embedding), schema=schema, exist_ok=True)


def _table_name(embedding: Embedding) -> str:
    return f"{_table_prefix(embedding.version)}{len(embedding.vector)}"


def _table_prefix(version: str) -> str:
    return "embeddings_" + re.sub(r"[^A-Za-z0-9]+", "-", version) + "_"

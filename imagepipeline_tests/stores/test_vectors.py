"""One row per image, the latest claim wins, and the nearest come first."""

import contextlib
import logging
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagepipeline.errors import InvalidUploadError, ProviderRejectedError, StaleClaimError
from imagepipeline.models import Claim, Embedding
from imagepipeline.stores import vectors
from imagepipeline.stores.vectors import BatchingIndex, EmbeddingIndex


def claim(image_id, fence=1):
    return Claim(image_id, 1, fence, None)


def embedding(*vector, text="t", version="local:m"):
    return Embedding(text, vector, version)


def test_the_nearest_come_first_with_their_cosine(index):
    index.upsert(claim("east"), embedding(1.0, 0.0))
    index.upsert(claim("north"), embedding(0.0, 1.0))
    index.upsert(claim("west"), embedding(-1.0, 0.0))
    found = index.nearest(embedding(0.6, 0.8), 3)
    assert [(neighbour.image_id, round(neighbour.score, 4)) for neighbour in found] == [
        ("north", 0.8),
        ("east", 0.6),
        ("west", -0.6),
    ]
    assert index.nearest_other("east", "local:m").image_id == "north"


def test_an_image_has_one_row_and_it_is_the_latest(index):
    index.upsert(claim("a"), embedding(1.0, 0.0, text="old"))
    index.upsert(claim("a", fence=2), embedding(0.0, 1.0, text="new"))
    assert [neighbour.text for neighbour in index.nearest(embedding(1.0, 0.0), 9)] == ["new"]
    row = index.get("a", "local:m")
    assert (row["fence"], row["model"]) == (2, "local:m")


def test_the_same_claim_may_write_twice_and_an_older_one_never(index):
    index.upsert(claim("a", fence=5), embedding(1.0, 0.0))
    index.upsert(claim("a", fence=5), embedding(1.0, 0.0, text="again"))
    with pytest.raises(StaleClaimError):
        index.upsert(claim("a", fence=4), embedding(0.0, 1.0, text="late"))
    assert index.get("a", "local:m")["text"] == "again"


def test_models_are_kept_apart_and_one_that_changes_its_width_is_refused(index):
    index.upsert(claim("a"), embedding(1.0, 0.0))
    index.upsert(claim("b"), embedding(1.0, 0.0, version="openai:x"))
    with pytest.raises(ProviderRejectedError, match="3 dimensions, the index holds 2"):
        index.upsert(claim("c"), embedding(1.0, 0.0, 0.0))
    assert [neighbour.image_id for neighbour in index.nearest(embedding(1.0, 0.0), 9)] == ["a"]
    assert index.get("b", "local:m") is None


def test_an_empty_index_has_no_answers(index):
    assert index.nearest(embedding(1.0, 0.0), 9) == []
    assert index.get("a", "local:m") is None
    assert index.nearest_other("a", "local:m") is None


def test_an_id_that_is_none_never_reaches_a_query(index):
    index.upsert(claim("a"), embedding(1.0, 0.0))
    with pytest.raises(InvalidUploadError):
        index.get("a' OR 1=1 --", "local:m")


WRITERS, IMAGES = 3, 12


def write(uri, number, begin, log_path):
    """What a machine's resident does: images of its own, and one in turn that all write under fences of their own."""
    logging.basicConfig(filename=log_path, level=logging.WARNING)
    index = BatchingIndex(uri)
    begin.wait()
    for image in range(IMAGES):
        index.upsert(claim(f"own-{number}-{image}"), embedding(1.0, float(image)))
        with contextlib.suppress(StaleClaimError):
            index.upsert(claim(f"shared-{image}", fence=number + 1), embedding(1.0, float(number)))


@pytest.fixture(params=["folder", "bucket"])
def uri(request, tmp_path):
    return (
        str(tmp_path / "index")
        if request.param == "folder"
        else request.getfixturevalue("bucket_url")
    )


@pytest.mark.stack
def test_machines_that_begin_and_compact_an_index_together_lose_no_row_and_leave_one_an_image(
    uri, tmp_path
):
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(WRITERS)
    arguments = [(uri, number, begin, tmp_path / f"{number}.log") for number in range(WRITERS)]
    writers = [context.Process(target=write, args=one) for one in arguments]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    index = EmbeddingIndex(uri)
    [name] = index._table_names()
    table = index._database.open_table(name)
    rows = table.search().select(["image_id", "fence"]).limit(1000).to_list()
    own = {(f"own-{number}-{image}", 1) for number in range(WRITERS) for image in range(IMAGES)}
    shared = {
        (f"shared-{image}", WRITERS) for image in range(IMAGES)
    }  # the highest fence, whoever came last
    assert sorted((row["image_id"], row["fence"]) for row in rows) == sorted(own | shared)
    assert table.stats()["fragment_stats"]["num_fragments"] < WRITERS * IMAGES
    assert [path.read_text() for *_, path in arguments] == [
        ""
    ] * WRITERS  # a compaction in vain is no news


def test_a_table_that_many_create_at_once_is_created_once(uri):
    """Also if each has seen that there is none."""
    index = EmbeddingIndex(uri)
    with ThreadPoolExecutor(8) as creators:
        begin = threading.Barrier(8)

        def create(number):
            begin.wait()
            vectors.create_table(uri, "embeddings_local-m_2", vectors.build_schema(2))
            index.upsert(claim(f"i{number}"), embedding(1.0, float(number)))

        list(creators.map(create, range(8)))
    assert index.count_rows() == 8

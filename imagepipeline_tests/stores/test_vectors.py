"""The index has one row per image, the latest claim wins, and searches rank by similarity."""

import contextlib
import logging
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from imagepipeline.errors import InvalidUploadError, ProviderRejectedError, StaleClaimError
from imagepipeline.models import Claim, Embedding
from imagepipeline.stores import vectors
from imagepipeline.stores.vectors import BatchingIndex, EmbeddingIndex


def claim(image_id, fence=1):
    return Claim(image_id, 1, fence, None)


def embedding(*vector, text="t", version="local:m"):
    return Embedding(text, vector, version)


def test_the_nearest_images_come_first_with_their_cosine_similarity(index):
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


def test_the_size_of_an_index_is_known_without_lancedb(index, tmp_path):
    import lancedb

    uri = str(tmp_path / "lancedb")
    assert vectors.measure_files(uri) == vectors.measure_files("s3://bucket/lancedb") == {}
    for image_id in "abc":
        index.upsert(claim(image_id), embedding(1.0, 0.0))
    measured = vectors.measure_files(uri)
    database = lancedb.connect(uri)
    [name] = database.list_tables().tables
    stats = database.open_table(name).stats()
    assert measured["fragment_count"] == stats["fragment_stats"]["num_fragments"] == 3
    assert measured["index_bytes"] > 3 * 8


def test_an_image_has_only_its_latest_row(index):
    index.upsert(claim("a"), embedding(1.0, 0.0, text="old"))
    index.upsert(claim("a", fence=2), embedding(0.0, 1.0, text="new"))
    assert [neighbour.text for neighbour in index.nearest(embedding(1.0, 0.0), 9)] == ["new"]
    row = index.get("a", "local:m")
    assert (row["fence"], row["model"]) == (2, "local:m")


def test_a_claim_may_write_twice_but_an_older_one_may_not(index):
    index.upsert(claim("a", fence=5), embedding(1.0, 0.0))
    index.upsert(claim("a", fence=5), embedding(1.0, 0.0, text="again"))
    with pytest.raises(StaleClaimError):
        index.upsert(claim("a", fence=4), embedding(0.0, 1.0, text="late"))
    assert index.get("a", "local:m")["text"] == "again"


def test_models_are_separate_and_a_change_of_dimensions_is_refused(index):
    index.upsert(claim("a"), embedding(1.0, 0.0))
    index.upsert(claim("b"), embedding(1.0, 0.0, version="openai:x"))
    with pytest.raises(ProviderRejectedError, match="3 dimensions, the index holds 2"):
        index.upsert(claim("c"), embedding(1.0, 0.0, 0.0))
    assert [neighbour.image_id for neighbour in index.nearest(embedding(1.0, 0.0), 9)] == ["a"]
    assert index.get("b", "local:m") is None


def test_an_empty_index_returns_nothing(index):
    assert index.nearest(embedding(1.0, 0.0), 9) == []
    assert index.get("a", "local:m") is None
    assert index.nearest_other("a", "local:m") is None


def test_an_invalid_id_never_reaches_a_query(index):
    index.upsert(claim("a"), embedding(1.0, 0.0))
    with pytest.raises(InvalidUploadError):
        index.get("a' OR 1=1 --", "local:m")


WRITERS, IMAGES = 3, 12


def test_after_the_last_write_an_index_is_a_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "READERS_PATIENCE", timedelta(milliseconds=300))
    index = BatchingIndex(str(tmp_path))
    for number in range(25):
        index.upsert(claim(f"image-{number}"), embedding(float(number), 1.0))
    deadline = time.monotonic() + 60
    while len([path for path in tmp_path.rglob("*") if path.is_file()]) > 6:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(index.nearest(embedding(1.0, 0.0), 99)) == 25


def test_what_an_index_has_stored_or_erased_is_durable(tmp_path, check_durable, monkeypatch):
    top = tmp_path / "top"
    top.mkdir()
    index = EmbeddingIndex(str(top / "lancedb"))
    for image_id in "abab":
        index.upsert(claim(image_id), embedding(1.0, 0.0))
        check_durable(top)
    monkeypatch.setattr(vectors, "SETTLE_SECONDS", 0)
    index.erase(["a"])
    check_durable(top)


def test_compaction_removes_no_file_before_its_own_files_are_durable(
    tmp_path, check_durable, monkeypatch
):
    monkeypatch.setattr(vectors, "READERS_PATIENCE", timedelta(milliseconds=100))
    monkeypatch.setattr(BatchingIndex, "_tidy_later", lambda _: None)
    index = BatchingIndex(str(tmp_path / "lancedb"))
    for number in range(6):
        index.upsert(claim(f"image-{number}"), embedding(float(number), 1.0))
    written = set(tmp_path.rglob("data/*"))
    for are_left in (True, False):
        time.sleep(0.3)  # so that nobody reads them any more
        index._tidy()
        found = set(tmp_path.rglob("data/*"))
        assert (found > written) if are_left else (len(found) == 1)
        check_durable(tmp_path / "lancedb")
    assert len(index.nearest(embedding(1.0, 0.0), 99)) == 6


def write(uri, number, begin, log_path):
    """Writes like the resident of a machine: its own images, and shared ones with its own fence."""
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
def test_machines_that_create_and_compact_an_index_together_lose_no_row(uri, tmp_path):
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
    shared = {(f"shared-{image}", WRITERS) for image in range(IMAGES)}  # the highest fence wins
    assert sorted((row["image_id"], row["fence"]) for row in rows) == sorted(own | shared)
    assert table.stats()["fragment_stats"]["num_fragments"] < WRITERS * IMAGES
    # A compaction that loses a race is not logged.
    assert [path.read_text() for *_, path in arguments] == [""] * WRITERS


def test_a_table_created_by_many_at_once_is_created_once(uri):
    """This also holds if each has found that there is no table."""
    index = EmbeddingIndex(uri)
    with ThreadPoolExecutor(8) as creators:
        begin = threading.Barrier(8)

        def create(number):
            begin.wait()
            vectors.create_table(uri, "embeddings_local-m_2", vectors.build_schema(2))
            index.upsert(claim(f"i{number}"), embedding(1.0, float(number)))

        list(creators.map(create, range(8)))
    assert index.count_rows() == 8

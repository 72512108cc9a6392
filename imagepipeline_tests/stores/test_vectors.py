"""One row per image, the latest claim wins, and the nearest come first."""

import multiprocessing

import pytest

from imagepipeline.errors import InvalidUploadError, ProviderRejectedError, StaleClaimError
from imagepipeline.models import Claim, Embedding
from imagepipeline.stores.vectors import EmbeddingIndex


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


def write_ten(uri, fence):
    index = EmbeddingIndex(uri)
    for number in range(10):
        try:
            index.upsert(claim(f"i{number}", fence), embedding(float(fence), 1.0))
        except StaleClaimError:
            continue


def test_writers_of_the_same_new_images_leave_one_row_each_of_the_highest_fence(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_ten, args=(str(tmp_path), fence)) for fence in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    index = EmbeddingIndex(str(tmp_path))
    assert len(index.nearest(embedding(1.0, 1.0), 100)) == 10
    assert {index.get(f"i{number}", "local:m")["fence"] for number in range(10)} == {3}

"""An erased vector is in no file of the index, also while others write."""

import random
import struct
import threading
from pathlib import Path

import pytest

from imagepipeline.models import Claim, Embedding
from imagepipeline.stores import vectors
from imagepipeline.stores.vectors import BatchingIndex

ERASED = 8


@pytest.fixture(autouse=True)
def no_readers(monkeypatch):
    monkeypatch.setattr(vectors, "SETTLE_SECONDS", 0)


def make_write(number, fence=1):
    numbers = random.Random(1000 * number + fence)
    vector = tuple(numbers.random() for _ in range(64))
    return Claim(f"image{number}", 1, fence, None), Embedding(f"text {number}", vector, "m")


def find(folder, *embeddings):
    """The files that contain one of the vectors."""
    contents = [struct.pack("<64f", *embedding.vector) for embedding in embeddings]
    return [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and any(content in path.read_bytes() for content in contents)
    ]


@pytest.mark.parametrize("commits", [1, 30])
def test_an_erased_vector_and_its_old_versions_are_in_no_file(index, tmp_path, commits):
    writes = [make_write(number) for number in range(30)]
    for first in range(commits):
        index.upsert_all(writes[first::commits])
    newer = make_write(3, fence=2)
    index.upsert(*newer)
    victims = (writes[3][1], newer[1], writes[4][1])
    assert find(tmp_path / "lancedb", *victims)
    assert index.count_rows_of(["image3", "image4", "unknown"]) == 2
    index.erase(["image3", "image4", "unknown"])
    assert find(tmp_path / "lancedb", *victims) == []
    assert index.count_rows() == 28
    assert index.get("image5", "m")["fence"] == 1
    index.upsert(*make_write(3))  # it may come back
    assert index.count_rows() == 29


def test_uploads_go_on_while_vectors_are_erased(index, tmp_path):
    uri = str(tmp_path / "lancedb")
    index.upsert_all([make_write(number) for number in range(20)])
    writer, ended = BatchingIndex(uri), threading.Event()
    problems, written = [], [100]

    def write():
        try:
            while not ended.is_set():
                writer.upsert(*make_write(written[-1]))
                written.append(written[-1] + 1)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    for number in range(ERASED):
        index.erase([f"image{number}"])
    ended.set()
    thread.join()
    assert problems == []
    last = written[-1]
    assert last > 100
    assert index.count_rows() == 20 - ERASED + last - 100
    assert find(uri, *(make_write(number)[1] for number in range(ERASED))) == []

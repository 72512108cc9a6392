"""The resident works for runs as their own models and index would, and reports its failures."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagepipeline.errors import DiskFullError, ResidentDownError, StaleClaimError
from imagepipeline.models import Claim, Embedding
from imagepipeline.resident import ERRORS, ResidentEmbedder, ResidentIndex, serve
from imagepipeline.runtime import services
from imagepipeline.runtime.services import answers_socket
from imagepipeline.runtime.worker import RESIDENT_COMMAND
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.settings import Settings
from imagepipeline.stores.vectors import BatchingIndex, EmbeddingIndex
from imagepipeline.wire import HEADER, describe_error, restore_error

pytestmark = pytest.mark.stack


def claim(image_id, fence=1):
    return Claim(image_id, 1, fence, None)


def embedding(*vector, version="local:m"):
    return Embedding("t", vector, version)


@pytest.fixture
def resident(tmp_path):
    """The address and the process of a resident with its index in `tmp_path`/index."""
    address = str(tmp_path / "resident.sock")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(address, str(tmp_path / "index")), daemon=True)
    process.start()
    while not answers_socket(Path(address)):
        assert process.is_alive()
        time.sleep(0.02)
    yield address, process
    process.kill()


def test_embeddings_sent_to_the_resident_are_in_the_index(resident, tmp_path):
    index = ResidentIndex(resident[0])
    with ThreadPoolExecutor(8) as runs:
        list(
            runs.map(
                lambda number: index.upsert(claim(f"i{number}"), embedding(1.0, float(number))),
                range(24),
            )
        )
    assert EmbeddingIndex(str(tmp_path / "index")).count_rows() == 24
    assert index.get("i7", "local:m")["vector"] == [1.0, 7.0]


def test_a_refusal_reaches_the_caller_unchanged(resident):
    index = ResidentIndex(resident[0])
    index.upsert(claim("a", fence=2), embedding(1.0, 0.0))
    with pytest.raises(StaleClaimError, match="a later embedding of a"):
        index.upsert(claim("a", fence=1), embedding(0.0, 1.0))


def test_the_residents_models_give_the_same_results(resident):
    assert ResidentEmbedder(resident[0]).embed("a cat") == LocalEmbedder().embed("a cat")


def test_without_a_resident_the_image_waits(resident, tmp_path):
    with pytest.raises(ResidentDownError, match="the worker restarts it"):
        ResidentIndex(str(tmp_path / "nobody.sock")).get("a", "local:m")
    address, process = resident
    stopped = ResidentIndex(address)
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(ResidentDownError):
        stopped.get("a", "local:m")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_malformed_request_is_not_answered_and_runs_no_code(resident, tmp_path):
    address, process = resident
    attack = pickle.dumps(("get", (Attack(str(tmp_path / "attacked")),)))
    framed = HEADER.pack(len(attack), 0) + attack
    for data in (struct.pack("!i", len(attack)) + attack, framed, HEADER.pack(2**31, 2**40)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # the rest was not read
                assert connection.recv(1) == b""
    for name, arguments in (
        ("nothing", ()),
        ("get", ()),
        ("get", ("a", "b", "c")),
        ("upsert", ("a", "b")),
    ):
        with pytest.raises(ResidentDownError):
            ResidentIndex(address).call(name, None, *arguments)
    assert not (tmp_path / "attacked").exists()
    assert process.is_alive()
    assert ResidentIndex(address).get("a", "local:m") is None


def test_the_resident_ends_with_the_process_that_started_it(tmp_path):
    settings = Settings.load({"IMAGEPIPELINE_HOME": str(tmp_path)})
    services.prepare(settings)
    environment = os.environ | {"IMAGEPIPELINE_HOME": str(tmp_path)}
    process = subprocess.Popen(RESIDENT_COMMAND, stdin=subprocess.PIPE, env=environment)
    try:
        while not answers_socket(Path(settings.resident_address)):
            assert process.poll() is None
            time.sleep(0.02)
        assert ResidentIndex(settings.resident_address).get("a", "local:m") is None
        process.stdin.close()  # as the kernel does when a process ends
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ResidentDownError):
        ResidentIndex(settings.resident_address).get("a", "local:m")


def test_waiting_upserts_share_a_commit_but_fail_separately(tmp_path):
    index = BatchingIndex(str(tmp_path))
    index.upsert(claim("taken", fence=9), embedding(1.0, 0.0))
    batches, may_write = [], threading.Event()
    write = index.upsert_all

    def slow_write(writes):
        batches.append([one[0].image_id for one in writes])
        may_write.wait()
        return write(writes)

    index.upsert_all = slow_write
    with ThreadPoolExecutor(8) as runs:
        first = runs.submit(index.upsert, claim("first"), embedding(1.0, 1.0))
        while not batches:
            time.sleep(0.01)
        good = [
            runs.submit(index.upsert, claim(f"i{number}"), embedding(1.0, float(number)))
            for number in range(4)
        ]
        late = runs.submit(index.upsert, claim("taken", fence=8), embedding(1.0, 2.0))
        twice = runs.submit(index.upsert, claim("i0", fence=2), embedding(1.0, 3.0))
        while index._waiting.qsize() < 6:
            time.sleep(0.01)
        may_write.set()
        assert [one.result() for one in (first, twice, *good[1:])] == [None] * 5
        for stale in (late, good[0]):  # a later claim was stored, or is in the same batch
            assert isinstance(stale.exception(), StaleClaimError)
    assert (len(batches), len(batches[1])) == (2, 6)
    assert index.get("i0", "local:m")["fence"] == 2
    assert index.get("taken", "local:m")["fence"] == 9
    assert index.count_rows() == 6


def test_the_index_is_compacted_regularly(tmp_path):
    index = BatchingIndex(str(tmp_path))
    for number in range(45):
        index.upsert(claim(f"i{number}"), embedding(1.0, float(number)))
    table = index._database.open_table(index._table_names()[0])
    assert table.stats()["fragment_stats"]["num_fragments"] < 25
    assert index.count_rows() == 45


def test_on_a_full_disk_the_image_waits_and_the_index_works_again_afterwards(tmp_path):
    index = BatchingIndex(str(tmp_path))

    def fail(writes):  # as LanceDB does on a full tmpfs
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), …")

    index._merge = fail
    with pytest.raises(DiskFullError) as caught:
        index.upsert(claim("a"), embedding(1.0))
    assert isinstance(restore_error(describe_error(caught.value), ERRORS), DiskFullError)
    del index._merge
    index.upsert(claim("a"), embedding(1.0))

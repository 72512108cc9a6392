"""A heartbeat goes on until its run has lost the image, whatever happens to the database."""

import time
from contextlib import ExitStack, closing

import pytest

from imagepipeline.defs import attempts
from imagepipeline.defs.batches import IMAGES_AT_ONCE
from imagepipeline.models import Upload
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.database import POSTGRES_OPTIONS

MAX_CONNECTIONS = POSTGRES_OPTIONS["pool_size"] + POSTGRES_OPTIONS["max_overflow"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.05)
    monkeypatch.setitem(POSTGRES_OPTIONS, "pool_timeout", 0.2)


def wait_for_beats(catalogue):
    """Waits until two more beats have arrived."""
    before = catalogue.get("a")["beat"]
    deadline = time.monotonic() + 20
    while catalogue.get("a")["beat"] < before + 2:
        assert time.monotonic() < deadline, "no heartbeat arrives"
        time.sleep(0.05)


def test_it_outlives_a_time_in_which_no_connection_is_free(postgres_catalogue_url, caplog):
    with closing(Catalogue(postgres_catalogue_url)) as catalogue:
        catalogue.accept([Upload("a")])
        claim = catalogue.claim("a", 1, "run")
        with ExitStack() as others:
            for _ in range(MAX_CONNECTIONS):
                others.enter_context(catalogue._database.engine.connect())
            attempts.start_heartbeat(catalogue, claim)
            time.sleep(1)  # until it has waited in vain
        wait_for_beats(catalogue)
        attempts.stop_heartbeat(claim)
    assert not caplog.messages  # it is as if the catalogue were down


def test_it_outlives_any_error_and_says_nothing_secret(catalogue, monkeypatch, caplog):
    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    beat, failures = catalogue.beat, [RuntimeError("canary"), KeyError("canary")]

    def fail_at_first(claim):
        if failures:
            raise failures.pop()
        beat(claim)

    monkeypatch.setattr(catalogue, "beat", fail_at_first)
    attempts.start_heartbeat(catalogue, claim)
    wait_for_beats(catalogue)
    attempts.stop_heartbeat(claim)
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


def test_all_threads_of_a_run_of_many_images_reach_the_catalogue_at_once(postgres_catalogue_url):
    threads = 2 * IMAGES_AT_ONCE + 1  # each image has a heartbeat
    with closing(Catalogue(postgres_catalogue_url)) as catalogue, ExitStack() as stack:
        for _ in range(threads):
            stack.enter_context(catalogue._database.transaction())

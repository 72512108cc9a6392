"""The contract with the uploader, against a real Redis-compatible server."""

import json
import threading
import time

import pytest

from imagepipeline.errors import InvalidUploadError, StackError
from imagepipeline.models import Upload
from imagepipeline.stores.uploads import UploadQueue


def test_waiting_ends_with_an_entry_and_loses_none(queue):
    queue.wait(0.05)
    threading.Timer(0.2, queue.redis.lpush, (queue.wait_key, "late")).start()
    started = time.monotonic()
    queue.wait(4)
    assert time.monotonic() - started < 3
    assert queue.claim(10) == {b"late": 1}


def test_the_keys_are_those_of_the_contract(queue):
    queue.redis.lpush("image-processing:wait", "a")
    assert queue.claim(10) == {b"a": 1}
    assert queue.redis.lrange("image-processing:active", 0, -1) == [b"a"]
    queue.dead_letter(b"a", 1, "why")
    assert queue.redis.llen("image-processing:dead") == 1


def test_uploads_come_out_in_the_order_they_went_in(queue):
    for image_id in "abc":
        queue.enqueue(image_id)
    assert list(queue.claim(2)) == [b"a", b"b"]


def test_enqueue_and_the_sensor_speak_the_same_language(queue):
    queue.enqueue("a", "original/x.jpg", priority=7)
    [entry] = queue.claim(1)
    assert Upload.from_entry(entry) == Upload("a", "original/x.jpg", 7)


def test_a_malformed_upload_is_not_pushed(queue):
    with pytest.raises(InvalidUploadError):
        queue.enqueue("../a")
    assert queue.count() == {"waiting": 0, "dead": 0}


def test_what_a_crash_left_comes_first_and_is_not_lost(queue):
    for image_id in "abc":
        queue.enqueue(image_id)
    queue.claim(2)  # and then the sensor died
    assert list(queue.claim(3)) == [b"a", b"b", b"c"]
    assert queue.count()["waiting"] == 3


def test_copies_are_counted_and_acknowledged_together(queue):
    for image_id in "aab":
        queue.enqueue(image_id)
    assert queue.claim(10) == {b"a": 2, b"b": 1}
    queue.acknowledge(b"a", 2)
    assert queue.redis.lrange(queue.active_key, 0, -1) == [b"b"]


def test_acknowledging_leaves_a_copy_that_was_pushed_meanwhile(queue):
    queue.enqueue("a")
    queue.claim(10)
    queue.enqueue("a")
    queue.acknowledge(b"a", 1)
    assert queue.claim(10) == {b"a": 1}


def test_a_dead_letter_is_escaped_cut_and_says_why(queue):
    entry = b"\x00\xff<script>\n" + b"x" * 2_000_000
    queue.redis.lpush(queue.wait_key, entry)
    queue.claim(1)
    queue.dead_letter(entry, 1, "the reason")
    letter = json.loads(queue.redis.lindex(queue.dead_key, 0))
    assert letter["entry"].startswith(r"\x00\xff<script>\nxxx")
    assert len(letter["entry"]) == 200
    assert letter["reason"] == "the reason"
    assert queue.count() == {"waiting": 0, "dead": 1}


def test_prefixes_do_not_see_each_other(queue, redis_url):
    other = UploadQueue(redis_url, "other")
    other.enqueue("a")
    assert queue.claim(10) == {}
    assert other.count()["waiting"] == 1


def test_a_server_that_is_down_is_a_clear_error_without_the_password():
    queue = UploadQueue("redis://:canary@127.0.0.1:9/0")
    for call in (lambda: queue.enqueue("a"), lambda: queue.claim(1), queue.count):
        with pytest.raises(StackError, match="does not answer") as caught:
            call()
        assert "canary" not in str(caught.value)


def test_a_key_of_another_type_is_a_clear_error_and_is_left_alone(queue):
    queue.redis.set(queue.wait_key, "oops")
    with pytest.raises(StackError, match="WRONGTYPE"):
        queue.claim(1)
    assert queue.redis.get(queue.wait_key) == b"oops"

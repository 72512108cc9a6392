"""The upload queue keeps the contract with the uploader, on a real Redis-compatible server."""

import json
import threading
import time

import pytest

from imagepipeline.errors import InvalidUploadError, StackError
from imagepipeline.models import Upload
from imagepipeline.stores.uploads import MAX_DEAD, UploadQueue


def test_waiting_ends_when_an_entry_arrives_and_does_not_move_it(queue):
    queue.wait(0.05)
    threading.Timer(0.2, queue.redis.lpush, (queue.wait_key, "late")).start()
    started = time.monotonic()
    queue.wait(4)
    assert time.monotonic() - started < 3
    queue.redis.lpush(queue.wait_key, "later")
    queue.wait(4)
    assert queue.redis.lrange(queue.wait_key, 0, -1) == [b"later", b"late"]


def test_the_keys_have_the_agreed_names(queue):
    queue.redis.lpush("image-processing:wait", "a")
    assert queue.read(10) == {b"a": 1}
    queue.show_active({"a": "run"})
    assert queue.redis.llen("image-processing:active") == 1
    queue.dead_letter(b"a", 1, "why")
    assert queue.redis.llen("image-processing:dead") == 1
    assert queue.redis.llen("image-processing:wait") == 0


def test_the_active_list_has_one_entry_per_image_in_progress(queue):
    queue.show_active({"b": "run2", "a": "run1"})
    shown = [json.loads(entry) for entry in queue.redis.lrange(queue.active_key, 0, -1)]
    assert shown == [{"imageId": "a", "runId": "run1"}, {"imageId": "b", "runId": "run2"}]
    assert queue.read(10) == {}
    queue.show_active({})
    assert queue.redis.llen(queue.active_key) == 0


def test_active_entries_of_an_earlier_version_are_read_first_and_removed(queue):
    queue.enqueue("new")
    queue.redis.lpush(queue.active_key, "old", '{"imageId": "older", "priority": 1}')
    queue.redis.rpush(queue.active_key, '{"imageId": "x", "runId": "run"}')
    entries = queue.read(10)
    assert list(entries) == [b"old", b'{"imageId": "older", "priority": 1}', b"new"]
    queue.acknowledge(entries)
    assert queue.read(10) == {}
    assert queue.redis.llen(queue.active_key) == 1


@pytest.fixture
def full_queue(queue):
    """A queue with 100 entries on a server that is out of memory."""
    for number in range(100):
        queue.enqueue(f"i{number}", f"original/{'x' * 200}{number}.jpg")
    queue.redis.config_set("maxmemory-policy", "noeviction")
    queue.redis.config_set("maxmemory", 1)
    yield queue
    queue.redis.config_set("maxmemory", 0)


def test_a_full_redis_can_be_drained(full_queue):
    with pytest.raises(StackError, match="Redis is full"):
        full_queue.enqueue("one-more")
    full_queue.wait(4)
    entries = full_queue.read(500)
    assert len(entries) == 100
    full_queue.acknowledge(entries)
    assert full_queue.count()["waiting"] == 0


def test_a_full_redis_keeps_unreadable_entries_waiting(full_queue):
    full_queue.show_active({"a": "run"})
    entry = next(iter(full_queue.read(1)))
    with pytest.raises(StackError, match="Redis is full"):
        full_queue.dead_letter(entry, 1, "why")
    assert full_queue.count() == {"waiting": 100, "dead": 0}
    full_queue.show_active({})


def test_uploads_are_read_in_the_order_they_were_pushed(queue):
    for image_id in "abc":
        queue.enqueue(image_id)
    assert list(queue.read(2)) == [b"a", b"b"]


@pytest.mark.parametrize("limit", [1, 24, 25, 26, 60, 100, 500])
def test_the_oldest_entries_are_read_first_up_to_the_limit(queue, limit):
    names = [b"i%d" % number for number in range(60)]
    queue.redis.lpush(queue.wait_key, *names)
    assert list(queue.read(limit)) == names[:limit]


def test_fewer_entries_are_read_if_they_are_long(queue):
    for number in range(100):
        queue.redis.lpush(queue.wait_key, b"%d" % number + b"x" * 1_000_000)
    assert len(queue.read(500)) == 25
    queue.acknowledge(queue.read(500))
    assert next(iter(queue.read(500))).startswith(b"25x")


def test_an_enqueued_upload_is_read_unchanged(queue):
    queue.enqueue("a", "original/x.jpg", priority=7)
    [entry] = queue.read(1)
    assert Upload.from_entry(entry) == Upload("a", "original/x.jpg", 7)


def test_an_invalid_upload_is_not_pushed(queue):
    with pytest.raises(InvalidUploadError):
        queue.enqueue("../a")
    assert queue.count() == {"waiting": 0, "dead": 0}


def test_an_entry_stays_until_it_is_acknowledged(queue):
    for image_id in "abc":
        queue.enqueue(image_id)
    queue.read(2)  # after which the sensor crashes
    assert list(queue.read(3)) == [b"a", b"b", b"c"]
    assert queue.count()["waiting"] == 3


def test_copies_are_counted_and_acknowledged_together(queue):
    for image_id in "aab":
        queue.enqueue(image_id)
    assert queue.read(10) == {b"a": 2, b"b": 1}
    queue.acknowledge({b"a": 2})
    assert queue.redis.lrange(queue.wait_key, 0, -1) == [b"b"]


def test_the_position_of_the_last_copy_counts(queue):
    for path in ("original/old.jpg", "original/new.jpg", "original/old.jpg"):
        queue.enqueue("a", path)
    assert [Upload.from_entry(entry).path for entry in queue.read(10)] == [
        "original/new.jpg",
        "original/old.jpg",
    ]


def test_acknowledging_keeps_a_copy_pushed_in_the_meantime(queue):
    queue.enqueue("a")
    entries = queue.read(10)
    queue.enqueue("a")
    queue.acknowledge(entries)
    assert queue.read(10) == {b"a": 1}


def test_a_dead_letter_is_escaped_shortened_and_has_a_reason(queue):
    entry = b"\x00\xff<script>\n" + b"x" * 2_000_000
    queue.redis.lpush(queue.wait_key, entry)
    queue.read(1)
    queue.dead_letter(entry, 1, "the reason")
    letter = json.loads(queue.redis.lindex(queue.dead_key, 0))
    assert letter["entry"].startswith(r"\x00\xff<script>\nxxx")
    assert len(letter["entry"]) == 200
    assert letter["reason"] == "the reason"
    assert queue.count() == {"waiting": 0, "dead": 1}


def test_the_newest_unreadable_entries_are_kept_and_the_others_are_counted(queue):
    for number in range(MAX_DEAD + 3):
        queue.redis.lpush(queue.wait_key, f"?{number}")
        queue.dead_letter(f"?{number}".encode(), 1, "why")
    assert queue.count() == {"waiting": 0, "dead": MAX_DEAD}
    assert queue.count_dropped() == 3
    letters = queue.list_dead()
    assert (letters[0]["entry"], letters[-1]["entry"]) == (f"?{MAX_DEAD + 2}", "?3")
    for letter in letters[1:]:
        queue.discard_dead(letter)
    assert queue.count_dropped() == 3
    queue.retry_dead(letters[0])
    assert queue.count_dropped() == 0
    assert queue.count() == {"waiting": 1, "dead": 0}


def test_a_flood_of_long_unreadable_entries_uses_bounded_memory(queue):
    before_bytes = queue.redis.info("memory")["used_memory"]
    for number in range(2 * MAX_DEAD):
        queue.dead_letter(b"%d" % number + b"\xff" * 1000, 1, "why " * 50)
    assert queue.redis.info("memory")["used_memory"] - before_bytes < 5_000_000


def test_queues_with_different_prefixes_are_separate(queue, redis_url):
    other = UploadQueue(redis_url, "other")
    other.enqueue("a")
    assert queue.read(10) == {}
    assert other.count()["waiting"] == 1


def test_the_error_for_a_server_that_is_down_hides_its_password():
    queue = UploadQueue("redis://:canary@127.0.0.1:9/0")
    for call in (lambda: queue.enqueue("a"), lambda: queue.read(1), queue.count):
        with pytest.raises(StackError, match="does not answer") as caught:
            call()
        assert "canary" not in str(caught.value)


def test_a_key_of_another_type_is_reported_and_left_alone(queue):
    queue.redis.set(queue.wait_key, "oops")
    with pytest.raises(StackError, match="WRONGTYPE"):
        queue.read(1)
    assert queue.redis.get(queue.wait_key) == b"oops"


STRANGE_LETTERS = [
    *(b"\xff\x00", b"{", b"[]", b"7", b"null", b"[" * 100_000, b'{"id": 1}', b"1" * 10_000),
    b'{"id": "dead-1", "entry": "x", "raw": "?", "reason": "", "copies": 1, "at": 1}',
    b'{"id": "dead-1", "entry": "x", "raw": null, "reason": "", "copies": 1, "at": 1e300}',
]


@pytest.mark.parametrize("stored", STRANGE_LETTERS)
def test_an_invalid_dead_letter_can_be_discarded_and_does_not_affect_the_others(queue, stored):
    queue.redis.lpush(queue.wait_key, b"{")
    queue.dead_letter(b"{", 1, "the reason")
    queue.redis.lpush(queue.dead_key, stored)
    strange, honest = queue.list_dead()
    assert (strange["reason"], honest["reason"]) == (
        "another program wrote this entry, which is not a dead letter",
        "the reason",
    )
    assert strange["entry"].isprintable()
    queue.discard_dead(strange)
    queue.retry_dead(honest)
    assert queue.count() == {"waiting": 1, "dead": 0}
    assert list(queue.read(1)) == [b"{"]

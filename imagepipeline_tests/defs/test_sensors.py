"""The upload sensor takes in uploads from a real queue and requests runs."""

import json
import threading
import uuid
from datetime import timedelta

import dagster as dg
import pytest

from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.batches import WORK_TAG
from imagepipeline.defs.sensors import (
    BACKLOG_IMAGES,
    DEFAULT_SLOTS,
    RUNS_PER_SLOT,
    request_backlog_batches,
    take_in,
    upload_sensor,
)
from imagepipeline.models import BY_PERSON, PRIORITY_LIMIT, Recipe, Upload, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.planning import MAX_IN_FLIGHT
from imagepipeline.stores.applies import Applies
from imagepipeline.stores.failures import FailedImages
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline_tests.defs.conftest import RECIPES

LIMIT = RUNS_PER_SLOT * DEFAULT_SLOTS


@pytest.fixture
def tick(instance, catalogue, queue, ledger, paid_calls, applier, tenants):
    def tick(queue=queue, paid_calls=paid_calls, tenants=tenants):
        resources = {
            "queue": queue,
            "catalogue": catalogue,
            "ledger": ledger,
            "paid_calls": paid_calls,
            "tenants": tenants,
            "applier": applier,
        }
        context = dg.build_sensor_context(instance=instance, resources=resources)
        return upload_sensor(context)

    return tick


def keys(result):
    """The keys of the runs that make all assets of one image."""
    return [
        request.run_key
        for request in result.run_requests
        if request.run_key and request.asset_selection is None
    ]


def list_pictures(result):
    """The keys of the runs that make variants alone."""
    return [
        request.run_key
        for request in result.run_requests
        if request.asset_selection == [dg.AssetKey("variants")]
    ]


def test_a_push_becomes_a_pending_row_a_partition_and_a_run(tick, queue, catalogue):
    queue.enqueue("a", priority=4)
    result = tick()
    [request] = result.run_requests
    assert (request.run_key, request.partition_key) == ("a:1", "a")
    assert request.tags["dagster/priority"] == "4"
    assert request.tags[GENERATION_TAG] == "1"
    assert [list(added.partition_keys) for added in result.dynamic_partitions_requests] == [["a"]]
    assert catalogue.get("a")["status"] == "pending"
    assert queue.count() == {"waiting": 0, "dead": 0}


def test_an_idle_tick_lasts_until_an_upload_arrives(tick, queue):
    threading.Timer(0.3, queue.redis.lpush, (queue.wait_key, "late")).start()
    assert keys(tick()) == ["late:1"]


def test_an_idle_tick_is_reported_as_such(tick, monkeypatch):
    monkeypatch.setattr("imagepipeline.defs.sensors.MAX_WAIT_SECONDS", 0.1)
    assert tick().skip_message == "No upload waits."


def test_a_malformed_entry_does_not_affect_others(tick, queue):
    queue.enqueue("a")
    queue.redis.lpush(queue.wait_key, b"../etc/passwd", b"\xff\x00", b"{", b"")
    queue.enqueue("b")
    assert sorted(keys(tick())) == ["a:1", "b:1"]
    assert queue.count() == {"waiting": 0, "dead": 4}
    letters = [json.loads(letter) for letter in queue.redis.lrange(queue.dead_key, 0, -1)]
    assert all(letter["reason"] and letter["at"] for letter in letters)


def test_every_tick_requests_runs_for_all_pending_images(tick, catalogue):
    catalogue.accept([Upload("a")])  # by a tick that crashed before Dagster stored its requests
    assert keys(tick()) == ["a:1"]
    assert keys(tick()) == ["a:1"]


def test_no_second_run_is_requested_for_an_image_with_an_unfinished_run(tick, queue, start_run):
    queue.enqueue("a")
    queue.enqueue("b")
    start_run("a", 1)
    assert keys(tick()) == ["b:1"]


def test_a_finished_run_of_an_older_generation_does_not_count(tick, catalogue, start_run):
    catalogue.accept([Upload("a")])
    catalogue.hand_back(catalogue.claim("a", 1, "r"), "x")
    start_run("a", 1, dg.DagsterRunStatus.FAILURE)
    assert keys(tick()) == ["a:2"]


def test_higher_priorities_run_first_even_if_pushed_later(tick, queue):
    queue.enqueue("first")
    queue.enqueue("urgent", priority=9)
    assert keys(tick()) == ["urgent:1", "first:1"]


def test_the_backlog_waits_in_the_catalogue_not_in_dagsters_queue(tick, catalogue, start_run):
    catalogue.accept([Upload(f"i{number}") for number in range(40)])
    assert len(keys(tick())) == LIMIT
    for number in range(LIMIT - 1):
        start_run(f"i{number}", 1)
    assert len(keys(tick())) == 1
    start_run("x", 1)
    assert "room" in tick().skip_message


def test_a_pause_of_all_work_takes_uploads_in_and_requests_no_run(tick, queue, catalogue, ledger):
    ledger.pause(BY_PERSON, "moving the disk", None)
    queue.enqueue("a")
    assert "moving the disk" in tick().skip_message
    assert queue.count()["waiting"] == 0
    assert catalogue.get("a")["status"] == "pending"
    ledger.resume()
    assert keys(tick()) == ["a:1"]


def test_pending_images_get_their_runs_even_while_redis_is_down(tick, catalogue):
    down = UploadQueue("redis://127.0.0.1:9/0")
    assert "does not answer" in tick(down).skip_message
    catalogue.accept([Upload("a")])
    assert keys(tick(down)) == ["a:1"]


def test_an_entry_leaves_the_list_only_after_it_is_in_the_catalogue(queue, catalogue, monkeypatch):
    queue.enqueue("a")

    def die(uploads):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "accept", die)
        with pytest.raises(KeyboardInterrupt):
            take_in(queue, catalogue)
    assert queue.count()["waiting"] == 1
    assert take_in(queue, catalogue) == ["a was accepted."]
    assert queue.count()["waiting"] == 0


def test_a_crash_after_the_commit_is_harmless(queue, catalogue, monkeypatch):
    queue.enqueue("a")

    def die(entries):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(queue, "acknowledge", die)
        with pytest.raises(KeyboardInterrupt):
            take_in(queue, catalogue)
    [line] = take_in(queue, catalogue)
    assert "pushed again" in line
    assert catalogue.get("a")["generation"] == 1
    claim = catalogue.claim("a", 1, "run")
    assert catalogue.hand_back(claim, "x") is None
    assert queue.count()["waiting"] == 0


def test_the_active_list_has_the_images_in_progress(tick, queue, catalogue):
    queue.enqueue("a")
    tick()
    catalogue.claim("a", 1, "run")
    catalogue.accept([Upload("b")])
    tick()
    assert queue.redis.llen("image-processing:active") == 1


def test_a_full_redis_is_drained_and_keeps_unreadable_entries(tick, queue):
    queue.enqueue("a")
    queue.redis.lpush(queue.wait_key, b"../x")
    queue.enqueue("b")
    queue.redis.config_set("maxmemory", 1)
    try:
        assert sorted(keys(tick())) == ["a:1", "b:1"]
        assert queue.count() == {"waiting": 1, "dead": 0}
    finally:
        queue.redis.config_set("maxmemory", 0)
    tick()
    assert queue.count() == {"waiting": 0, "dead": 1}


def test_two_simultaneous_ticks_take_in_an_upload_once(tick, queue, catalogue, monkeypatch):
    queue.enqueue("a")
    accept, accepted = catalogue.accept, []

    def accept_slowly(uploads):
        accepted.append(list(uploads))
        if len(accepted) == 1:
            monkeypatch.setattr("imagepipeline.defs.sensors.MAX_WAIT_SECONDS", 0.01)
            thread = threading.Thread(target=tick)
            thread.start()
            thread.join()
        return accept(accepted[-1])

    monkeypatch.setattr(catalogue, "accept", accept_slowly)
    assert keys(tick()) == ["a:1"]
    assert accepted == [[Upload("a")]]


def test_entries_of_many_clients_are_understood(queue, catalogue):
    written = {
        *(
            b" one ",
            b"two\n",
            b"\tthree\r\n",
            b'"four"',
            b' {"imageId": "five"}\n',
            b'{"imageId": 6}',
            b"7",
        ),
        *(
            b'{"imageId": "eight", "path": null, "priority": null}',
            b"\xef\xbb\xbfnine",
            b'{"imageId": " ten "}',
        ),
        b'{"imageId": "eleven", "userId": 5, "path": "original/11.jpg"}',
    }
    for entry in written:
        queue.redis.lpush(queue.wait_key, entry)
    lines = take_in(queue, catalogue)
    known = catalogue.get_states(
        ["one", "two", "three", "four", "five", "6", "7", "eight", "nine", "ten", "eleven"]
    )
    assert len(known) == len(written)
    assert queue.count() == {"waiting": 0, "dead": 0}
    assert [line for line in lines if "userId" in line] == [
        "eleven: unknown fields were ignored: 'userId'"
    ]


def test_a_hundred_copies_of_an_entry_are_one_upload(queue, catalogue, tick):
    for _ in range(100):
        queue.enqueue("a")
    assert keys(tick()) == ["a:1"]
    assert queue.count()["waiting"] == 0
    assert catalogue.get("a")["generation"] == 1


@pytest.mark.stack
def test_two_thousand_pushes_half_of_them_duplicates_are_drained(queue, catalogue, tick):
    with queue.redis.pipeline() as pipe:
        for number in range(1000):
            pipe.lpush(queue.wait_key, f"i{number}", f"i{(number * 7) % 1000}")
        pipe.execute()
    ticks = 0
    while queue.count()["waiting"]:
        assert len(keys(tick())) == LIMIT
        ticks += 1
    assert 1 <= ticks <= 4
    assert catalogue.count()["pending"] == 1000
    assert queue.count()["dead"] == 0


MALFORMED = [
    *(
        b"",
        b" ",
        b"\x00",
        b"\n",
        b"\t",
        b"a\nb",
        b"\ra\rb",
        b"a\x00",
        b"a b",
        b".",
        b"..",
        b"...",
        b"../x",
    ),
    *(
        b"/etc/passwd",
        b"a/b",
        b"a\\b",
        b"%2e%2e",
        b"a%00",
        b"~",
        b"-a",
        b"_a",
        b"a.b",
        b"a:1",
        b"a;b",
        b"a'b",
        b'a"b',
    ),
    *(
        b"$(id)",
        b"`id`",
        b"<script>",
        b"{{7*7}}",
        b"' OR 1=1 --",
        b"\xff\xfe",
        b"\xc3\x28",
        b"\xed\xa0\x80",
        b"\x80abc",
    ),
    *(
        "é".encode(),
        "аbc".encode(),
        "\u202eabc".encode(),
        "🙂".encode(),
        "\u200ba".encode(),
        "ａｂｃ".encode(),
        "①".encode(),
    ),
    *(
        b"x" * 65,
        b"x" * 2_000_000,
        b"[]",
        b'"a',
        b"{",
        b"{}",
        b"{]",
        b'{"imageId": []}',
        b'{"imageId": "../x"}',
    ),
    *(
        b'{"imageId": "a", "path": "original/' + name + b'.jpg"}'
        for name in (b"x" * 248, b"y/" * 240)
    ),
    *(
        b'{"imageId": true}',
        b'{"imageId": 1.5}',
        b'{"imageId": null}',
        b'{"imageId": {"imageId": "a"}}',
        b'""',
    ),
    *(b'{"imageId": "a", "path": "../../x.jpg"}', b'{"imageId": "a", "path": "original/../x.jpg"}'),
    *(
        b'{"imageId": "a", "priority": 1e3}',
        b'{"imageId": "a", "path": ""}',
        b"\x80\x04\x95.",
        b"O:8:x:0:{}",
        b"---\na: 1",
    ),
    b'{"imageId": "a"}{"imageId": "b"}',
]


def test_sixty_kinds_of_malformed_entries_do_not_affect_good_ones(queue, catalogue, tick):
    assert len(set(MALFORMED)) >= 60
    for number, entry in enumerate(MALFORMED):
        queue.redis.lpush(queue.wait_key, entry)
        if number % 6 == 0:
            queue.enqueue(f"good{number}")
    assert sorted(keys(tick())) == sorted(
        f"good{number}:1" for number in range(0, len(MALFORMED), 6)
    )
    assert queue.count() == {"waiting": 0, "dead": len(MALFORMED)}
    for letter in queue.list_dead():
        assert letter["entry"].isascii()
        assert letter["entry"].isprintable()
        assert len(letter["entry"]) <= 200
        assert letter["reason"].isprintable()
    assert sum(catalogue.count().values()) == len(range(0, len(MALFORMED), 6))


@pytest.fixture
def make_variants(catalogue):
    """A function that makes the variants of a pending image, as a run of its own does."""

    def make_variants(image_id):
        generation = catalogue.get(image_id)["generation"]
        claim = catalogue.claim(image_id, generation, f"run-{image_id}")
        catalogue.record_result(claim, "variants", Recipe("local", "pillow"), "0" * 64)
        catalogue.hand_back(claim, "results are missing")

    return make_variants


def test_during_a_pause_variants_are_made_and_then_the_tick_says_why_the_rest_waits(
    tick, queue, catalogue, ledger, make_variants
):
    queue.enqueue("a")
    ledger.pause("auth", "the vision model answered 401", 600)
    result = tick()
    assert (keys(result), list_pictures(result)) == ([], ["a:1"])
    make_variants("a")
    assert tick().skip_message == "Paused (auth): the vision model answered 401."
    assert catalogue.get("a")["status"] == "pending"
    ledger.resume()
    result = tick()
    assert (keys(result), list_pictures(result)) == (["a:2"], [])
    catalogue.fail_pending(catalogue.list_pending(1)[0], "cancelled", "by a person")
    queue.enqueue("a")  # perhaps with another picture
    ledger.pause("auth", "the vision model answered 401", 600)
    assert list_pictures(tick()) == ["a:3"]


def test_runs_of_variants_alone_take_no_room_from_runs_that_pay(
    tick, catalogue, instance, start_run, sqlite_catalogue_url
):
    catalogue.accept([Upload(f"i{number}") for number in range(LIMIT + 3)])
    earlier = Ledger(sqlite_catalogue_url, lambda: now_utc() - timedelta(hours=1))
    earlier.pause("provider_down", "503", 60)  # over: one image is tried
    for number in range(LIMIT):
        start_run(f"i{number}", asset_selection=frozenset({dg.AssetKey("variants")}))
    assert keys(tick()) == [f"i{LIMIT}:1"]


def test_behind_the_rate_limit_pictures_come_first(tick, catalogue, build_paid_calls):
    catalogue.accept([Upload(f"i{number}") for number in range(12)])
    result = tick(paid_calls=build_paid_calls("10/day"))
    assert len(keys(result)) == 5
    assert len(list_pictures(result)) == 7
    assert not set(keys(result)) & set(list_pictures(result))


def test_without_paid_work_no_run_makes_variants_alone(tick, catalogue, paid_calls):
    catalogue.accept([Upload(f"i{number}") for number in range(LIMIT + 5)])
    result = tick()
    assert (len(keys(result)), list_pictures(result)) == (LIMIT, [])


def test_planned_images_wait_for_runs_of_the_bulk_lane(
    tick, catalogue, sqlite_catalogue_url, instance
):
    catalogue.accept([Upload(f"i{number}") for number in range(6)])
    for number in range(6):
        claim = catalogue.claim(f"i{number}", 1, "run")
        for asset in ("metadata", "variants", "embedding"):
            catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
        catalogue.finish(claim)
    Applies(sqlite_catalogue_url).start(RECIPES, max_images=5)
    catalogue.accept([Upload("new")])
    requests = tick().run_requests
    assert [request.run_key for request in requests] == ["new:1", None, None]
    assert [request.job_name for request in requests] == ["process_upload", *["process_batch"] * 2]
    assert catalogue.count_bulk() == {"pending": 5, "processing": 0}
    instance.add_run(
        dg.DagsterRun(
            "process_batch",
            str(uuid.uuid4()),
            status=dg.DagsterRunStatus.STARTED,
            tags={WORK_TAG: "planned"},
        )
    )
    assert [request.job_name for request in tick().run_requests].count("process_batch") == 1


def test_imported_images_wait_for_the_bulk_lane_and_uploads_come_first(tick, catalogue, queue):
    catalogue.accept_imported([Upload(f"i{number}") for number in range(9)])
    queue.enqueue("new")
    queue.enqueue("i3")  # the app needs it now, so it leaves the lane
    requests = tick().run_requests
    assert [request.run_key for request in requests] == ["i3:1", "new:1", None, None]
    assert catalogue.count_bulk()["pending"] == 8
    catalogue.accept_imported([Upload("i3"), Upload("new")])
    assert catalogue.get_states(["i3", "new"])["new"].pushes == 1


def test_an_import_does_not_hold_up_an_apply(tick, catalogue, sqlite_catalogue_url):
    catalogue.accept([Upload("old")])
    claim = catalogue.claim("old", 1, "run")
    for asset in ("metadata", "variants", "embedding"):
        catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
    catalogue.finish(claim)
    catalogue.accept_imported([Upload(f"i{number}") for number in range(MAX_IN_FLIGHT)])
    Applies(sqlite_catalogue_url).start(RECIPES)
    tick()
    assert catalogue.get_states(["old"])["old"].status == "pending"


def test_after_a_pause_one_image_is_tried_first(tick, queue, sqlite_catalogue_url, ledger):
    for image_id in "abc":
        queue.enqueue(image_id)
    earlier = Ledger(sqlite_catalogue_url, lambda: now_utc() - timedelta(hours=1))
    earlier.pause("auth", "401", 600)
    earlier.close()
    assert keys(tick()) == ["a:1"]


@pytest.fixture
def build_paid_calls(ledger, limiter):
    """A function that builds the paid calls of two remote models with the given limits."""

    def build(limits, **options):
        limiter.set_limits(limits)
        recipes = {"metadata": Recipe("openai", "m"), "embedding": Recipe("openrouter", "e")}
        return PaidCalls(ledger, limiter, {}, **options, recipes=recipes)

    return build


def test_runs_are_requested_only_for_the_calls_left_under_a_daily_limit(
    tick, catalogue, limiter, build_paid_calls, make_variants
):
    catalogue.accept([Upload(f"i{number}") for number in range(12)])
    paid_calls = build_paid_calls("10/day")
    assert len(keys(tick(paid_calls=paid_calls))) == 5  # each needs two calls
    for _ in range(9):
        assert limiter.acquire("metadata", 0)
    assert len(keys(tick(paid_calls=paid_calls))) == 1
    assert limiter.acquire("embedding", 0)
    for number in range(12):
        make_variants(f"i{number}")
    message = tick(paid_calls=paid_calls).skip_message
    assert message.startswith(
        "Paused: the rate limit of paid calls (10/day) is used up: paid work resumes at 20"
    )
    limiter.set_limits("20/day")  # takes effect at once
    assert len(keys(tick(paid_calls=paid_calls))) == 5


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ("metadata=4/hour,embedding=100/minute", 4),
        ("metadata=100/minute,embedding=3/day", 3),
        ("1/minute", 1),
        ("2/minute", 1),
        ("10/minute", 5),  # the others have their variants made first
        ("100/minute,3/day", 2),
        ("off", 12),
    ],
)
def test_runs_are_requested_only_if_their_calls_will_be_permitted_in_time(
    tick, catalogue, build_paid_calls, limits, count
):
    catalogue.accept([Upload(f"i{number}") for number in range(12)])
    assert len(keys(tick(paid_calls=build_paid_calls(limits)))) == count


def test_no_run_is_requested_while_a_budget_is_set_and_a_price_is_unknown(
    tick, catalogue, build_paid_calls, make_variants
):
    catalogue.accept([Upload("a")])
    make_variants("a")
    message = tick(paid_calls=build_paid_calls("off", daily_budget_usd=5.0)).skip_message
    assert "the price of m and e is unknown" in message
    assert keys(tick(paid_calls=build_paid_calls("off"))) == ["a:2"]


def test_after_a_pause_a_different_image_is_tried_first_each_time(
    tick, catalogue, sqlite_catalogue_url, ledger
):
    catalogue.accept([Upload("a", priority=9), Upload("b"), Upload("c")])
    earlier = Ledger(sqlite_catalogue_url, lambda: now_utc() - timedelta(hours=1))
    earlier.pause("auth", "403", 600)
    earlier.close()
    tried = []
    for _ in range(4):
        [image] = [request for request in tick().run_requests if request.asset_selection is None]
        tried.append(image.partition_key)
        generation = catalogue.get_states([image.partition_key])[image.partition_key].generation
        catalogue.hand_back(catalogue.claim(image.partition_key, generation, "run"), "403")
    assert sorted(tried[:3]) == ["a", "b", "c"]
    assert tried[3] == tried[0]
    for image_id in "abc":
        state = catalogue.get_states([image_id])[image_id]
        catalogue.record_attempt(catalogue.claim(image_id, state.generation, "run"), 1)
        catalogue.hand_back(catalogue.claim(image_id, state.generation, "run"), "403")
    catalogue.accept([Upload("new")])
    assert keys(tick()) == ["new:1"]


def test_images_that_failed_shortly_before_an_outage_was_noticed_wait_again(
    tick, catalogue, outbox, ledger, sqlite_catalogue_url
):
    for image_id, reason in (
        ("a", "provider_unavailable"),
        ("b", "corrupt"),
        ("c", "provider_unavailable"),
    ):
        catalogue.accept([Upload(image_id)])
        catalogue.fail(catalogue.claim(image_id, 1, "run"), reason, "x")
    FailedImages(sqlite_catalogue_url).discard("c")
    tick()
    assert catalogue.count()["failed"] == 3
    ledger.pause("provider_down", "503", 30, "metadata")
    tick()
    states = {
        image_id: state.status for image_id, state in catalogue.get_states(["a", "b", "c"]).items()
    }
    assert states == {"a": "pending", "b": "failed", "c": "failed"}
    assert [row["image_id"] for row in outbox.list_unsent("webhook")] == ["b", "c"]


def test_runs_of_the_bulk_lane_share_a_backlog_of_uploads(
    tick, catalogue, instance, ledger, start_run, tenants
):
    catalogue.accept([Upload(f"i{number}") for number in range(BACKLOG_IMAGES)])
    assert {request.job_name for request in tick().run_requests} == {"process_upload"}
    catalogue.accept([Upload("one-more")])
    requests = tick().run_requests
    batches = [request for request in requests if request.job_name == "process_batch"]
    assert len(requests) == LIMIT + 2
    assert len(batches) == 2
    assert int(batches[0].tags["dagster/priority"]) > PRIORITY_LIMIT  # else they would never start
    assert batches[0].run_config["ops"]["process_images"]["config"] == {"uploads_left": LIMIT}
    assert request_backlog_batches(catalogue, instance, 1, tenants) == []
    ledger.pause("credits", "no credit is left", None)
    assert not [one for one in tick().run_requests or () if one.job_name == "process_batch"]


def configs(result):
    """The jobs' configurations of the requested runs of the bulk lane, by their work."""
    return [
        (request.tags[WORK_TAG], request.run_config.get("ops", {}))
        for request in getattr(result, "run_requests", None) or []
        if request.job_name == "process_batch"
    ]


@pytest.fixture
def remote_calls(ledger, limiter):
    recipes = {"metadata": Recipe("openai", "m"), "embedding": Recipe("local", "e")}
    return PaidCalls(ledger, limiter, {}, recipes=recipes)


def test_in_a_pause_planned_images_get_variants_and_after_it_one_is_tried(
    tick, catalogue, queue, sqlite_catalogue_url, remote_calls, monkeypatch
):
    monkeypatch.setattr("imagepipeline.defs.sensors.MAX_WAIT_SECONDS", 0.1)
    catalogue.accept_imported([Upload(f"i{number}") for number in range(10)])
    earlier = Ledger(sqlite_catalogue_url, lambda: now_utc() - timedelta(days=2))
    pictures = ("pictures", {"process_images": {"config": {"pictures_only": True}}})
    one = ("planned", {"process_images": {"config": {"max_images": 1}}})
    earlier.pause("credits", "no credit is left", None, "metadata")
    assert configs(tick(paid_calls=remote_calls)) == [pictures]
    earlier.end(earlier.list_pauses()[0])
    earlier.pause("provider_down", "503, for several images in a row", 30, "metadata")
    assert configs(tick(paid_calls=remote_calls)) == [pictures, one]
    queue.enqueue("upload")
    result = tick(paid_calls=remote_calls)
    assert (keys(result), configs(result)) == (["upload:1"], [pictures])


def test_behind_the_rate_limit_planned_images_get_variants(tick, catalogue, remote_calls, limiter):
    limiter.set_limits("1/hour")
    assert limiter.acquire("metadata", 0)
    catalogue.accept_imported([Upload(f"i{number}") for number in range(10)])
    works = [work for work, _ in configs(tick(paid_calls=remote_calls))]
    assert works == ["pictures"]  # another would end at once, and be requested again
    limiter.set_limits("1/minute")
    assert limiter.acquire("metadata", 0)
    works = [work for work, _ in configs(tick(paid_calls=remote_calls))]
    assert works == ["pictures", "planned"]  # it waits for its permit

"""Apps are told what becomes of each image: nothing is lost, and repetitions have the same ID."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import dagster as dg
import jsonschema
import pytest
import sqlalchemy as sa
from werkzeug import Response

from imagepipeline.defs import events as sensors
from imagepipeline.errors import StaleClaimError
from imagepipeline.models import (
    ImageMetadata,
    OriginalFacts,
    Recipe,
    Upload,
    Variant,
    VariantSpec,
    Wording,
)
from imagepipeline.relaying import POSTED_TOGETHER, WebhookRelay, relay_to_stream
from imagepipeline.runtime import processes, valkey
from imagepipeline.services.notifier import EventWebhook
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.stream import EventStream
from imagepipeline_tests import reference

RECIPE = Recipe("local", "m")
METADATA = ImageMetadata(
    description="A cat “sleeps”.", tags=["cat", "sofa"], category="animal",
    dominant_colors=["#aabbcc"], mood="calm",
)  # fmt: skip
CONSUMER = """
import json, sys, time
import redis
server, key, name = redis.Redis.from_url(sys.argv[1]), sys.argv[2], sys.argv[3]
try:
    server.xgroup_create(key, "app", id="0", mkstream=True)
except redis.ResponseError:
    pass  # it exists
last = "0"  # first what was handed out and not acknowledged, then what is new
while True:
    for _, entries in server.xreadgroup("app", name, {key: last}, count=1, block=100) or []:
        last = last if entries else ">"
        for number, fields in entries:
            event = json.loads(fields[b"event"])
            print(event["eventId"], event["imageId"], event["generation"], flush=True)
            if sys.argv[4] == "dies":
                time.sleep(60)
            server.xack(key, "app", number)
"""


class Clock:
    def __init__(self):
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self):
        self.now += timedelta(milliseconds=1)
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def catalogue(catalogue_url, clock):
    return Catalogue(catalogue_url, clock)


@pytest.fixture
def log(catalogue, catalogue_url, clock):
    return EventLog(catalogue_url, clock)


@pytest.fixture
def sqlite_log(clock, sqlite_catalogue_url):
    return Catalogue(sqlite_catalogue_url, clock), EventLog(sqlite_catalogue_url, clock)


@pytest.fixture
def stream(redis_url):
    with closing(EventStream(redis_url, "test", 1000)) as stream:
        yield stream


def build_facts(image_id, sha256="0" * 64):
    placeholder = "data:image/webp;base64,AA"
    return OriginalFacts(f"original/{image_id}.jpg", 3, sha256, 400, 300, placeholder, "#aabbcc")


def build_variants(image_id):
    return [
        (f"variants/{image_id}-{suffix}.{kind}",
         Variant(VariantSpec(suffix, width, kind, 80), width, width * 3 // 4, b"abc"))
        for suffix, width in (("sm", 200), ("md", 400))
        for kind in ("webp", "avif")
    ]  # fmt: skip


def save_pictures(catalogue, claim, sha256="0" * 64):
    catalogue.save_original(claim, build_facts(claim.image_id, sha256))
    catalogue.save_variants(claim, build_variants(claim.image_id))
    catalogue.record_result(claim, "variants", RECIPE, sha256)


def save_rest(catalogue, claim, sha256="0" * 64):
    catalogue.save_metadata(claim, METADATA, RECIPE, sha256)
    catalogue.record_result(claim, "embedding", RECIPE, "1" * 64)


def complete(catalogue, image_id):
    claim = catalogue.claim_anew(image_id, "run")
    if catalogue.get(image_id)["metadata"] is None:
        save_pictures(catalogue, claim)
        save_rest(catalogue, claim)
    catalogue.finish(claim)


def read(log):
    return [json.loads(event.payload) for event in log.list_after()]


def read_stream(stream):
    return [json.loads(fields[b"event"]) for _, fields in stream.redis.xrange(stream.key)]


def drop_repetitions(payloads):
    """Each event once, where it came first."""
    return list({payload["eventId"]: payload for payload in payloads}.values())


def test_each_event_has_what_a_page_needs_as_it_was_at_that_moment(catalogue, log):
    claim = catalogue.claim_anew("a", "run")
    save_pictures(catalogue, claim)
    save_rest(catalogue, claim)
    catalogue.finish(claim)

    pictures, completed = read(log)
    variants = [
        {"name": suffix, "path": f"variants/a-{suffix}.{kind}", "format": kind,
         "width": width, "height": width * 3 // 4, "bytes": 3}
        for kind in ("avif", "webp")
        for suffix, width in (("sm", 200), ("md", 400))
    ]  # fmt: skip
    expected = {
        "version": 1, "imageId": "a", "generation": 1, "reason": None, "error": None, "flaw": None,
        "width": 400, "height": 300, "placeholder": "data:image/webp;base64,AA",
        "dominantColor": "#aabbcc", "variants": variants,
    }  # fmt: skip
    assert pictures == expected | {
        "eventId": pictures["eventId"], "at": pictures["at"],
        "type": "image.pictures_ready", "status": "processing",
        "description": None, "tags": [], "category": None, "mood": None,
    }  # fmt: skip
    assert completed == expected | {
        "eventId": completed["eventId"], "at": completed["at"],
        "type": "image.completed", "status": "completed",
        "description": "A cat “sleeps”.", "tags": ["cat", "sofa"], "category": "animal",
        "mood": "calm",
    }  # fmt: skip
    assert pictures["eventId"] != completed["eventId"]
    assert pictures["at"] < completed["at"]
    schema = json.loads(reference.SCHEMA.read_text())
    for payload in (pictures, completed):
        jsonschema.validate(payload, schema)


def test_a_failed_replacement_does_not_show_the_picture_before_it(catalogue, log):
    complete(catalogue, "a")
    catalogue.fail(catalogue.claim_anew("a", "run"), "corrupt", "It cannot be read.")
    [*_, failed] = read(log)
    assert (failed["type"], failed["generation"]) == ("image.failed", 2)
    assert (failed["reason"], failed["error"]) == ("corrupt", "It cannot be read.")
    assert (failed["variants"], failed["description"], failed["width"]) == ([], None, None)
    # But pictures that were made before the model failed are shown.
    claim = catalogue.claim_anew("a", "run")
    save_pictures(catalogue, claim, "2" * 64)
    catalogue.fail(claim, "refused", "The model declined.")
    [*_, pictures, failed] = read(log)
    assert [pictures["type"], failed["type"]] == ["image.pictures_ready", "image.failed"]
    assert failed["description"] is None
    assert failed["variants"] == pictures["variants"] != []


def test_each_end_of_a_generation_writes_one_event_and_a_replaced_run_writes_none(catalogue, log):
    catalogue.accept([Upload("a")])
    stale = catalogue.claim("a", 1, "first")
    save_pictures(catalogue, stale)
    save_rest(catalogue, stale)
    [processing] = catalogue.list_processing()
    catalogue.recover(processing.claim, "its process died")
    for write in (
        lambda: catalogue.finish(stale),
        lambda: catalogue.fail(stale, "unexpected", "x"),
        lambda: catalogue.record_result(stale, "variants", RECIPE, "2" * 64),
    ):
        with pytest.raises(StaleClaimError):
            write()
    claim = catalogue.claim("a", 2, "second")
    catalogue.accept([Upload("a")])  # pushed again meanwhile
    catalogue.finish(claim)
    catalogue.fail(catalogue.claim("a", 3, "third"), "corrupt", "x")
    assert [(one["type"], one["generation"], one["status"]) for one in read(log)] == [
        ("image.pictures_ready", 1, "processing"),
        ("image.completed", 2, "completed"),
        ("image.failed", 3, "failed"),
    ]


def test_the_views_show_what_is_published(catalogue, catalogue_url):
    complete(catalogue, "a")
    claim = catalogue.claim_anew("b", "run")
    catalogue.save_variants(claim, build_variants("b"))  # its files are not written yet
    replaced = catalogue.claim_anew("a", "run")
    with sa.create_engine(catalogue_url).connect() as connection:

        def ask(query):
            return [{**row} for row in connection.exec_driver_sql(query).mappings()]

        [a, b] = ask("SELECT * FROM published_images_v1 ORDER BY id")
        assert list(a) == [
            "id", "generation", "status", "reason", "error", "flaw", "width", "height",
            "placeholder", "dominant_color", "description", "tags", "category", "mood",
            "accepted_at", "updated_at", "languages",
        ]  # fmt: skip
        assert (a["status"], a["description"], a["mood"]) == (
            "processing",
            "A cat “sleeps”.",
            "calm",
        )
        tags = json.loads(a["tags"]) if isinstance(a["tags"], str) else a["tags"]
        assert tags == ["cat", "sofa"]
        assert (b["id"], b["description"], b["tags"]) == ("b", None, None)
        assert a["languages"] is b["languages"] is None
        variants = ask("SELECT * FROM published_variants_v1 ORDER BY format, width")
        assert len(variants) == 4
        assert variants[0] == {
            "image_id": "a", "path": "variants/a-sm.avif", "format": "avif", "width": 200,
            "height": 150, "bytes": 3, "name": "sm",
        }  # fmt: skip
    # A description of another original is none; its pictures stay until they are replaced.
    catalogue.save_original(replaced, build_facts("a", "9" * 64))
    with sa.create_engine(catalogue_url).connect() as connection:
        [a, _] = ask_all(connection, "published_images_v1")
        assert (a["description"], a["tags"], a["width"]) == (None, None, 400)
        assert len(ask_all(connection, "published_variants_v1")) == 4


def test_apps_get_a_description_in_each_language(catalogue, log, catalogue_url):
    complete(catalogue, "a")
    assert "languages" not in json.loads(log.list_after()[-1].payload)
    words = {
        **{"description": "Eine Katze.", "altText": "Katze", "tags": ["Katze"]},
        **{"category": "Tier", "mood": "ruhig"},
    }
    spoken = METADATA.model_copy(update={"languages": {"de": Wording.model_validate(words)}})
    claim = catalogue.claim_anew("a", "run")
    catalogue.save_metadata(claim, spoken, RECIPE, "0" * 64)
    catalogue.record_result(claim, "embedding", RECIPE, "1" * 64)
    catalogue.finish(claim)
    payload = json.loads(log.list_after()[-1].payload)
    jsonschema.validate(payload, json.loads(reference.SCHEMA.read_text()))
    assert payload["languages"] == {"de": words}
    with sa.create_engine(catalogue_url).connect() as connection:
        [a] = ask_all(connection, "published_images_v1")
    shown = json.loads(a["languages"]) if isinstance(a["languages"], str) else a["languages"]
    assert shown == {"de": words}


def ask_all(connection, view):
    query = f"SELECT * FROM {view} ORDER BY 1"
    return [{**row} for row in connection.exec_driver_sql(query).mappings()]


def test_erasing_leaves_one_event_that_quotes_nothing(catalogue, log, catalogue_url, clock, stream):
    for name in ("a", "b"):
        complete(catalogue, name)
    relay_to_stream(log, stream)
    erasures = Erasures(catalogue_url, clock)
    assert erasures.remove("a", catalogue.get("a")["fence"], [])["events"] == 2
    assert erasures.remove("a", None, []) == {}  # repeated before the app was told
    relay_to_stream(log, stream)
    *others, erased = read_stream(stream)
    assert [one["imageId"] for one in others] == ["b", "b"]
    assert (erased["type"], erased["imageId"], erased["generation"]) == ("image.erased", "a", 1)
    assert "sleeps" not in json.dumps(erased)
    jsonschema.validate(erased, json.loads(reference.SCHEMA.read_text()))


def test_old_events_are_deleted_once_the_stream_has_them(sqlite_log, clock, stream):
    catalogue, log = sqlite_log
    complete(catalogue, "a")
    clock.now += timedelta(days=4)
    assert log.prune() == 0
    relay_to_stream(log, stream)
    assert log.prune() == 2
    complete(catalogue, "b")
    assert [event.seq for event in log.list_after()] == [3, 4]  # numbers are not used again


def test_the_stream_keeps_about_as_many_events_as_set(redis_url):
    stream = EventStream(redis_url, "short", 10)
    stream.add(["{}"] * 500)
    assert 10 <= stream.redis.xlen(stream.key) <= 110
    stream.redis.delete(stream.key)


def test_a_relay_killed_before_it_marks_repeats_with_the_same_ids_in_order(log, catalogue, stream):
    for _ in range(2):
        for name in ("a", "b"):
            complete(catalogue, name)
    child = os.fork()
    if child == 0:
        log.mark_streamed = lambda sent: os.kill(os.getpid(), signal.SIGKILL)
        relay_to_stream(log, stream)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    relay_to_stream(log, stream)
    told, written = read_stream(stream), read(log)
    assert told == written * 2
    assert Counter(one["eventId"] for one in drop_repetitions(told)) == Counter(
        one["eventId"] for one in written
    )


@contextmanager
def consuming(url, stream, name, how):
    command = [sys.executable, "-c", CONSUMER, url, stream.key, name, how]
    consumer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield consumer
    finally:
        consumer.kill()
        consumer.communicate()


def test_nothing_is_lost_while_redis_is_down_and_a_consumer_dies(tmp_path, sqlite_log):
    catalogue, log = sqlite_log
    socket = tmp_path.parent / f"{os.urandom(4).hex()}.sock"
    url = f"unix://{socket}"
    arguments = (tmp_path / "data", socket, tmp_path / "log")
    server = valkey.start_server(*arguments)
    stream = EventStream(url, "test", 1000)
    complete(catalogue, "a")
    assert relay_to_stream(log, stream).count == 2
    with consuming(url, stream, "one", "dies") as consumer:
        taken = consumer.stdout.readline()  # and not acknowledged
    processes.stop(server, patience_seconds=10)

    for _ in range(3):
        complete(catalogue, "a")
        done = relay_to_stream(log, stream)
        assert done.count == 0
        assert "Redis does not answer" in done.problem
    server = valkey.start_server(*arguments)
    assert relay_to_stream(log, stream).count == 3
    written = [f"{one['eventId']} a {one['generation']}\n" for one in read(log)]
    with consuming(url, stream, "one", "lives") as consumer:
        heard = [consumer.stdout.readline() for _ in written]
    assert heard == written
    assert heard[0] == taken
    stream.close()
    processes.stop(server, patience_seconds=10)


@pytest.fixture
def webhook(httpserver):
    return EventWebhook(httpserver.url_for("/hook"), "a secret of ours", allows_private=True)


class Receiver:
    """What the webhook's server answers, and the events it has taken."""

    def __init__(self, httpserver):
        self.taken, self.sizes, self.status, self.poison = [], [], 200, None
        httpserver.expect_request("/hook", method="POST").respond_with_handler(self._answer)

    def _answer(self, request):
        body = request.get_json()
        assert body["type"] == "image-processing-events"
        self.sizes.append(len(body["events"]))
        if self.poison in [event["imageId"] for event in body["events"]]:
            return Response("", 500)
        if self.status == 200:
            self.taken += body["events"]
        return Response("", self.status)


@pytest.fixture
def receiver(httpserver):
    return Receiver(httpserver)


def drain(log, webhook):
    relay = WebhookRelay(log, webhook)
    while relay.relay().count:
        pass


def test_a_webhook_gets_what_happens_from_when_it_was_set(sqlite_log, webhook, receiver):
    catalogue, log = sqlite_log
    complete(catalogue, "earlier")
    drain(log, webhook)
    for number in range(30):
        complete(catalogue, f"i{number}")
    drain(log, webhook)
    assert receiver.sizes == [POSTED_TOGETHER, POSTED_TOGETHER, 10]
    assert receiver.taken == read(log)[2:]
    log.close_webhook()
    complete(catalogue, "unheard")
    drain(log, webhook)
    assert len(receiver.taken) == 60


def test_a_webhook_that_is_down_for_an_hour_gets_all_in_order(sqlite_log, clock, webhook, receiver):
    catalogue, log = sqlite_log
    drain(log, webhook)
    receiver.status = 503
    relay = WebhookRelay(log, webhook)
    for number in range(240):  # every 15 s
        if number % 20 == 0:
            for name in ("a", "b"):
                complete(catalogue, name)
        done = relay.relay()
        assert (done.count, done.problem) == (0, "the webhook answered 503")
        clock.now += timedelta(seconds=15)
    assert len(receiver.sizes) < 20  # 5, 10, … 160 s, then every 5 minutes
    assert log.find_webhook().failures == len(receiver.sizes)
    receiver.status = 200
    clock.now += timedelta(minutes=5)
    drain(log, webhook)
    assert receiver.taken == read(log)
    assert log.find_webhook().failures == 0


def test_a_refused_event_holds_up_its_image_only_and_dies_after_a_day(
    catalogue, log, clock, webhook, receiver
):
    drain(log, webhook)
    receiver.poison = "bad"
    for name in ("a", "bad", "b", "bad", "c", "bad"):
        complete(catalogue, name)
    for _ in range(20):
        drain(log, webhook)
        clock.now += timedelta(seconds=10)
    assert [one["imageId"] for one in receiver.taken] == ["a", "a", "b", "b", "c", "c"]
    assert log.list_dead(10) == []
    clock.now += timedelta(days=1)
    drain(log, webhook)
    assert [event.image_id for event in log.list_dead(10)] == ["bad"] * 4

    receiver.poison = None
    log.resend(log.list_dead(10))
    drain(log, webhook)
    assert log.list_dead(10) == []
    assert [one["generation"] for one in receiver.taken[6:]] == [1, 1, 2, 3]
    assert len(drop_repetitions(receiver.taken)) == 10


def test_a_webhook_that_hangs_does_not_delay_the_stream(
    sqlite_log, stream, httpserver, webhook, monkeypatch
):
    monkeypatch.setattr(sensors, "TICK_SECONDS", 0)
    catalogue, log = sqlite_log
    log.open_webhook()
    complete(catalogue, "a")
    called, released = threading.Event(), threading.Event()

    def hang(request):
        called.set()
        released.wait(60)
        return Response("", 200)

    httpserver.expect_request("/hook").respond_with_handler(hang)
    resources = {"event_log": log, "event_stream": stream, "event_webhook": webhook}
    said = []

    def tick(sensor):
        with dg.DagsterInstance.ephemeral() as instance:
            context = dg.build_sensor_context(instance=instance, resources=resources)
            said.append(sensor(context).skip_message)

    posting = threading.Thread(target=tick, args=[sensors.event_webhook_sensor])
    posting.start()
    assert called.wait(60)
    tick(sensors.event_webhook_sensor)
    tick(sensors.event_sensor)
    assert said == ["0 events sent. an earlier tick is still at work.", "2 events sent."]
    assert len(read_stream(stream)) == 2
    released.set()
    posting.join()
    assert said[2] == "2 events sent."

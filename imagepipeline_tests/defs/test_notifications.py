"""Administrators get one message per failure, or a digest; none is lost while a channel is down."""

from datetime import timedelta

import dagster as dg
import pytest

from imagepipeline.defs.notifications import DIGEST_ABOVE, notification_sensor
from imagepipeline.errors import NoticeRefusedError, NotificationError
from imagepipeline.models import now_utc
from imagepipeline.stores.ledger import Ledger


class ScriptedNotifier:
    def __init__(self, channel="webhook"):
        self.channel = channel
        self.sent = []
        self.is_down = False
        self.refused = ()

    def send(self, failures):
        if any(row["image_id"] in self.refused for row in failures):
            raise NoticeRefusedError("the webhook answered 400")
        if self.is_down:
            raise NotificationError("the webhook did not answer")
        self.sent.append([row["image_id"] for row in failures])

    def send_pause(self, pause):
        self.sent.append(pause.reason)


@pytest.fixture
def tick(outbox, instance, ledger):
    def tick(*notifiers):
        resources = {"outbox": outbox, "ledger": ledger, "notifiers": list(notifiers)}
        return notification_sensor(
            dg.build_sensor_context(instance=instance, resources=resources)
        ).skip_message

    return tick


@pytest.fixture
def fail(catalogue):
    def fail(image_id):
        catalogue.fail(catalogue.claim_anew(image_id, "run"), "corrupt", "cut off")

    return fail


def test_every_failure_is_sent_once_on_every_channel(tick, fail):
    webhook, mail = ScriptedNotifier(), ScriptedNotifier("mail")
    fail("a")
    for _ in range(3):
        tick(webhook, mail)
    assert webhook.sent == mail.sent == [["a"]]


def test_a_failure_of_a_new_generation_is_sent_again(tick, fail):
    webhook = ScriptedNotifier()
    for _ in range(2):
        fail("a")
        tick(webhook)
    assert webhook.sent == [["a"], ["a"]]


def test_no_failure_is_lost_while_a_channel_is_down(tick, fail):
    webhook, mail = ScriptedNotifier(), ScriptedNotifier("mail")
    webhook.is_down = True
    fail("a")
    assert "did not answer" in tick(webhook, mail)
    assert mail.sent == [["a"]]
    webhook.is_down = False
    tick(webhook, mail)
    assert webhook.sent == mail.sent == [["a"]]


def test_many_failures_at_once_are_one_message(tick, fail):
    webhook = ScriptedNotifier()
    names = [f"i{number}" for number in range(DIGEST_ABOVE + 1)]
    for name in names:
        fail(name)
    tick(webhook)
    assert webhook.sent == [names]


def test_completed_images_send_no_message(tick, catalogue):
    webhook = ScriptedNotifier()
    catalogue.hand_back(catalogue.claim_anew("a", "run"), "x")
    tick(webhook)
    assert webhook.sent == []


def test_without_a_notifier_failures_wait_in_the_outbox(tick, fail, outbox):
    fail("a")
    assert tick() == "No webhook or mail server is set."
    assert len(outbox.list_unsent("mail")) == 1


def test_a_pause_is_sent_once_on_every_channel(tick, ledger):
    webhook, mail = ScriptedNotifier("webhook"), ScriptedNotifier("mail")
    ledger.pause("quota", "no credit", 600)
    for _ in range(2):
        tick(webhook, mail)
    assert (webhook.sent, mail.sent) == (["quota"], ["quota"])


def test_a_new_channel_is_told_of_no_pause_that_ended_long_ago(tick, sqlite_catalogue_url):
    now = [now_utc() - timedelta(days=8)]
    ledger = Ledger(sqlite_catalogue_url, lambda: now[0])
    ledger.pause("budget", "used up", 600)
    ledger.resume()
    ledger.pause("auth", "a bad key", None)
    now[0] = now_utc()
    ledger.pause("quota", "no credit", 600)
    ledger.resume("quota")
    webhook = ScriptedNotifier()
    tick(webhook)
    assert webhook.sent == ["auth", "quota"]
    ledger.close()


def test_a_refused_message_is_retried_without_delaying_others(tick, fail, ledger):
    webhook = ScriptedNotifier()
    webhook.refused = ("a",)
    ledger.pause("quota", "no credit", 600)
    for name in ("a", "b", "c"):
        fail(name)
    assert "answered 400" in tick(webhook)
    assert webhook.sent == ["quota", ["b"], ["c"]]
    webhook.refused = ()
    tick(webhook)
    assert webhook.sent == ["quota", ["b"], ["c"], ["a"]]


def test_failures_are_sent_even_if_a_pause_cannot_be(tick, fail, ledger):
    webhook = ScriptedNotifier()

    def refuse(pause):
        raise NoticeRefusedError("the webhook answered 400")

    webhook.send_pause = refuse
    ledger.pause("quota", "no credit", 600)
    fail("a")
    assert "answered 400" in tick(webhook)
    assert webhook.sent == [["a"]]


def test_an_error_on_one_channel_does_not_affect_the_other(tick, fail):
    webhook, mail = ScriptedNotifier("webhook"), ScriptedNotifier("mail")
    webhook.send = lambda failures: 1 / 0
    fail("a")
    assert "webhook: ZeroDivisionError was raised." in tick(webhook, mail)
    assert mail.sent == [["a"]]

"""The ledger records paid calls and pauses on both SQLite and Postgres."""

from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.models import PaidCall, Upload
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.ledger import Ledger

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Clock:
    def __init__(self):
        self.now = NOON

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(catalogue_url, clock):
    ledger = Ledger(catalogue_url, clock)
    yield ledger
    ledger.close()


def call(stage="metadata", model="m", outcome="answered", tokens=(100, 10), cost=0.5):
    return PaidCall("a", 1, stage, "openai", model, outcome, *tokens, cost, 1.0, 0.0)


def test_costs_are_summed_by_model_stage_and_day(ledger, clock):
    ledger.record(call())
    ledger.record(call(outcome="bad_output"))
    ledger.record(call(outcome="provider_unavailable", tokens=(None, None), cost=None))
    clock.now += timedelta(days=1)
    ledger.record(call("embedding", "e", tokens=(7, 0), cost=None))
    by_model = {row["model"]: row for row in ledger.summarize("model")}
    assert by_model["m"] == {
        "model": "m",
        "calls": 3,
        "answered": 1,
        "tokens_in": 200,
        "tokens_out": 20,
        "cost_usd": 1.0,
        "unpriced": 0,
    }
    assert (by_model["e"]["calls"], by_model["e"]["unpriced"], by_model["e"]["cost_usd"]) == (
        1,
        1,
        0,
    )
    assert [row["stage"] for row in ledger.summarize("stage")] == ["embedding", "metadata"]
    assert [(row["day"], row["calls"]) for row in ledger.summarize("day")] == [
        ("2026-11-23", 3),
        ("2026-11-24", 1),
    ]
    assert [row["calls"] for row in ledger.summarize("model", since=NOON + timedelta(days=1))] == [
        1
    ]
    assert ledger.sum_cost_usd(NOON) == 1.0
    assert ledger.sum_cost_usd(NOON + timedelta(hours=1)) == 0


def test_days_are_in_utc_whatever_the_sessions_time_zone(postgres_catalogue_url, clock):
    ledger = Ledger(postgres_catalogue_url + "&options=-c%20timezone%3DPacific/Kiritimati", clock)
    ledger.record(call())
    assert [row["day"] for row in ledger.summarize("day")] == ["2026-11-23"]
    ledger.close()


def test_of_an_erased_image_only_the_cost_is_recorded_also_if_it_is_back(catalogue_url, ledger):
    catalogue = Catalogue(catalogue_url)

    def record(generation):
        numbers = (800, 60, 0.25, 2.0, 0.0)
        ledger.record(
            PaidCall("a", generation, "metadata", "openai", "m", "answered", *numbers),
            f"key-{generation}",
            f"answer {generation}",
        )

    catalogue.accept([Upload("a")])
    claim = catalogue.claim("a", 1, "run")
    catalogue.cancel("a", "it is being erased")
    Erasures(catalogue_url).remove("a", claim.fence, [])
    catalogue.accept([Upload("a")])
    record(1)
    assert (ledger.find_answer("key-1"), catalogue.sum_cost_usd("a")) == (None, None)
    record(catalogue.get("a")["generation"])
    assert (ledger.find_answer("key-2"), catalogue.sum_cost_usd("a")) == ("answer 2", 0.25)
    assert ledger.summarize("model")[0]["cost_usd"] == 0.5
    catalogue.close()


def test_a_pause_is_over_after_its_time_but_stays_until_it_is_resumed(ledger, clock):
    ledger.pause("auth", "bad key", 600)
    [pause] = ledger.list_pauses()
    assert (pause.reason, pause.message, pause.is_over) == ("auth", "bad key", False)
    assert pause.until == NOON + timedelta(seconds=600)
    clock.now += timedelta(seconds=600)
    assert [pause.is_over for pause in ledger.list_pauses()] == [True]
    assert ledger.resume() == 1
    assert ledger.list_pauses() == []


def test_pausing_again_extends_the_pause_without_another_alert(ledger, clock):
    ledger.pause("auth", "bad key", 600)
    ledger.mark_told("webhook", ledger.list_untold("webhook"))
    clock.now += timedelta(seconds=700)
    ledger.pause("auth", "bad key", 600)
    assert [pause.is_over for pause in ledger.list_pauses()] == [False]
    assert ledger.list_untold("webhook") == []
    assert len(ledger.list_untold("mail")) == 1
    ledger.resume("auth")
    ledger.pause("auth", "bad key", 600)
    assert len(ledger.list_untold("webhook")) == 1


def test_a_pause_without_an_end_must_be_resumed_by_a_person(ledger, clock):
    ledger.pause("quota", "no credit", None)
    clock.now += timedelta(days=365)
    assert [pause.is_over for pause in ledger.list_pauses()] == [False]
    assert ledger.resume("budget") == 0
    assert ledger.resume("quota") == 1

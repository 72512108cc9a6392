"""Paid calls: permitted, priced, written down; and what stops them."""

from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.errors import BadAnswerError, PausedError, PostponedError, ProviderUnavailableError
from imagepipeline.models import CallUsage, Claim, Recipe
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.stores.ledger import Ledger

CLAIM = Claim("a", 1, 1, None)
REMOTE = Recipe("openai", "priced-model")


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 23, 22, tzinfo=UTC)

    def __call__(self):
        return self.now


class Permits:
    """A rate limit that gives what it was told."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.stages = []

    def acquire(self, stage, timeout_seconds):
        self.stages.append(stage)
        return self.answers.pop(0) if self.answers else True

    def get_limits(self):
        return "10/minute"


class Answer:
    def __init__(self, usage):
        self.usage = usage


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(sqlite_catalogue_url, catalogue, clock):
    ledger = Ledger(sqlite_catalogue_url, clock)
    yield ledger
    ledger.close()


@pytest.fixture
def make(ledger, clock):
    def make(call, recipe=REMOTE, limiter=None, report=print, **budgets):
        prices = {"priced-model": (1.0, 10.0)}
        paid_calls = PaidCalls(ledger, limiter or Permits(), prices, **budgets, clock=clock)
        return paid_calls.make(CLAIM, "metadata", recipe, call, report)

    return make


def fail(error):
    def call():
        raise error

    return call


def test_a_local_model_is_asked_at_once_and_nothing_is_written_down(make, ledger):
    answer, receipt = make(lambda: "answer", Recipe("local", "m"), Permits(False))
    assert answer == "answer"
    assert receipt.cost_usd is None
    assert ledger.summarize("model") == []


@pytest.mark.parametrize(
    ("model", "usage", "cost"),
    [
        ("priced-model", CallUsage(1_000_000, 100_000), 2.0),
        ("priced-model", CallUsage(1_000_000, 100_000, 0.7), 0.7),  # the provider knows better
        ("other-model", CallUsage(100, 10), None),
        ("priced-model", None, None),
    ],
)
def test_a_call_costs_what_the_provider_says_or_the_price_table(make, ledger, model, usage, cost):
    _, receipt = make(lambda: Answer(usage), Recipe("openai", model))
    assert receipt.cost_usd == cost
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"], row["cost_usd"]) == (1, 1, cost or 0)


def test_a_failed_call_is_written_down_with_what_it_is_charged(make, ledger):
    charged = BadAnswerError("prose")
    charged.usage = CallUsage(1_000_000, 0)
    for error in (charged, ProviderUnavailableError("busy")):
        with pytest.raises(type(error)):
            make(fail(error))
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"], row["cost_usd"]) == (2, 0, 1.0)


def test_without_a_permit_the_image_waits_and_nothing_is_asked(make, ledger):
    with pytest.raises(PostponedError, match="rate limit"):
        make(fail(AssertionError("asked")), limiter=Permits(False, False))
    assert ledger.summarize("model") == []


def test_a_bad_key_pauses_everything_until_one_answer_comes(make, ledger, clock):
    with pytest.raises(PausedError):
        make(fail(PausedError("auth", "bad key", 600)))
    with pytest.raises(PausedError, match="bad key"):
        make(fail(AssertionError("asked")))
    clock.now += timedelta(seconds=601)
    with pytest.raises(PausedError):
        make(fail(PausedError("auth", "bad key", 600)))
    assert [pause.is_over for pause in ledger.list_pauses()] == [False]
    clock.now += timedelta(seconds=601)
    make(lambda: Answer(None))
    assert ledger.list_pauses() == []
    assert len(ledger.list_untold("mail")) == 1  # one alert for it all


def test_a_daily_budget_pauses_until_midnight_and_goes_on_by_itself(make, ledger, clock):
    make(lambda: Answer(CallUsage(1_000_000)), daily_budget_usd=1.0)
    with pytest.raises(PausedError, match=r"daily budget of 1 USD is used up \(1.00 USD\): .* 2026-11-24 00:00"):
        make(fail(AssertionError("asked")), daily_budget_usd=1.0)
    [pause] = ledger.list_pauses()
    assert (pause.reason, pause.until) == ("budget", datetime(2026, 11, 24, tzinfo=UTC))
    clock.now = datetime(2026, 11, 24, 0, 0, 1, tzinfo=UTC)
    make(lambda: Answer(CallUsage(1)), daily_budget_usd=1.0)
    assert ledger.list_pauses() == []


def test_a_monthly_budget_pauses_until_the_first(make, ledger, clock):
    make(lambda: Answer(CallUsage(1_000_000)), monthly_budget_usd=1.0)
    clock.now = datetime(2026, 11, 30, tzinfo=UTC)
    with pytest.raises(PausedError, match=r"monthly budget .* 2026-12-01 00:00"):
        make(fail(AssertionError("asked")), monthly_budget_usd=1.0)
    clock.now = datetime(2026, 12, 1, tzinfo=UTC)
    make(lambda: Answer(CallUsage(1)), monthly_budget_usd=1.0)


def test_a_call_that_must_wait_says_so(make):
    lines = []
    make(lambda: Answer(None), limiter=Permits(True), report=lines.append)
    assert lines == []
    make(lambda: Answer(None), limiter=Permits(False, True), report=lines.append)
    assert lines == ["The call waits for the rate limit of paid calls (10/minute)."]


def test_an_answer_ends_no_pause_that_lasts_and_none_of_another_stage(make, ledger, clock):
    ledger.pause("auth", "the embedding model answered 401", 600, "embedding")

    def answer_while_another_run_meets_the_budget():
        ledger.pause("budget", "used up", 7200)
        return Answer(None)

    clock.now += timedelta(seconds=601)
    make(answer_while_another_run_meets_the_budget)
    assert [(pause.reason, pause.is_over) for pause in ledger.list_pauses()] == [("budget", False), ("auth", True)]

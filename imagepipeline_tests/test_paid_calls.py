"""Paid calls are permitted, priced and recorded; pauses, budgets and limits stop them."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.errors import (
    BadAnswerError,
    CatalogueDownError,
    ForbiddenError,
    PausedError,
    PostponedError,
    ProviderTimedOutError,
    ProviderUnavailableError,
    RateLimitError,
    RefusedError,
)
from imagepipeline.models import Claim, Recipe
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.stores import database
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.stores.limiter import Permits as LeftPermits
from imagepipeline.usage import CallUsage

REMOTE, NEW, LOCAL = Recipe("openai", "priced-model"), Recipe("openai", "new"), Recipe("local", "m")


class Clock:
    def __init__(self):
        self.now = datetime(2026, 11, 23, 22, tzinfo=UTC)

    def __call__(self):
        return self.now


class Permits:
    """A rate limiter with scripted answers."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.stages = []

    def acquire(self, stage, timeout_seconds):
        self.stages.append(stage)
        return self.answers.pop(0) if self.answers else True

    def get_limits(self):
        return "10/minute"

    def look(self, stage, min_window_seconds=0):
        return LeftPermits(0, 3600, True)


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
    def make(call, recipe=REMOTE, limiter=None, report=print, image_id="a", **budgets):
        prices = {"priced-model": (1.0, 10.0)}
        paid_calls = PaidCalls(ledger, limiter or Permits(), prices, **budgets, clock=clock)
        return paid_calls.make(Claim(image_id, 1, 1, None), "metadata", recipe, call, report)

    return make


def fail(error):
    def call():
        raise error

    return call


def test_a_call_to_a_local_model_is_neither_limited_nor_recorded(make, ledger):
    answer, receipt = make(lambda: "answer", Recipe("local", "m"), Permits(False))
    assert answer == "answer"
    assert receipt.cost_usd is None
    assert ledger.summarize("model") == []


@pytest.mark.parametrize(
    ("model", "usage", "cost"),
    [
        ("priced-model", CallUsage(1_000_000, 100_000), 2.0),
        # A cost reported by the provider takes precedence.
        ("priced-model", CallUsage(1_000_000, 100_000, 0.7), 0.7),
        ("other-model", CallUsage(100, 10), None),
        ("priced-model", None, None),
    ],
)
def test_the_cost_is_the_providers_or_computed_from_the_price_table(
    make, ledger, model, usage, cost
):
    _, receipt = make(lambda: Answer(usage), Recipe("openai", model))
    assert receipt.cost_usd == cost
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"], row["cost_usd"]) == (1, 1, cost or 0)


def test_a_failed_call_is_recorded_with_its_cost(make, ledger):
    charged = BadAnswerError("prose")
    charged.usage = CallUsage(1_000_000, 0)
    for error in (charged, ProviderUnavailableError("busy")):
        with pytest.raises(type(error)):
            make(fail(error))
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"], row["cost_usd"]) == (2, 0, 1.0)


@pytest.mark.parametrize("dies", ["before the commit", "before the reply"])
def test_a_database_that_restarts_loses_no_answer_and_has_none_twice(
    make, ledger, monkeypatch, dies
):
    record, failures = ledger.record, [CatalogueDownError("it restarts")] * 2

    def record_and_die(*call):
        if not failures or dies == "before the reply":
            record(*call)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(ledger, "record", record_and_die)
    monkeypatch.setattr(database, "OUTLAST_INTERVAL_SECONDS", 0)
    make(lambda: Answer(CallUsage(1, 1)))
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"]) == (1, 1)


def test_without_a_permit_the_image_waits_and_no_call_is_made(make, ledger):
    with pytest.raises(
        PostponedError,
        match=r"rate limit .* \(10/minute\) is used up: paid work resumes at 2026-11-23 23:00:00",
    ):
        make(fail(AssertionError("asked")), limiter=Permits(False, False))
    assert ledger.summarize("model") == []


def test_a_bad_key_pauses_all_calls_until_one_is_answered(make, ledger, clock):
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
    assert len(ledger.list_untold("mail")) == 1  # one alert in total


def test_an_exhausted_daily_budget_pauses_until_midnight(make, ledger, clock):
    make(lambda: Answer(CallUsage(1_000_000)), daily_budget_usd=1.0)
    with pytest.raises(
        PausedError, match=r"daily budget of 1 USD is used up \(1.00 USD\): .* 2026-11-24 00:00"
    ):
        make(fail(AssertionError("asked")), daily_budget_usd=1.0)
    [pause] = ledger.list_pauses()
    assert (pause.reason, pause.until) == ("budget", datetime(2026, 11, 24, tzinfo=UTC))
    clock.now = datetime(2026, 11, 24, 0, 0, 1, tzinfo=UTC)
    make(lambda: Answer(CallUsage(1)), daily_budget_usd=1.0)
    assert ledger.list_pauses() == []


def test_an_exhausted_monthly_budget_pauses_until_the_next_month(make, ledger, clock):
    make(lambda: Answer(CallUsage(1_000_000)), monthly_budget_usd=1.0)
    clock.now = datetime(2026, 11, 30, tzinfo=UTC)
    with pytest.raises(PausedError, match=r"monthly budget .* 2026-12-01 00:00"):
        make(fail(AssertionError("asked")), monthly_budget_usd=1.0)
    clock.now = datetime(2026, 12, 1, tzinfo=UTC)
    make(lambda: Answer(CallUsage(1)), monthly_budget_usd=1.0)


def test_a_waiting_call_is_reported(make):
    lines = []
    make(lambda: Answer(None), limiter=Permits(True), report=lines.append)
    assert lines == []
    make(lambda: Answer(None), limiter=Permits(False, True), report=lines.append)
    assert lines == ["The call waits for the rate limit of paid calls (10/minute)."]


def test_an_answer_ends_only_expired_pauses_of_its_own_stage(make, ledger, clock):
    ledger.pause("auth", "the embedding model answered 401", 600, "embedding")

    def answer_while_another_run_meets_the_budget():
        ledger.pause("budget", "used up", 7200)
        return Answer(None)

    clock.now += timedelta(seconds=601)
    make(answer_while_another_run_meets_the_budget)
    assert [(pause.reason, pause.is_over) for pause in ledger.list_pauses()] == [
        ("budget", False),
        ("auth", True),
    ]


@pytest.mark.parametrize(
    "model", ["priced-model-2024-07-18", "priced-model-20240718", "priced-model@2024-07-18"]
)
def test_a_dated_version_of_a_model_has_the_models_price(make, model):
    _, receipt = make(
        lambda: Answer(CallUsage(1_000_000)), Recipe("openai", model), daily_budget_usd=5.0
    )
    assert receipt.cost_usd == 1.0


@pytest.mark.parametrize("budget", ["daily_budget_usd", "monthly_budget_usd"])
def test_with_a_budget_a_call_without_a_price_is_not_made(make, ledger, budget):
    with pytest.raises(
        PostponedError,
        match=r'price of other is unknown: set IMAGEPIPELINE_PRICES to \{"other": \[',
    ):
        make(fail(AssertionError("asked")), Recipe("openai", "other"), **{budget: 5.0})
    assert ledger.summarize("model") == []
    make(lambda: Answer(CallUsage(5)), Recipe("openai", "other"))  # made if there is no budget


def test_a_model_with_reported_costs_needs_no_price(make):
    reporting = Recipe("openai", "reporting")
    make(lambda: Answer(CallUsage(5, 5, 0.01)), reporting)
    make(lambda: Answer(CallUsage(5, 5, 0.01)), reporting, daily_budget_usd=5.0)


@pytest.fixture
def update(ledger, clock):
    """A function that updates the pauses as a tick does, and returns their reasons."""

    def update(prices=None, budget_usd=5.0, vision=NEW, embedder=LOCAL):
        recipes = {"metadata": vision, "embedding": embedder}
        PaidCalls(
            ledger, Permits(), prices or {}, budget_usd, clock=clock, recipes=recipes
        ).update_pauses()
        return [pause.reason for pause in ledger.list_pauses()]

    return update


def test_an_unknown_price_pauses_until_it_is_known(update, ledger):
    assert update() == ["price"]
    assert update() == ["price"]
    assert len(ledger.list_untold("mail")) == 1
    assert update({"new": (1.0, 1.0)}) == []
    assert update() == ["price"]
    assert update(budget_usd=None) == []


def test_the_pause_for_prices_names_all_models_and_follows_the_settings(update, ledger):
    update(embedder=Recipe("openrouter", "vendor/e"))
    [pause] = ledger.list_pauses()
    assert "of new and vendor/e is unknown: set IMAGEPIPELINE_PRICES to" in pause.message
    assert '{"new": [IN, OUT], "vendor/e": [' in pause.message
    update(vision=Recipe("openai", "newer"))
    [pause] = ledger.list_pauses()
    assert "of newer is unknown" in pause.message


def test_raising_a_budget_ends_its_pause(update, make, ledger):
    make(lambda: Answer(CallUsage(5_000_000)))
    free = {"new": (0.0, 0.0)}
    assert update(free) == ["budget"]  # before any run finds out
    assert update(free, budget_usd=6.0) == []
    assert update(free) == ["budget"]
    assert update(free, budget_usd=None) == []


def test_a_pause_ends_when_its_model_is_no_longer_used(update, ledger, clock):
    ledger.pause("auth", "the vision model answered 401", 600, "metadata")
    ledger.pause("auth", "the embedding model answered 401", 600, "embedding")
    update(budget_usd=None)
    assert [pause.stage for pause in ledger.list_pauses()] == ["metadata"]
    ledger.pause("auth", "a search was answered 401", 600)
    update(budget_usd=None, vision=LOCAL)
    assert ledger.list_pauses() == []


def test_a_model_that_stops_reporting_costs_needs_a_price(make):
    other = Recipe("openai", "other")
    make(lambda: Answer(CallUsage(5, 5, 0.01)), other)
    make(lambda: Answer(CallUsage(5, 5)), other, daily_budget_usd=5.0)  # without a cost
    with pytest.raises(PostponedError, match="price of other is unknown"):
        make(fail(AssertionError("asked")), other, daily_budget_usd=5.0)


def test_a_reported_cost_of_zero_does_not_replace_a_price(make):
    other = Recipe("openai", "other")
    make(lambda: Answer(CallUsage(5, 5, 0.0)), other)
    with pytest.raises(PostponedError, match=r"\[0, 0\] if it is free"):
        make(fail(AssertionError("asked")), other, daily_budget_usd=5.0)


def test_the_price_counts_if_the_reported_cost_is_zero(make):
    _, receipt = make(lambda: Answer(CallUsage(1_000_000, 0, 0.0)))
    assert receipt.cost_usd == 1.0


def test_a_model_that_reports_no_usage_is_called_only_once_under_a_budget(make, ledger, clock):
    make(lambda: Answer(None), daily_budget_usd=5.0)
    with pytest.raises(PostponedError, match="calls to priced-model do not report their usage"):
        make(fail(AssertionError("asked")), daily_budget_usd=5.0)
    free = PaidCalls(ledger, Permits(), {"priced-model": (0.0, 0.0)}, 5.0, clock=clock)
    assert free.make(None, "search", REMOTE, lambda: Answer(None))


def test_earlier_calls_without_a_price_do_not_stop_a_priced_model(ledger, clock):
    paid_calls = PaidCalls(ledger, Permits(), {}, clock=clock)
    paid_calls.make(None, "search", NEW, lambda: Answer(CallUsage(5)))
    priced = PaidCalls(ledger, Permits(), {"new": (1.0, 1.0)}, 5.0, clock=clock)
    assert priced.make(None, "search", NEW, lambda: Answer(CallUsage(5)))


def test_a_forbidden_search_does_not_pause_other_calls(ledger, clock):
    paid_calls = PaidCalls(ledger, Permits(), {}, clock=clock)
    with pytest.raises(ForbiddenError):
        paid_calls.make(None, "search", REMOTE, fail(ForbiddenError("auth", "answered 403", 60)))
    assert ledger.list_pauses() == []


def test_a_call_whose_run_is_stopped_does_not_count_as_answered(make, ledger):
    with pytest.raises(KeyboardInterrupt):
        make(fail(KeyboardInterrupt()), daily_budget_usd=1.0)
    assert ledger.find_last_usage("openai", "priced-model") is None
    [row] = ledger.summarize("model")
    assert (row["calls"], row["answered"]) == (1, 0)
    make(lambda: Answer(CallUsage(1, 1)), daily_budget_usd=1.0)  # no usage is missed


def test_a_call_that_timed_out_counts_as_unanswered(make, ledger, sqlite_catalogue_url):
    with pytest.raises(ProviderTimedOutError):
        make(fail(ProviderTimedOutError("too long")))
    assert ledger.count_unanswered("metadata") == {"a": 1}


def test_an_image_that_is_forbidden_while_others_are_answered_is_refused(make, ledger, clock):
    forbidden = ForbiddenError("auth", "answered 403", 60)
    with pytest.raises(ForbiddenError):
        make(fail(forbidden))
    assert [pause.reason for pause in ledger.list_pauses()] == ["auth"]
    clock.now += timedelta(seconds=61)
    with pytest.raises(ForbiddenError):  # no answer since, so it may be the key
        make(fail(forbidden))
    clock.now += timedelta(seconds=61)
    make(lambda: Answer(None), image_id="b")
    with pytest.raises(RefusedError, match="answered 403 for this picture, but accepts others"):
        make(fail(forbidden))
    assert ledger.list_pauses() == []


def test_a_bad_key_does_not_refuse_an_image_that_was_forbidden_long_ago(make, ledger, clock):
    with pytest.raises(ForbiddenError):
        make(fail(ForbiddenError("auth", "answered 403", 60)))
    clock.now += timedelta(seconds=61)
    for image_id in "ba":
        make(lambda: Answer(None), image_id=image_id)
    clock.now += timedelta(days=30)
    with pytest.raises(ForbiddenError):
        make(fail(ForbiddenError("auth", "answered 403", 60)))


def test_a_provider_that_is_down_causes_a_pause_but_no_failed_image(make, ledger, clock):
    down = ProviderUnavailableError("answered 503")
    for image_id in "abcab":
        with pytest.raises(ProviderUnavailableError):
            make(fail(down), image_id=image_id)
    with pytest.raises(PausedError, match="for several images in a row"):
        make(fail(down), image_id="a")  # its third attempt
    assert [(pause.reason, pause.stage) for pause in ledger.list_pauses()] == [
        ("provider_down", "metadata")
    ]
    clock.now += timedelta(seconds=31)
    with pytest.raises(PausedError):  # the probe, at its first attempt
        make(fail(down), image_id="d")
    clock.now += timedelta(seconds=31)
    make(lambda: Answer(None), image_id="e")
    assert ledger.list_pauses() == []


def test_an_image_that_alone_gets_no_answer_uses_up_its_attempts(make, ledger):
    for image_id in "bc":
        with pytest.raises(ProviderUnavailableError):
            make(fail(ProviderUnavailableError("busy")), image_id=image_id)
    make(lambda: Answer(None), image_id="d")
    for _ in range(3):
        with pytest.raises(ProviderUnavailableError):
            make(fail(ProviderUnavailableError("busy")))
    assert ledger.list_pauses() == []


@pytest.fixture
def limiter(redis_url):
    with closing(CallLimiter(redis_url, "test", "off")) as limiter:
        yield limiter
        limiter.set_limits(None)


def test_calls_for_planned_images_leave_permits_to_uploads(ledger, clock, limiter, monkeypatch):
    monkeypatch.setattr("imagepipeline.paid_calls.MAX_WAIT_SECONDS", 0)
    limiter.set_limits("7/minute")
    uploads = [True]
    calls = PaidCalls(ledger, limiter, {}, clock=clock, has_uploads=lambda: uploads[0])

    def make(is_planned):
        claim = Claim("a", 1, 1, None, is_planned=is_planned)
        return calls.make(claim, "metadata", REMOTE, lambda: Answer(CallUsage(1, 1)))

    for _ in range(2):
        make(is_planned=True)
    with pytest.raises(RateLimitError):
        make(is_planned=True)
    make(is_planned=False)
    uploads[0] = False
    make(is_planned=True)


def test_without_a_limit_calls_for_planned_images_do_not_wait(ledger, clock, limiter):
    calls = PaidCalls(ledger, limiter, {}, clock=clock, has_uploads=lambda: True)
    limiter.set_limits("off")
    claim = Claim("a", 1, 1, None, is_planned=True)
    calls.make(claim, "metadata", REMOTE, lambda: Answer(CallUsage(1, 1)))

"""Paid calls: permitted, priced, written down; and what stops them."""

from datetime import UTC, datetime, timedelta

import pytest

from imagepipeline.errors import (
    BadAnswerError,
    ForbiddenError,
    PausedError,
    PostponedError,
    ProviderTimedOutError,
    ProviderUnavailableError,
    RefusedError,
)
from imagepipeline.models import Claim, Recipe
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import Permits as LeftPermits
from imagepipeline.usage import CallUsage

REMOTE, NEW, LOCAL = Recipe("openai", "priced-model"), Recipe("openai", "new"), Recipe("local", "m")


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
    with pytest.raises(
        PostponedError,
        match=r"rate limit .* \(10/minute\) is used up: paid work resumes at 2026-11-23 23:00:00",
    ):
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
    with pytest.raises(
        PausedError, match=r"daily budget of 1 USD is used up \(1.00 USD\): .* 2026-11-24 00:00"
    ):
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
    assert [(pause.reason, pause.is_over) for pause in ledger.list_pauses()] == [
        ("budget", False),
        ("auth", True),
    ]


@pytest.mark.parametrize(
    "model", ["priced-model-2024-07-18", "priced-model-20240718", "priced-model@2024-07-18"]
)
def test_a_version_of_a_model_costs_what_the_model_does(make, model):
    _, receipt = make(
        lambda: Answer(CallUsage(1_000_000)), Recipe("openai", model), daily_budget_usd=5.0
    )
    assert receipt.cost_usd == 1.0


@pytest.mark.parametrize("budget", ["daily_budget_usd", "monthly_budget_usd"])
def test_with_a_budget_a_call_of_unknown_price_is_not_made(make, ledger, budget):
    with pytest.raises(
        PostponedError,
        match=r'price of other is unknown: set IMAGEPIPELINE_PRICES to \{"other": \[',
    ):
        make(fail(AssertionError("asked")), Recipe("openai", "other"), **{budget: 5.0})
    assert ledger.summarize("model") == []
    make(lambda: Answer(CallUsage(5)), Recipe("openai", "other"))  # without a budget it is


def test_a_model_whose_cost_the_provider_reports_has_a_price(make):
    reporting = Recipe("openai", "reporting")
    make(lambda: Answer(CallUsage(5, 5, 0.01)), reporting)
    make(lambda: Answer(CallUsage(5, 5, 0.01)), reporting, daily_budget_usd=5.0)


@pytest.fixture
def update(ledger, clock):
    """A tick's look at what follows from settings and ledger; gives the pauses after it."""

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
    assert (
        'of new and vendor/e is unknown: set IMAGEPIPELINE_PRICES to {"new": [IN, OUT], "vendor/e": ['
        in pause.message
    )
    update(vision=Recipe("openai", "newer"))
    [pause] = ledger.list_pauses()
    assert "of newer is unknown" in pause.message


def test_a_budget_that_was_raised_ends_its_pause_without_a_person(update, make, ledger):
    make(lambda: Answer(CallUsage(5_000_000)))
    free = {"new": (0.0, 0.0)}
    assert update(free) == ["budget"]  # before any run has failed to find out
    assert update(free, budget_usd=6.0) == []
    assert update(free) == ["budget"]
    assert update(free, budget_usd=None) == []


def test_a_pause_ends_when_its_model_is_not_asked_any_more(update, ledger, clock):
    ledger.pause("auth", "the vision model answered 401", 600, "metadata")
    ledger.pause("auth", "the embedding model answered 401", 600, "embedding")
    update(budget_usd=None)
    assert [pause.stage for pause in ledger.list_pauses()] == ["metadata"]
    ledger.pause("auth", "a search was answered 401", 600)
    update(budget_usd=None, vision=LOCAL)
    assert ledger.list_pauses() == []


def test_a_price_that_was_taken_away_is_not_known_any_more(make):
    other = Recipe("openai", "other")
    make(lambda: Answer(CallUsage(5, 5, 0.01)), other)
    make(
        lambda: Answer(CallUsage(5, 5)), other, daily_budget_usd=5.0
    )  # it has stopped reporting costs
    with pytest.raises(PostponedError, match="price of other is unknown"):
        make(fail(AssertionError("asked")), other, daily_budget_usd=5.0)


def test_a_reported_cost_of_nothing_is_no_price(make):
    other = Recipe("openai", "other")
    make(lambda: Answer(CallUsage(5, 5, 0.0)), other)
    with pytest.raises(PostponedError, match=r"\[0, 0\] if it is free"):
        make(fail(AssertionError("asked")), other, daily_budget_usd=5.0)


def test_where_nothing_is_reported_as_cost_the_price_counts(make):
    _, receipt = make(lambda: Answer(CallUsage(1_000_000, 0, 0.0)))
    assert receipt.cost_usd == 1.0


def test_a_model_that_does_not_say_what_it_uses_is_asked_once_under_a_budget(make, ledger, clock):
    make(lambda: Answer(None), daily_budget_usd=5.0)
    with pytest.raises(PostponedError, match="calls to priced-model do not report their usage"):
        make(fail(AssertionError("asked")), daily_budget_usd=5.0)
    free = PaidCalls(ledger, Permits(), {"priced-model": (0.0, 0.0)}, 5.0, clock=clock)
    assert free.make(None, "search", REMOTE, lambda: Answer(None))


def test_an_unpriced_past_does_not_stop_a_model_that_has_a_price_now(ledger, clock):
    paid_calls = PaidCalls(ledger, Permits(), {}, clock=clock)
    paid_calls.make(None, "search", NEW, lambda: Answer(CallUsage(5)))
    priced = PaidCalls(ledger, Permits(), {"new": (1.0, 1.0)}, 5.0, clock=clock)
    assert priced.make(None, "search", NEW, lambda: Answer(CallUsage(5)))


def test_a_search_that_is_forbidden_is_nobody_elses_trouble(ledger, clock):
    paid_calls = PaidCalls(ledger, Permits(), {}, clock=clock)
    with pytest.raises(ForbiddenError):
        paid_calls.make(None, "search", REMOTE, fail(ForbiddenError("auth", "answered 403", 60)))
    assert ledger.list_pauses() == []


def test_a_call_that_took_too_long_is_an_outcome_of_its_own(make, ledger, sqlite_catalogue_url):
    with pytest.raises(ProviderTimedOutError):
        make(fail(ProviderTimedOutError("too long")))
    assert ledger.count_unanswered("metadata") == {"a": 1}


def test_a_picture_that_is_forbidden_when_others_are_answered_is_refused(make, ledger, clock):
    forbidden = ForbiddenError("auth", "answered 403", 60)
    with pytest.raises(ForbiddenError):
        make(fail(forbidden))
    assert [pause.reason for pause in ledger.list_pauses()] == ["auth"]
    clock.now += timedelta(seconds=61)
    with pytest.raises(ForbiddenError):  # nobody was answered since: it may be the key
        make(fail(forbidden))
    clock.now += timedelta(seconds=61)
    make(lambda: Answer(None), image_id="b")
    with pytest.raises(RefusedError, match="answered 403 for this picture, but accepts others"):
        make(fail(forbidden))
    assert ledger.list_pauses() == []


def test_a_key_that_is_bad_today_refuses_no_picture_that_met_another_bad_key_a_month_ago(
    make, ledger, clock
):
    with pytest.raises(ForbiddenError):
        make(fail(ForbiddenError("auth", "answered 403", 60)))
    clock.now += timedelta(seconds=61)
    for image_id in "ba":
        make(lambda: Answer(None), image_id=image_id)
    clock.now += timedelta(days=30)
    with pytest.raises(ForbiddenError):
        make(fail(ForbiddenError("auth", "answered 403", 60)))


def test_a_provider_that_is_down_for_several_images_pauses_and_fails_none(make, ledger, clock):
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


def test_an_image_that_alone_gets_no_answer_fails_by_its_attempts(make, ledger):
    for image_id in "bc":
        with pytest.raises(ProviderUnavailableError):
            make(fail(ProviderUnavailableError("busy")), image_id=image_id)
    make(lambda: Answer(None), image_id="d")
    for _ in range(3):
        with pytest.raises(ProviderUnavailableError):
            make(fail(ProviderUnavailableError("busy")))
    assert ledger.list_pauses() == []

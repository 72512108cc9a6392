"""Paid calls: made only if nothing is paused, the budget holds and the rate limit permits; always written down."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from imagepipeline.errors import ImagePipelineError, PausedError, PostponedError
from imagepipeline.models import CallUsage, Claim, PaidCall, Recipe, now_utc
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.limiter import CallLimiter

MAX_WAIT_SECONDS = 180  # for the rate limit; then the image gives its slot to another


class Answer(Protocol):
    """What a call gives; local models report no usage."""

    @property
    def usage(self) -> CallUsage | None:
        """What it used."""


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Receipt:
    """What one call took: seconds waited for the rate limit, seconds of the call, and its cost where known."""

    waited_seconds: float = 0
    seconds: float = 0
    cost_usd: float | None = None


class PaidCalls:
    """Makes the calls of a run to its providers.

    Args:
        ledger: where calls and pauses are written.
        limiter: who permits them.
        prices: US dollars per million tokens in and out, by model, for providers that report no cost.
        daily_budget_usd: over it everything waits for midnight (UTC); None for no such budget.
        monthly_budget_usd: over it everything waits for the first of the month.
        clock: gives the time.
    """

    def __init__(
        self,
        ledger: Ledger,
        limiter: CallLimiter,
        prices: Mapping[str, tuple[float, float]],
        daily_budget_usd: float | None = None,
        monthly_budget_usd: float | None = None,
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        self._ledger = ledger
        self._limiter = limiter
        self._prices = prices
        self._budgets = {"daily": daily_budget_usd, "monthly": monthly_budget_usd}
        self._clock = clock

    def make(
        self,
        claim: Claim | None,
        stage: str,
        recipe: Recipe,
        call: Callable[[], A],
        report: Callable[[str], None] = lambda line: None,
    ) -> tuple[A, Receipt]:
        """The call's answer and what it took; `claim` is None for a call that is for no image.

        `report` is told when the call must wait for the rate limit.
        A local model is asked at once, and nothing is written down.

        Raises:
            PausedError: no paid call may be made now.
            PostponedError: there was no permit within three minutes, or Redis does not answer.
            ImagePipelineError: whatever the call raises.
        """
        if recipe.provider == "local":
            return call(), Receipt()
        self._check()
        waited_seconds = self._wait(stage, report)
        started = time.monotonic()
        outcome, usage = "answered", None
        try:
            answer = call()
            usage = answer.usage
        except ImagePipelineError as error:
            outcome, usage = getattr(error, "reason", "unexpected"), getattr(error, "usage", None)
            if isinstance(error, PausedError):
                # A search's or the doctor's pause is ended by any answer: neither may ever ask again.
                self._ledger.pause(error.reason, str(error), error.pause_seconds, stage if claim else None)
            raise
        finally:
            receipt = Receipt(waited_seconds, round(time.monotonic() - started, 3), self._price(recipe.model, usage))
            self._ledger.record(
                PaidCall(
                    image_id=claim.image_id if claim else None,
                    generation=claim.generation if claim else None,
                    stage=stage,
                    provider=recipe.provider,
                    model=recipe.model,
                    outcome=outcome,
                    tokens_in=usage.tokens_in if usage else None,
                    tokens_out=usage.tokens_out if usage else None,
                    cost_usd=receipt.cost_usd,
                    seconds=receipt.seconds,
                    waited_seconds=receipt.waited_seconds,
                )
            )
        self._ledger.end_probation(stage)
        return answer, receipt

    def _check(self) -> None:
        pause = next((pause for pause in self._ledger.list_pauses() if not pause.is_over), None)
        if pause is not None:
            raise PausedError(pause.reason, pause.message, None)
        now = self._clock()
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        month = midnight.replace(day=1)
        ends = {"daily": midnight + timedelta(days=1), "monthly": (month + timedelta(days=32)).replace(day=1)}
        for name, since in (("monthly", month), ("daily", midnight)):
            budget_usd = self._budgets[name]
            if budget_usd is not None and (spent := self._ledger.sum_cost_usd(since)) >= budget_usd:
                message = (
                    f"the {name} budget of {budget_usd:g} USD is used up ({spent:.2f} USD): "
                    f"it goes on at {ends[name]:%F %R} UTC"
                )
                pause_seconds = (ends[name] - now).total_seconds()
                self._ledger.pause("budget", message, pause_seconds)
                raise PausedError("budget", message, pause_seconds)

    def _wait(self, stage: str, report: Callable[[str], None]) -> float:
        started = time.monotonic()
        if self._limiter.acquire(stage, 0):
            return 0.0
        report(f"The call waits for the rate limit of paid calls ({self._limiter.get_limits()}).")
        if not self._limiter.acquire(stage, MAX_WAIT_SECONDS):
            raise PostponedError(f"no paid call was permitted within {MAX_WAIT_SECONDS} s: the rate limit is used up")
        return round(time.monotonic() - started, 3)

    def _price(self, model: str, usage: CallUsage | None) -> float | None:
        if usage is None or usage.cost_usd is not None or model not in self._prices:
            return usage.cost_usd if usage else None
        per_million_in, per_million_out = self._prices[model]
        return (usage.tokens_in * per_million_in + usage.tokens_out * per_million_out) / 1_000_000

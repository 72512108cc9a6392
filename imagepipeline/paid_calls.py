"""Makes paid calls, if pauses, budget and rate limit permit, and records every call."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter

from imagepipeline.errors import (
    ForbiddenError,
    ImagePipelineError,
    PausedError,
    PostponedError,
    ProviderUnavailableError,
    RateLimitError,
    RefusedError,
    TenantSpentError,
)
from imagepipeline.models import Claim, PaidCall, Pause, Recipe, now_utc
from imagepipeline.prices import FREE, explain_missing_usage, explain_unpriced, find_price
from imagepipeline.stores.database import outlast
from imagepipeline.stores.ledger import MESSAGE_CHARACTERS, Ledger
from imagepipeline.stores.limiter import CallLimiter
from imagepipeline.tenants import Tenants
from imagepipeline.text import hash_text
from imagepipeline.usage import CallUsage

MAX_WAIT_SECONDS = 180  # for the rate limit; then the image gives up its slot
# Permits that calls for planned images leave while there are uploads, and how often they look.
LEFT_TO_UPLOADS, POLL_SECONDS = 5, 1.0
START_WINDOW_SECONDS = 30  # images whose permits come later give their slots to others first
# A provider counts as down when the last DOWN_IMAGES images got no answer and one of them has made
# DOWN_CALLS calls. After that, one image probes the provider every DOWN_SECONDS.
DOWN_IMAGES, DOWN_CALLS, DOWN_SECONDS = 3, 3, 30


class Answer(Protocol):
    """The answer to a call."""

    @property
    def usage(self) -> CallUsage | None:
        """The tokens and cost of the call, if reported; local models report none."""


A = TypeVar("A", bound=Answer)


_build_adapter = functools.cache(TypeAdapter)  # it takes a millisecond


class Kept(Generic[A]):
    """How the answer to a question is kept until its result is in place.

    Args:
        stage: The asset for which the question is asked.
        recipe: The model and how it is asked.
        input_sha256: What it is asked about.
        answer_type: The type of the answer.
    """

    def __init__(self, stage: str, recipe: Recipe, input_sha256: str, answer_type: type[A]) -> None:
        self.key = hash_text("\n".join((stage, recipe.version, input_sha256)))
        self.is_paid = recipe.provider != "local"
        self._adapter: TypeAdapter[A] = _build_adapter(answer_type)

    def load(self, content: str) -> A:
        """The answer that `dump_answer` wrote."""
        return self._adapter.validate_json(content)


def dump_answer(answer: Answer) -> str:
    """Returns an answer as it is kept: JSON."""
    adapter: TypeAdapter[Answer] = _build_adapter(type(answer))
    return adapter.dump_json(answer, by_alias=True).decode()


@dataclass(frozen=True)
class Receipt:
    """The seconds a call waited for the rate limit, the seconds it took, and its cost if known."""

    waited_seconds: float = 0
    seconds: float = 0
    cost_usd: float | None = None


class PaidCalls:
    """Makes the calls of a run to its providers.

    Args:
        ledger: Records calls and pauses.
        limiter: Enforces the rate limit.
        prices: US dollars per million tokens in and out, by model, for providers that report no
            cost.
        daily_budget_usd: When it is used up, paid work waits until midnight UTC; None for no limit.
        monthly_budget_usd: When it is used up, paid work waits until the next month; None for no
            limit.
        clock: Returns the current time.
        recipes: The recipes by stage. Only calls of remote models are paid.
        tenants: Know which tenant has used up its budget; None if no tenant has one.
        has_uploads: Whether uploads may need permits, which planned images leave to them.
    """

    def __init__(
        self,
        ledger: Ledger,
        limiter: CallLimiter,
        prices: Mapping[str, tuple[float, float]],
        daily_budget_usd: float | None = None,
        monthly_budget_usd: float | None = None,
        clock: Callable[[], datetime] = now_utc,
        recipes: Mapping[str, Recipe] | None = None,
        tenants: Tenants | None = None,
        has_uploads: Callable[[], bool] = lambda: False,
    ) -> None:
        self._tenants = tenants
        self._has_uploads = has_uploads
        self._all_recipes = recipes or {}
        self._recipes = {
            stage: recipe
            for stage, recipe in self._all_recipes.items()
            if recipe.provider != "local"
        }
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
        kept: Kept[A] | None = None,
    ) -> tuple[A, Receipt]:
        """Makes a call, and records it if the model is remote.

        Calls of local models are made at once, without limits.

        Args:
            claim: The claim on the image; None if the call is not for an image.
            stage: The asset for which the call is made, or `search` or `doctor`.
            recipe: The model that is called.
            call: Makes the call.
            report: Receives a line if the call must wait for the rate limit.
            kept: Where the answer is kept until `forget`; one that is there already is given, and
                no call is made.

        Raises:
            PausedError: Paid work is paused.
            RateLimitError: The rate limit did not permit the call within `MAX_WAIT_SECONDS`.
            TenantSpentError: The tenant's budget of today is used up.
            PostponedError: A budget is set but the price is unknown, or Redis does not answer.
            ImagePipelineError: Whatever the call raises.
        """
        if recipe.provider == "local":
            return call(), Receipt()
        if kept and (earlier := self._find_kept(kept)):
            return earlier, Receipt()
        self.check(recipe)
        if claim and self._tenants and (spent := self._tenants.explain_spent(claim.tenant)):
            raise TenantSpentError(spent)
        waited_seconds = self._wait(stage, report, bool(claim and claim.is_planned))
        try:
            return self._ask(claim, stage, recipe, call, waited_seconds, kept)
        except ForbiddenError as error:
            if claim and self._ledger.is_answered_for_others(claim.image_id, stage, error.reason):
                answer = str(error).partition(":")[0]
                raise RefusedError(
                    f"{answer} for this picture, but accepts others: the picture is refused"
                ) from None
            if claim:  # a forbidden search text must not pause the pipeline
                self._pause(error, claim, stage)
            raise
        except PausedError as error:
            self._pause(error, claim, stage)
            raise
        except ProviderUnavailableError as error:
            if claim is None or not self._is_down(claim, stage):
                raise
            seconds = max(DOWN_SECONDS, error.retry_after_seconds or 0)
            down = PausedError("provider_down", f"{error}, for several images in a row", seconds)
            self._pause(down, claim, stage)
            raise down from error

    def _find_kept(self, kept: Kept[A]) -> A | None:
        content = self._ledger.find_answer(kept.key)
        try:
            return None if content is None else kept.load(content)
        except ValueError:  # an earlier version wrote it
            self._ledger.forget(kept.key)
            return None

    def forget(self, kept: Kept[Any]) -> None:
        """Drops a kept answer, whose result is in place; answers of local models are not kept."""
        if kept.is_paid:
            self._ledger.forget(kept.key)

    def price(self, model: str, usage: CallUsage | None) -> float | None:
        """Returns the US dollars of a call, as reported or by price; None if they are unknown."""
        price = find_price(model, self._prices)
        if usage is None or usage.cost_usd or price is None:
            return usage.cost_usd if usage else None
        per_million_in, per_million_out = price
        return (usage.tokens_in * per_million_in + usage.tokens_out * per_million_out) / 1_000_000

    def estimate_usd(self, stage: str, model: str) -> float | None:
        """Returns the US dollars of a call by the mean of earlier ones; None if not known."""
        usage = self._ledger.find_mean_usage(stage, model)
        return usage.estimate_usd(find_price(model, self._prices)) if usage else None

    def _pause(self, error: PausedError, claim: Claim | None, stage: str) -> None:
        # A pause caused by a search or the doctor has no stage, so that any answer ends it: neither
        # may ever make another call.
        self._ledger.pause(error.reason, str(error), error.pause_seconds, stage if claim else None)

    def _is_down(self, claim: Claim, stage: str) -> bool:
        """Returns whether the provider is down, rather than the image being the problem."""
        if any(
            pause.reason == "provider_down" and pause.stage == stage
            for pause in self._ledger.list_pauses()
        ):
            return True
        unanswered = self._ledger.count_unanswered(stage)
        return len(unanswered) >= DOWN_IMAGES and unanswered.get(claim.image_id, 0) >= DOWN_CALLS

    def _ask(
        self,
        claim: Claim | None,
        stage: str,
        recipe: Recipe,
        call: Callable[[], A],
        waited_seconds: float,
        kept: Kept[A] | None,
    ) -> tuple[A, Receipt]:
        """Makes a call and records it, whatever its outcome, and keeps its answer."""
        started = time.monotonic()
        outcome, usage, content = "unexpected", None, None  # as if the run is stopped meanwhile
        try:
            answer = call()
            outcome, usage = "answered", answer.usage
            content = dump_answer(answer) if kept else None
        except ImagePipelineError as error:
            reason = getattr(error, "reason", outcome)
            outcome, usage = (
                getattr(error, "outcome", None) or reason,
                getattr(error, "usage", None),
            )
            raise
        finally:
            receipt = Receipt(
                waited_seconds,
                round(time.monotonic() - started, 3),
                self.price(recipe.model, usage),
            )
            self._record(
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
                ),
                kept.key if kept else None,
                content,
            )
        self._ledger.end_probation(stage)
        return answer, receipt

    def _record(self, call: PaidCall, key: str | None, answer: str | None) -> None:
        """Records a call once; waits for a database that restarts, or it is paid for again."""
        at, tries = self._clock(), count()

        def record_once() -> None:
            if next(tries) == 0 or not self._ledger.is_recorded(call, at):
                self._ledger.record(call, key, answer, at)

        outlast(record_once)

    def check(self, recipe: Recipe) -> None:
        """Checks that calls of a recipe may be made now, as far as price, pauses and budgets go.

        Raises:
            PostponedError: A budget is set but the price is unknown.
            PausedError: Paid work is paused, or a budget is used up.
        """
        if problem := self._explain_unpriced(recipe):
            raise PostponedError(problem)
        pause = next((pause for pause in self._ledger.list_pauses() if not pause.is_over), None)
        if pause is not None:
            raise PausedError(pause.reason, pause.message, None)
        if reached := self._explain_budget():
            self._ledger.pause("budget", *reached)
            raise PausedError("budget", *reached)

    def find_left_usd(self) -> float | None:
        """Returns the US dollars that today's and this month's budget leave; None without one."""
        midnight = self._clock().replace(hour=0, minute=0, second=0, microsecond=0)
        starts = {"daily": midnight, "monthly": midnight.replace(day=1)}
        left_usd = [
            budget_usd - self._ledger.sum_cost_usd(starts[name])
            for name, budget_usd in self._budgets.items()
            if budget_usd is not None
        ]
        return min(left_usd, default=None)

    def _explain_budget(self) -> tuple[str, float] | None:
        """Returns a sentence and the seconds to wait if a budget is used up, or None."""
        now = self._clock()
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        month = midnight.replace(day=1)
        ends = {
            "daily": midnight + timedelta(days=1),
            "monthly": (month + timedelta(days=32)).replace(day=1),
        }
        for name, since in (("monthly", month), ("daily", midnight)):
            budget_usd = self._budgets[name]
            if budget_usd is not None and (spent := self._ledger.sum_cost_usd(since)) >= budget_usd:
                message = (
                    f"the {name} budget of {budget_usd:g} USD is used up ({spent:.2f} USD): "
                    f"paid work resumes at {ends[name]:%F %R} UTC"
                )
                return message, (ends[name] - now).total_seconds()
        return None

    def _wait(self, stage: str, report: Callable[[str], None], is_planned: bool) -> float:
        """Waits for a permit, and returns for how many seconds; uploads go before what is planned.

        Raises:
            RateLimitError: none came in time.
        """
        started = time.monotonic()
        acquire = self._acquire_after_uploads if is_planned else self._limiter.acquire
        if acquire(stage, 0):
            return 0.0
        report(f"The call waits for the rate limit of paid calls ({self._limiter.get_limits()}).")
        if not acquire(stage, MAX_WAIT_SECONDS):
            raise RateLimitError(self._explain_wait(self._limiter.look(stage).wait_seconds))
        return round(time.monotonic() - started, 3)

    def _acquire_after_uploads(self, stage: str, max_wait_seconds: float) -> bool:
        """Takes a permit that no upload may need; returns whether there was one in time."""
        deadline = time.monotonic() + max_wait_seconds
        while True:
            permits = self._limiter.look(stage)
            is_free = permits.left is None or permits.left > LEFT_TO_UPLOADS
            if (is_free or not self._has_uploads()) and self._limiter.acquire(stage, 0):
                return True
            if time.monotonic() + permits.wait_seconds >= deadline:
                return False
            time.sleep(POLL_SECONDS)

    def _explain_wait(self, wait_seconds: float) -> str:
        opens_at, limits = (
            self._clock() + timedelta(seconds=wait_seconds),
            self._limiter.get_limits(),
        )
        return (
            f"the rate limit of paid calls ({limits}) is used up: "
            f"paid work resumes at {opens_at:%F %T} UTC"
        )

    def count_affordable(self) -> tuple[int | None, str]:
        """Returns how many images can start within the rate limits, and if none, a reason.

        An image can start if its calls get their permits soon. Others would hold slots that images
        which need no call could use. The number is None if there is no limit. The reason is empty
        if permits come before a run would give up waiting.
        """
        counts: list[tuple[int, str]] = []
        for stage in self._recipes:
            permits = self._limiter.look(stage, START_WINDOW_SECONDS)
            if permits.left is None:
                continue
            # An image needs one permit per stage; a shared limit must provide all of them.
            images = -(-permits.left // (len(self._recipes) if permits.is_shared else 1))
            is_used_up = not images and not self._limiter.look(stage, MAX_WAIT_SECONDS).left
            reason = self._explain_wait(permits.wait_seconds) if is_used_up else ""
            counts.append((images, reason))
        return min(counts, default=(None, ""))

    def measure_use(self) -> dict[str, float]:
        """Returns how much of the rate limits and budgets is used; nothing if no model is paid.

        The keys are `calls_used` and `calls_limit`, after the stage's name if the limit is for one
        stage, and `cost_today_usd`, `cost_this_month_usd`, `daily_budget_usd` and
        `monthly_budget_usd`.

        Raises:
            PostponedError: Redis or the database does not answer.
        """
        if not self._recipes:
            return {}
        use: dict[str, float] = {}
        for limit, used in self._limiter.count_used():
            stage = f"{limit.stage}_" if limit.stage else ""
            use |= {f"{stage}calls_used": used, f"{stage}calls_limit": limit.count}
        midnight = self._clock().replace(hour=0, minute=0, second=0, microsecond=0)
        for name, since in (("today", midnight), ("this_month", midnight.replace(day=1))):
            use[f"cost_{name}_usd"] = round(self._ledger.sum_cost_usd(since), 6)
        budgets = self._budgets.items()
        return use | {f"{name}_budget_usd": usd for name, usd in budgets if usd is not None}

    def list_pauses(self) -> list[Pause]:
        """Returns the pauses of paid work, after the pause of all work if there is one."""
        full = self._ledger.find_full_pause()
        return [*([full] if full else []), *self._ledger.list_pauses()]

    def update_pauses(self) -> list[Pause]:
        """Starts and ends the pauses that depend only on settings and ledger.

        Thus no run has to fail to detect them. Also ends pauses that a model caused which is no
        longer used.

        Returns:
            The pauses that remain.
        """
        problem = self._explain_unpriced(*self._recipes.values())
        reasons: dict[str, tuple[str, float | None] | None] = {
            "price": (problem, None) if problem else None,
            "budget": self._explain_budget() if self._recipes else None,
        }
        pauses, is_changed = self._ledger.list_pauses(), False
        for reason, due in reasons.items():
            known = next((pause for pause in pauses if pause.reason == reason), None)
            if due and (
                known is None or known.is_over or known.message != due[0][:MESSAGE_CHARACTERS]
            ):
                self._ledger.pause(reason, *due)
                is_changed = True
            elif known and not due:
                self._ledger.end(known)
                is_changed = True
        for pause in pauses:
            is_local = pause.stage in self._all_recipes and pause.stage not in self._recipes
            if is_local or (self._all_recipes and not self._recipes):
                self._ledger.end(pause)
                is_changed = True
        return self._ledger.list_pauses() if is_changed else pauses

    def _explain_unpriced(self, *recipes: Recipe) -> str | None:
        """Returns what to do if a budget is set but the cost of these models is unknown."""
        if not any(self._budgets.values()) and not (self._tenants and self._tenants.has_budgets):
            return None
        unpriced, without_usage = [], []
        for recipe in recipes:
            price = find_price(recipe.model, self._prices)
            reports_usage, cost_usd = self._ledger.find_last_usage(
                recipe.provider, recipe.model
            ) or (
                True,
                None,
            )
            # A reported cost of 0 may mean that the call is billed elsewhere, so the operator must
            # confirm that a model is free.
            if price is None and not cost_usd:
                unpriced.append(recipe.model)
            elif price != FREE and not reports_usage and not cost_usd:
                without_usage.append(recipe.model)
        if unpriced:
            return explain_unpriced(unpriced)
        return explain_missing_usage(without_usage[0]) if without_usage else None

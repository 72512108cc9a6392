"""Ledger: the calls to paid providers and their cost, and the pauses of paid or all work."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from imagepipeline.models import BY_PERSON, PaidCall, Pause, now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.tables import (
    answers,
    applies,
    call_sums,
    equals,
    erasures,
    images,
    pauses,
    provider_calls,
)
from imagepipeline.text import make_printable

MESSAGE_CHARACTERS = 300
SUMS = ("calls", "answered", "tokens_in", "tokens_out", "cost_usd", "unpriced")
NO_ANSWER = ("provider_unavailable", "timed_out")
STREAK = timedelta(hours=1)
MEMORY = timedelta(days=31)
NEWS = timedelta(days=7)  # as long as a notice of a failure waits for its channel
ANSWERS_KEPT = timedelta(days=31)  # an `apply` of a great plan takes weeks at a low rate limit
MEAN_CALLS = 1000
BATCH_PRICE_SHARE = 0.5  # of the price of an ordinary call


@dataclass(frozen=True)
class MeanUsage:
    """Tokens and cost in US dollars of a call, on average; None where no call reported it."""

    tokens_in: float | None
    tokens_out: float | None
    cost_usd: float | None

    def estimate_usd(self, price: tuple[float, float] | None) -> float | None:
        """The cost of a call as reported, or by the price of a million tokens in and out."""
        if self.cost_usd is not None or self.tokens_in is None or price is None:
            return self.cost_usd
        return (self.tokens_in * price[0] + (self.tokens_out or 0) * price[1]) / 1e6


class Ledger:
    """The paid calls and pauses in the catalogue's database."""

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    def close(self) -> None:
        """Closes all connections; a later use opens new ones."""
        self._database.engine.dispose()

    def record(
        self,
        call: PaidCall,
        key: str | None = None,
        answer: str | None = None,
        at: datetime | None = None,
    ) -> None:
        """Records a call, whatever its outcome, and keeps its answer under a key.

        Answers are kept until `forget`, so that a run that is killed before its result is in place
        does not make its successor pay again; at most 31 days. The cost counts for the apply that
        began the image. `at` is the time of the call, or else now. Of an image that was erased
        while it was asked about, the cost stays, but neither its ID nor the answer.
        """
        with self._database.transaction() as connection:
            if _is_erased(connection, call):
                call, answer = replace(call, image_id=None, generation=None), None
            write_call(self._database, connection, at or self._clock(), call, key, answer)
            if call.cost_usd and call.image_id:
                of_image = sa.select(images.c.apply_id).where(images.c.id == call.image_id)
                connection.execute(
                    sa.update(applies)
                    .where(applies.c.id == of_image.scalar_subquery())
                    .values(spent_usd=applies.c.spent_usd + call.cost_usd)
                )

    def is_recorded(self, call: PaidCall, at: datetime) -> bool:
        """Whether a call at that time is on record; the reply to `record` may have been lost."""
        calls = provider_calls.c
        of_call = (calls.image_id == call.image_id, calls.stage == call.stage, calls.at == at)
        with self._database.reading() as connection:
            return connection.execute(sa.select(calls.seq).where(*of_call)).first() is not None

    def find_answer(self, key: str) -> str | None:
        """The answer that is kept under a key."""
        with self._database.reading() as connection:
            return connection.execute(
                sa.select(answers.c.answer).where(
                    answers.c.key == key, answers.c.at >= self._clock() - ANSWERS_KEPT
                )
            ).scalar()

    def forget(self, key: str) -> None:
        """Drops an answer: its result is in place."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(answers).where(answers.c.key == key))

    def sum_cost_usd(self, since: datetime, tenant: str | None = None) -> float:
        """The cost of all calls since then in US dollars, as far as it is known.

        With a tenant, only of calls for its images, since the end of that day unless it is
        midnight. Calls of the first day are kept for 32 days at
        least; whole days are known for ever.
        """
        since = since.astimezone(UTC)
        midnight = since.replace(hour=0, minute=0, second=0, microsecond=0)
        first_whole_day = midnight if since == midnight else midnight + timedelta(days=1)
        sums, calls = call_sums.c, provider_calls.c
        of_tenant = sa.true() if tenant is None else sums.tenant == tenant
        parts = [(sums.cost_usd, sa.and_(sums.day >= f"{first_whole_day:%F}", of_tenant))]
        if since != midnight and tenant is None:
            parts.append((calls.cost_usd, sa.and_(calls.at >= since, calls.at < first_whole_day)))
        with self._database.reading() as connection:
            costs = [
                connection.execute(sa.select(sa.func.sum(cost)).where(condition)).scalar()
                for cost, condition in parts
            ]
        return float(sum(cost or 0.0 for cost in costs))

    def find_last_usage(self, provider: str, model: str) -> tuple[bool, float | None] | None:
        """Whether the last answered call to a model reported its usage, and its cost in US dollars.

        Only the last 31 days count; None if there was no call.
        """
        calls = provider_calls.c
        query = (
            sa.select(calls.tokens_in.is_not(None), calls.cost_usd)
            .where(calls.provider == provider, calls.model == model)
            .where(equals(calls.outcome, "answered"))
            .where(calls.at >= self._clock() - MEMORY)
            .order_by(calls.at.desc(), calls.seq.desc())
        )
        with self._database.reading() as connection:
            row = connection.execute(query.limit(1)).first()
        return None if row is None else (bool(row[0]), row[1])

    def find_mean_usage(self, stage: str, model: str) -> MeanUsage | None:
        """The mean usage of the last answered calls of a stage to a model; None without calls.

        Calls in batches count at the price of ordinary ones.
        """
        calls = provider_calls.c
        share = sa.case((calls.batch.is_not(None), BATCH_PRICE_SHARE), else_=1.0)
        recent = (
            sa.select(calls.tokens_in, calls.tokens_out, (calls.cost_usd / share).label("cost_usd"))
            .where(calls.stage == stage, calls.model == model)
            .where(equals(calls.outcome, "answered"))
            .where(calls.at >= self._clock() - MEMORY)
            .order_by(calls.at.desc())
            .limit(MEAN_CALLS)
            .subquery()
        )
        means = [sa.func.avg(column) for column in recent.c]
        with self._database.reading() as connection:
            row = connection.execute(sa.select(sa.func.count(), *means).select_from(recent)).one()
        values = (None if value is None else float(value) for value in row[1:])
        return MeanUsage(*values) if row[0] else None

    def count_unanswered(self, stage: str) -> dict[str, int]:
        """By image, how many calls of a stage went unanswered since the last answer.

        Only the last hour counts.
        """
        calls = provider_calls.c
        last = sa.select(sa.func.coalesce(sa.func.max(calls.seq), 0)).where(
            self._got_something(stage)
        )
        query = (
            sa.select(calls.image_id, sa.func.count())
            .where(calls.stage == stage, calls.image_id.is_not(None), calls.outcome.in_(NO_ANSWER))
            .where(calls.seq > last.scalar_subquery(), calls.at >= self._clock() - STREAK)
            .group_by(calls.image_id)
        )
        with self._database.reading() as connection:
            return dict(connection.execute(query).tuples().all())

    def find_streak_start(self, stage: str | None) -> datetime:
        """Since when all calls of a stage have gone unanswered; at most an hour ago."""
        query = sa.select(sa.func.max(provider_calls.c.at)).where(self._got_something(stage))
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one() or self._clock() - STREAK

    def _got_something(self, stage: str | None) -> sa.ColumnElement[bool]:
        calls = provider_calls.c
        return sa.and_(
            calls.stage == stage,
            calls.outcome.not_in(NO_ANSWER),
            calls.at >= self._clock() - STREAK,
        )

    def is_answered_for_others(self, image_id: str, stage: str, outcome: str) -> bool:
        """Whether calls for other images were answered since this image last had this outcome.

        The call that has just ended does not count, nor do calls over an hour ago.
        """
        calls = provider_calls.c
        own = (
            sa.select(calls.seq)
            .where(calls.image_id == image_id, calls.stage == stage, calls.outcome == outcome)
            .where(calls.at >= self._clock() - STREAK)
        )
        with self._database.reading() as connection:
            earlier = connection.execute(own.order_by(calls.seq.desc()).offset(1).limit(1)).scalar()
            if earlier is None:
                return False
            others = sa.select(calls.seq).where(
                calls.seq > earlier,
                calls.stage == stage,
                calls.outcome == "answered",
                calls.image_id != image_id,
            )
            return connection.execute(others.limit(1)).first() is not None

    def summarize(self, by: str, since: datetime | None = None) -> list[dict[str, Any]]:
        """One row for each `model`, `stage`, `tenant` or `day` (UTC), of calls since a day.

        Its keys are `calls`, `answered`, `tokens_in`, `tokens_out`, `cost_usd` and `unpriced`.
        """
        sums = [sa.func.sum(call_sums.c[name]).label(name) for name in SUMS]
        group = call_sums.c[by]
        query = sa.select(group, *sums).group_by(group).order_by(group)
        if since is not None:
            query = query.where(call_sums.c.day >= f"{since.astimezone(UTC):%F}")
        with self._database.reading() as connection:
            return [
                {
                    name: float(value)
                    if name == "cost_usd"
                    else value
                    if name == by
                    else int(value)
                    for name, value in row.items()
                }
                for row in connection.execute(query).mappings()
            ]

    def pause(
        self, reason: str, message: str, wait_seconds: float | None, stage: str | None = None
    ) -> None:
        """Starts a pause of paid work, or extends the one of the same reason and stage.

        With the reason BY_PERSON it is one of all work.

        Args:
            reason: the pause's code.
            message: for the administrators.
            wait_seconds: its duration; None until a person resumes.
            stage: the stage whose calls caused it.
        """
        now = self._clock()
        until = None if wait_seconds is None else now + timedelta(seconds=wait_seconds)
        open_ones = sa.and_(
            pauses.c.reason == reason,
            pauses.c.stage.is_not_distinct_from(stage),
            pauses.c.ended_at.is_(None),
        )
        with self._database.transaction() as connection:
            values = {"message": make_printable(message[:MESSAGE_CHARACTERS]), "until": until}
            if connection.execute(sa.update(pauses).where(open_ones).values(values)).rowcount == 0:
                connection.execute(
                    sa.insert(pauses).values(reason=reason, stage=stage, since=now, **values)
                )

    def end(self, pause: Pause) -> None:
        """Ends one pause, even if its time is not over."""
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(pauses).where(pauses.c.seq == pause.seq).values(ended_at=self._clock())
            )

    def resume(self, *reasons: str) -> int:
        """Ends the pauses of these reasons, or all; returns their number."""
        query = sa.update(pauses).where(pauses.c.ended_at.is_(None)).values(ended_at=self._clock())
        if reasons:
            query = query.where(pauses.c.reason.in_(reasons))
        with self._database.transaction() as connection:
            return int(connection.execute(query).rowcount)

    def end_probation(self, stage: str) -> None:
        """Ends the pauses on probation of a stage or of all, when one of its calls was answered."""
        query = (
            sa.update(pauses)
            .where(pauses.c.ended_at.is_(None), pauses.c.until <= self._clock())
            .where(sa.or_(pauses.c.stage.is_(None), pauses.c.stage == stage))
        )
        with self._database.transaction() as connection:
            connection.execute(query.values(ended_at=self._clock()))

    def list_pauses(self) -> list[Pause]:
        """The pauses of paid work that have not ended; those on probation come last."""
        open_ones = sa.and_(pauses.c.ended_at.is_(None), pauses.c.reason != BY_PERSON)
        return sorted(self._find_pauses(open_ones), key=lambda pause: pause.is_over)

    def find_full_pause(self) -> Pause | None:
        """The pause of all work that a person started and nobody has ended, or None."""
        open_one = sa.and_(pauses.c.ended_at.is_(None), pauses.c.reason == BY_PERSON)
        return next(iter(self._find_pauses(open_one)), None)

    def list_untold(self, channel: str) -> list[Pause]:
        """The pauses of which `webhook` or `mail` was not notified: open ones, or of this week."""
        is_news = sa.or_(pauses.c.ended_at.is_(None), pauses.c.since >= self._clock() - NEWS)
        return self._find_pauses(sa.and_(pauses.c[f"{channel}_sent_at"].is_(None), is_news))

    def mark_told(self, channel: str, told: Iterable[Pause]) -> None:
        """Records that a channel was notified of these pauses."""
        with self._database.transaction() as connection:
            for pause in told:
                values = {f"{channel}_sent_at": self._clock()}
                connection.execute(
                    sa.update(pauses).where(pauses.c.seq == pause.seq).values(values)
                )

    def _find_pauses(self, condition: sa.ColumnElement[bool]) -> list[Pause]:
        columns = [
            pauses.c[name] for name in ("seq", "reason", "message", "since", "until", "stage")
        ]
        now = self._clock()
        with self._database.reading() as connection:
            rows = (
                connection.execute(sa.select(*columns).where(condition).order_by(pauses.c.seq))
                .mappings()
                .all()
            )
        return [
            Pause(**row, is_over=row["until"] is not None and row["until"] <= now) for row in rows
        ]


def _is_erased(connection: sa.Connection, call: PaidCall) -> bool:
    """Whether its image was erased since; if it was pushed again, that is another generation."""
    if call.image_id is None:
        return False
    erased = sa.select(erasures.c.image_id).where(
        erasures.c.image_id == call.image_id, erasures.c.generation >= call.generation
    )
    return connection.execute(erased).first() is not None


def write_call(
    database: Database,
    connection: sa.Connection,
    now: datetime,
    call: PaidCall,
    key: str | None,
    answer: str | None,
    batch: int | None = None,
) -> None:
    """Writes a call in a transaction, and keeps its answer under a key, if it has both.

    `batch` is the sequence number of the batch in which it was made.
    """
    connection.execute(sa.insert(provider_calls).values(at=now, batch=batch, **asdict(call)))
    _add_to_sums(database, connection, now, call)
    if key is None or answer is None:
        return
    insert = database.insert(answers).values(key=key, answer=answer, at=now)
    changes = {"answer": answer, "at": now}
    connection.execute(insert.on_conflict_do_update(index_elements=["key"], set_=changes))
    connection.execute(sa.delete(answers).where(answers.c.at < now - ANSWERS_KEPT))


def _add_to_sums(
    database: Database, connection: sa.Connection, now: datetime, call: PaidCall
) -> None:
    """Adds a call to the sums of its day."""
    numbers = {
        "calls": 1,
        "answered": int(call.outcome == "answered"),
        "tokens_in": call.tokens_in or 0,
        "tokens_out": call.tokens_out or 0,
        "cost_usd": call.cost_usd or 0.0,
        "unpriced": int(call.cost_usd is None and call.tokens_in is not None),
    }
    of_day: dict[str, Any] = {"day": f"{now.astimezone(UTC):%F}"} | {
        name: getattr(call, name) for name in ("stage", "provider", "model")
    }
    of_image = sa.select(images.c.tenant).where(images.c.id == call.image_id).scalar_subquery()
    of_day["tenant"] = sa.func.coalesce(of_image, "")
    insert = database.insert(call_sums).values(**of_day, **numbers)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=list(of_day),
            set_={name: call_sums.c[name] + number for name, number in numbers.items()},
        )
    )

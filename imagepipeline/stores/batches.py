"""Batches: which questions were sent to a provider at once, until their answers are kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from imagepipeline.errors import BatchBusyError
from imagepipeline.locks import trying_lock
from imagepipeline.models import PaidCall, Recipe, now_utc
from imagepipeline.stores.database import Database
from imagepipeline.stores.ledger import write_call
from imagepipeline.stores.tables import batch_requests, provider_batches, provider_calls

SENDING = "sending"  # the state of a batch that the provider may not know yet
LOCK = "imagepipeline batches"


@dataclass(frozen=True)
class SentBatch:
    """A batch that has not ended, with the provider's IDs as far as they are known."""

    seq: int
    file_id: str | None
    batch_id: str | None
    requests: int
    created_at: datetime


@dataclass(frozen=True)
class Answered:
    """A request of a batch that has ended: its call, and its answer as JSON if there is one."""

    key: str
    outcome: str
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    answer: str | None


class Batches:
    """The batches in the catalogue's database."""

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._database = Database(url)
        self._clock = clock

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Holds all batches, until the end or the death of this process.

        Raises:
            BatchBusyError: another process holds them.
        """
        url = self._database.engine.url
        lock = (
            trying_lock(Path(f"{url.database}.batches"))
            if self._database.engine.dialect.name == "sqlite"
            else self._lock_session()
        )
        with lock as is_held:
            if not is_held:
                raise BatchBusyError("another `apply --batch` is running: let it end, or stop it")
            yield

    @contextmanager
    def _lock_session(self) -> Iterator[bool]:
        with self._database.engine.connect().execution_options(
            isolation_level="AUTOCOMMIT"
        ) as connection:
            key = sa.func.hashtext(LOCK)
            is_held = connection.execute(sa.select(sa.func.pg_try_advisory_lock(key))).scalar_one()
            try:
                yield bool(is_held)
            finally:
                if is_held:
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(key)))

    def begin(self, stage: str, recipe: Recipe, questions: Mapping[str, str]) -> int:
        """Records a batch before anything of it is sent; gives its sequence number.

        Args:
            stage: the asset that the questions are about.
            recipe: the model that is asked.
            questions: the image ID by the key under which the answer will be kept. None of them
                may be in an open batch.
        """
        values = {
            "stage": stage,
            "provider": recipe.provider,
            "model": recipe.model,
            "state": SENDING,
            "requests": len(questions),
            "answered": 0,
            "failed": 0,
            "created_at": self._clock(),
        }
        with self._database.transaction() as connection:
            inserted = connection.execute(sa.insert(provider_batches).values(values))
            [seq] = inserted.inserted_primary_key or []
            rows = [{"key": key, "batch": seq, "image_id": one} for key, one in questions.items()]
            connection.execute(sa.insert(batch_requests), rows)
        return int(seq)

    def note(self, seq: int, **values: Any) -> None:
        """Changes `file_id`, `batch_id` or `state` of a batch."""
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(provider_batches).where(provider_batches.c.seq == seq).values(values)
            )

    def drop(self, seq: int) -> None:
        """Deletes a batch that the provider does not know, so that its questions can be sent."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(batch_requests).where(batch_requests.c.batch == seq))
            connection.execute(sa.delete(provider_batches).where(provider_batches.c.seq == seq))

    def list_open(self, stage: str, recipe: Recipe) -> list[SentBatch]:
        """The batches of a stage and model that have not ended, oldest first."""
        batches = provider_batches.c
        names = ("seq", "file_id", "batch_id", "requests", "created_at")
        query = (
            sa.select(*(batches[name] for name in names))
            .where(batches.ended_at.is_(None), batches.stage == stage)
            .where(batches.provider == recipe.provider, batches.model == recipe.model)
            .order_by(batches.seq)
        )
        with self._database.reading() as connection:
            return [SentBatch(*row) for row in connection.execute(query)]

    def count_open(self, stage: str, recipe: Recipe) -> int:
        """How many questions the open batches of a stage and model ask."""
        return sum(batch.requests for batch in self.list_open(stage, recipe))

    def is_asked(self, key: str) -> bool:
        """Whether an open batch asks this question."""
        with self._database.reading() as connection:
            found = connection.execute(
                sa.select(batch_requests.c.key).where(batch_requests.c.key == key)
            )
            return found.first() is not None

    def collect(self, seq: int, answered: Iterable[Answered]) -> None:
        """Records calls of a batch, and keeps their answers; each once, however often it comes."""
        batches, requests = provider_batches.c, batch_requests.c
        with self._database.transaction() as connection:
            batch = connection.execute(
                sa.select(provider_batches).where(batches.seq == seq)
            ).mappings()
            sent = batch.one()
            for one in answered:
                image_id = connection.execute(
                    sa.delete(batch_requests)
                    .where(requests.key == one.key, requests.batch == seq)
                    .returning(requests.image_id)
                ).scalar()
                if image_id is None:  # it was collected before, or was not asked
                    continue
                answer = one.answer if image_id else None  # of an erased image, only the cost stays
                call = PaidCall(
                    image_id=image_id or None,
                    generation=None,
                    stage=sent["stage"],
                    provider=sent["provider"],
                    model=sent["model"],
                    outcome=one.outcome,
                    tokens_in=one.tokens_in,
                    tokens_out=one.tokens_out,
                    cost_usd=one.cost_usd,
                    seconds=0.0,
                    waited_seconds=0.0,
                )
                write_call(self._database, connection, self._clock(), call, one.key, answer, seq)
                column = batches.failed if answer is None else batches.answered
                connection.execute(
                    sa.update(provider_batches)
                    .where(batches.seq == seq)
                    .values({column: column + 1})
                )

    def end(self, seq: int, state: str) -> None:
        """Ends a batch; its questions without an answer can be sent again."""
        with self._database.transaction() as connection:
            connection.execute(sa.delete(batch_requests).where(batch_requests.c.batch == seq))
            connection.execute(
                sa.update(provider_batches)
                .where(provider_batches.c.seq == seq)
                .values(state=state, ended_at=self._clock())
            )

    def count_answered(self, seqs: Sequence[int]) -> int:
        """How many answers of these batches were kept."""
        batches = provider_batches.c
        query = sa.select(sa.func.coalesce(sa.func.sum(batches.answered), 0))
        with self._database.reading() as connection:
            return int(connection.execute(query.where(batches.seq.in_(seqs))).scalar_one())

    def sum_cost_usd(self, seqs: Sequence[int]) -> float:
        """What the calls of these batches have cost in US dollars, as far as it is known."""
        batches, calls = provider_batches.c, provider_calls.c
        # There is an index of the calls by their time alone.
        first = sa.select(sa.func.min(batches.created_at)).where(batches.seq.in_(seqs))
        query = sa.select(sa.func.sum(calls.cost_usd)).where(
            calls.at >= first.scalar_subquery(), calls.batch.in_(seqs)
        )
        with self._database.reading() as connection:
            return float(connection.execute(query).scalar_one() or 0)

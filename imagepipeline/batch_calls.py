"""Batches of paid calls: answers are fetched before runs ask for them, at half the price.

A batch holds the requests that runs of planned images would make. Each answer is kept under the
key of its question, where the run finds it. What a batch does not answer, the run asks for itself.

Whenever this process dies, the next one goes on: questions are recorded before they are sent, and
removed in the transaction that keeps their answers.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import IO, Any

from imagepipeline.describing import find_source
from imagepipeline.errors import (
    BadAnswerError,
    BatchError,
    FormatRefusedError,
    ImagePipelineError,
    PermanentError,
    PostponedError,
    RefusedError,
    RetryableError,
)
from imagepipeline.filters import ALL, Filter
from imagepipeline.models import Recipe, TenantSet, VisionAnswer, now_utc
from imagepipeline.originals import Originals, build_originals
from imagepipeline.paid_calls import Kept, PaidCalls, dump_answer
from imagepipeline.providers import build_batch_api, build_tenants, build_vision, open_paid_calls
from imagepipeline.services.batch_api import MAX_FILE_BYTES, MAX_REQUESTS, BatchApi, BatchState
from imagepipeline.services.vision import OpenAIVision
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.batches import Answered, Batches, SentBatch
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import BATCH_PRICE_SHARE, Ledger
from imagepipeline.stores.plans import Plans
from imagepipeline.usage import CallUsage

STAGE = "metadata"
MAX_OPEN = 10  # batches at once
POLL_SECONDS = 15.0
GIVEN_UP = timedelta(days=2)  # after a batch was sent; it ends within one
COLLECTED = 500  # answers kept in one transaction
REFUSED = (PermanentError, FormatRefusedError)  # by the provider, which will not change its mind
NOT_ANSWERED = "not_answered"  # the outcome of a request that the provider has failed


@dataclass(frozen=True)
class Fetched:
    """How far the batches of a plan are.

    Attributes:
        images: planned images looked at so far, in the order of their IDs.
        requests: requests sent, also those in batches that were open before.
        done: those that have ended, as the provider says.
        answered: those whose answers are kept.
        open: batches that have not ended.
        spent_usd: what the answers have cost, as far as it is known.
    """

    images: int
    requests: int
    done: int
    answered: int
    open: int
    spent_usd: float


@dataclass(frozen=True)
class Question:
    """A request about an image as a line of a file, and the key of its answer."""

    image_id: str
    key: str
    line: bytes


class Questions:
    """Questions one by one; `images` counts the images they were looked for in so far."""

    def __init__(self, image_ids: Iterator[str], ask: Callable[[str], Question | None]) -> None:
        self._image_ids = image_ids
        self._ask = ask
        self._next: Question | None = None
        self._looked_at = 0
        self.is_over = False

    @property
    def images(self) -> int:
        """Not counting the image whose question was seen but not taken."""
        return self._looked_at - (self._next is not None)

    def peek(self) -> Question | None:
        """The next question, which stays; None if there is no more."""
        while self._next is None and not self.is_over:
            image_id = next(self._image_ids, None)
            if image_id is None:
                self.is_over = True
            else:
                self._looked_at += 1
                self._next = self._ask(image_id)
        return self._next

    def look_again(self) -> None:
        """Asks the next question anew: it may have been sent or answered since it was seen."""
        if self._next is not None:
            self._next = self._ask(self._next.image_id)

    def take(self) -> None:
        """Goes on after the question that `peek` gave."""
        self._next = None


class Followed:
    """The batches of one call of `fetch`: how many requests each has, and how many have ended."""

    def __init__(self) -> None:
        self.requests: dict[int, int] = {}
        self.done: dict[int, int] = {}

    def note(self, batch: SentBatch, state: BatchState | None) -> None:
        """Notes a batch, and what the provider says of it, if it says anything."""
        self.requests[batch.seq] = batch.requests
        if state:
            self.done[batch.seq] = state.done

    def drop(self, batch: SentBatch) -> None:
        """Forgets a batch that was refused."""
        self.requests.pop(batch.seq, None)
        self.done.pop(batch.seq, None)


class BatchCalls:
    """Fetches the answers about planned images in batches.

    Args:
        catalogue: knows what images need.
        plans: finds them.
        ledger: knows which answers are kept, and what a call costs.
        batches: records what was sent.
        originals: decodes the images.
        vision: builds the requests and reads the answers.
        api: sends them.
        paid_calls: knows pauses, budgets and prices.
        find_spent: gives the tenants whose budget is used up; their images are passed over.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        plans: Plans,
        ledger: Ledger,
        batches: Batches,
        originals: Originals,
        vision: OpenAIVision,
        api: BatchApi,
        paid_calls: PaidCalls,
        find_spent: Callable[[], TenantSet],
    ) -> None:
        self._catalogue = catalogue
        self._plans = plans
        self._ledger = ledger
        self._batches = batches
        self._originals = originals
        self._vision = vision
        self._recipe = vision.recipe
        self._api = api
        self._paid_calls = paid_calls
        self._find_spent = find_spent

    def fetch(
        self,
        recipes: Mapping[str, Recipe],
        where: Filter = ALL,
        limit: int | None = None,
        budget_usd: float | None = None,
    ) -> Iterator[Fetched]:
        """Sends what is planned in batches and waits for the answers, which may take a day.

        Batches that an earlier call has left open come first.

        Args:
            recipes: of the assets that count.
            where: which images.
            limit: look at so many planned images; None for all.
            budget_usd: send no more than what costs this, by the mean of earlier calls.

        Raises:
            BatchError: the provider has no batches, or has answered nothing.
            BatchBusyError: another process fetches batches.
            PausedError: paid work is paused.
        """
        self._api.check()
        with self._batches.hold():
            self._settle()
            is_full = False
            questions = self._list_questions(recipes, where, limit)
            followed = Followed()
            while True:
                for batch in self._list_open():
                    state = self._look(batch)
                    followed.note(batch, state)
                    if state is None or not state.has_ended:
                        continue
                    self._collect(batch, state)
                    is_full = state.status == "failed"
                    if is_full:
                        followed.drop(batch)
                        if not self._list_open():
                            raise BatchError(_explain_failure(state))
                        # Too much is open. Its questions come again after another batch has ended.
                        questions = self._list_questions(recipes, where, limit)
                while not is_full and self._send(questions, followed, budget_usd):
                    yield self._measure(followed, questions)
                progress = self._measure(followed, questions)
                if not progress.open and progress.requests and not progress.answered:
                    raise BatchError(
                        f"none of {progress.requests} requests was answered: "
                        "`plan --sample 1` says why"
                    )
                yield progress
                if not progress.open:
                    return
                time.sleep(POLL_SECONDS)

    def _measure(self, followed: Followed, questions: Questions) -> Fetched:
        still_open = self._list_open()
        for batch in still_open:
            followed.note(batch, None)
        return Fetched(
            questions.images,
            sum(followed.requests.values()),
            sum(followed.done.values()),
            self._batches.count_answered([*followed.requests]),
            len(still_open),
            self._batches.sum_cost_usd([*followed.requests]),
        )

    def _list_open(self) -> list[SentBatch]:
        return self._batches.list_open(STAGE, self._recipe)

    def _settle(self) -> None:
        """Finds out what became of batches whose sender has died before it knew."""
        for batch in self._list_open():
            if batch.batch_id is not None:
                continue
            if batch.file_id is None:
                self._batches.drop(batch.seq)
                continue
            state = self._api.find(batch.file_id) or self._create(batch.seq, batch.file_id)
            self._batches.note(batch.seq, batch_id=state.batch_id, state=state.status)

    def _list_questions(
        self, recipes: Mapping[str, Recipe], where: Filter, limit: int | None
    ) -> Questions:
        planned = self._plans.iterate_outdated(recipes, where, self._find_spent())
        return Questions(islice(planned, limit), self._ask)

    def _ask(self, image_id: str) -> Question | None:
        """The question about an image; None if its run would not ask, or cannot."""
        cause = self._catalogue.find_causes(image_id, {STAGE: self._recipe})[STAGE]
        if not cause:
            return None
        row = self._catalogue.get(image_id) or {}
        sha256 = str(row.get("original_sha256"))
        # A translation needs no picture, and costs little: its run asks for it.
        is_text_enough = any(find_source(self._catalogue, self._vision, image_id, sha256, cause))
        if is_text_enough or self._is_known(sha256):
            return None
        try:
            path, last_path = row.get("requested_path"), row.get("path")
            with closing(self._originals.look(image_id, path, last_path)) as original:
                if self._is_known(original.sha256):
                    return None
                body = self._vision.build_request(original.prepared.preview)
                key = self._build_key(original.sha256)
        except (RetryableError, PermanentError):
            return None  # its run says why
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return Question(image_id, key, json.dumps(request).encode() + b"\n")

    def _is_known(self, sha256: str) -> bool:
        """Whether an answer about this original is stored, kept or under way."""
        key = self._build_key(sha256)
        return (
            self._batches.is_asked(key)
            or self._ledger.find_answer(key) is not None
            or bool(self._catalogue.find_twins(STAGE, self._recipe, sha256, 1))
        )

    def _build_key(self, sha256: str) -> str:
        return Kept(STAGE, self._recipe, sha256, VisionAnswer).key

    def _send(self, questions: Questions, followed: Followed, budget_usd: float | None) -> bool:
        """Sends a batch of the next questions; False if none can be sent now.

        Raises:
            PostponedError: paid work is paused, and no batch is open that could be waited for.
        """
        under_way = self._list_open()
        if len(under_way) >= MAX_OPEN:
            return False
        questions.look_again()
        if questions.peek() is None:
            return False
        try:
            self._paid_calls.check(self._recipe)
        except PostponedError:
            if under_way:
                return False
            raise
        count = min(MAX_REQUESTS, self._count_affordable(followed, budget_usd))
        with tempfile.TemporaryFile() as file:
            asked = _write(file, questions, count)
            if not asked:
                return False
            seq = self._batches.begin(STAGE, self._recipe, asked)
            file.seek(0)
            file_id = self._api.upload(file)
        self._batches.note(seq, file_id=file_id)
        state = self._create(seq, file_id)
        self._batches.note(seq, batch_id=state.batch_id, state=state.status)
        return True

    def _create(self, seq: int, file_id: str) -> BatchState:
        """Has an uploaded file answered; a batch that the provider refuses is forgotten.

        Raises:
            BatchError: it refuses it.
        """
        try:
            return self._api.create(file_id)
        except REFUSED as error:
            self._batches.drop(seq)
            self._delete(file_id)
            raise BatchError(f"the provider refused a batch, which cost nothing: {error}") from None

    def _count_affordable(self, followed: Followed, budget_usd: float | None) -> int:
        """How many requests the budgets allow beside those that are under way."""
        left_usd = [self._paid_calls.find_left_usd()]
        if budget_usd is not None:
            left_usd.append(budget_usd - self._batches.sum_cost_usd([*followed.requests]))
        known_usd = [one for one in left_usd if one is not None]
        if not known_usd:
            return MAX_REQUESTS
        mean_usd = self._paid_calls.estimate_usd(STAGE, self._recipe.model)
        if mean_usd is None:
            raise BatchError(
                "what a call costs is not known, so no budget can be kept: "
                "run `plan --sample 5` first"
            )
        under_way = sum(batch.requests for batch in self._list_open())
        if not mean_usd:
            return MAX_REQUESTS
        affordable = min(known_usd) / (mean_usd * BATCH_PRICE_SHARE)
        return int(min(MAX_REQUESTS + under_way, affordable)) - under_way

    def _look(self, batch: SentBatch) -> BatchState | None:
        """What the provider says of a batch; None if it says nothing that can be read now."""
        try:
            return self._api.retrieve(str(batch.batch_id))
        except REFUSED:
            raise BatchError(
                f"the provider does not know the batch {batch.batch_id}: "
                "use the key and the address with which it was sent"
            ) from None
        except RetryableError:
            return None

    def _collect(self, batch: SentBatch, state: BatchState) -> None:
        """Keeps the answers of a batch that has ended, and deletes its files at the provider.

        Raises:
            BatchError: the provider does not give the answers.
        """
        lost = None
        for file_id in state.files:
            answered = map(self._read, self._api.read(file_id))
            try:
                while chunk := list(islice(answered, COLLECTED)):
                    self._batches.collect(batch.seq, [one for one in chunk if one])
            except REFUSED as error:
                lost = error
        if lost and now_utc() - batch.created_at < GIVEN_UP:
            raise BatchError(
                f"the provider does not give the answers of the batch {state.batch_id}: {lost}. "
                f"`apply --batch` tries again, and gives them up {GIVEN_UP.days} days after the "
                "batch was sent"
            )
        self._batches.end(batch.seq, state.status)
        self._delete(state.file_id, *state.files)
        if lost:
            raise BatchError(
                f"the provider has no answers of the batch {state.batch_id} any more: they are "
                "given up, and the next `apply` asks again"
            )

    def _delete(self, *file_ids: str) -> None:
        """Deletes files at the provider, if it may."""
        for file_id in file_ids:
            with suppress(ImagePipelineError):  # the provider deletes them after a month itself
                self._api.delete(file_id)

    def _read(self, line: Mapping[str, Any]) -> Answered | None:
        """What a line says of a request; None if it was never tried."""
        key, response = str(line.get("custom_id")), line.get("response")
        if not isinstance(response, dict):
            return None
        if response.get("status_code") != 200:
            return Answered(key, NOT_ANSWERED, None, None, None, None)
        try:
            answer = self._vision.read_body(response.get("body"))
        except (BadAnswerError, RefusedError) as error:
            return self._price(key, error.reason, error.usage, None)
        return self._price(key, "answered", answer.usage, dump_answer(answer))

    def _price(
        self, key: str, outcome: str, usage: CallUsage | None, answer: str | None
    ) -> Answered:
        cost_usd = self._paid_calls.price(self._recipe.model, usage)
        is_reported = usage is not None and usage.cost_usd  # then it is what the batch costs
        return Answered(
            key,
            outcome,
            usage.tokens_in if usage else None,
            usage.tokens_out if usage else None,
            cost_usd if cost_usd is None or is_reported else cost_usd * BATCH_PRICE_SHARE,
            answer,
        )


def _write(file: IO[bytes], questions: Questions, count: int) -> dict[str, str]:
    """Writes up to `count` questions, as far as a file may hold; gives the image IDs by key."""
    asked: dict[str, str] = {}
    size = 0
    while len(asked) < count and (question := questions.peek()):
        size += len(question.line)
        if size > MAX_FILE_BYTES:
            break
        questions.take()
        if question.key not in asked:
            file.write(question.line)
            asked[question.key] = question.image_id
    return asked


def _explain_failure(state: BatchState) -> str:
    code = f" ({state.code})" if state.code else ""
    return (
        f"the provider refused the batch {state.batch_id}{code}; it cost nothing. "
        "A smaller one may pass: `apply --batch --limit 100`"
    )


@contextmanager
def open_batch_calls(settings: Settings, catalogue: Catalogue) -> Iterator[BatchCalls]:
    """What fetches batches with the model and limits of these settings.

    Raises:
        BatchError: the vision model is not a remote one.
    """
    vision, database = build_vision(settings), settings.database_url
    if not isinstance(vision, OpenAIVision):
        raise BatchError("the local models need no batches: run `apply` without --batch")
    originals = build_originals(settings, open_storage(settings.storage))
    with open_paid_calls(settings) as paid_calls:
        yield BatchCalls(
            catalogue,
            Plans(database),
            Ledger(database),
            Batches(database),
            originals,
            vision,
            build_batch_api(settings),
            paid_calls,
            build_tenants(settings).find_spent,
        )

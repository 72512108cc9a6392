"""What has failed, as an administrator sees it: failed images, and unreadable entries of the list.

Imports no store, so that the command line can offer the reasons without waiting for one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from imagepipeline.errors import ImagePipelineError, InvalidUploadError, StackError, list_reasons
from imagepipeline.models import PRIORITY_LIMIT, Status, Upload

if TYPE_CHECKING:
    from imagepipeline.stores.catalogue import Catalogue
    from imagepipeline.stores.failures import FailedImages
    from imagepipeline.stores.uploads import UploadQueue

UNREADABLE = "unreadable"  # the reason of dead letters
MAX_RETRIES_PER_DAY = 5

Action = Literal["retry", "discard"]
DONE: dict[Action, str] = {"retry": "retried", "discard": "discarded"}


@dataclass(frozen=True)
class Failure:
    """A failed image or a dead letter: the row to show, and the two things to do with it."""

    row: dict[str, Any]
    retry: Callable[[], object]
    discard: Callable[[], object]

    def act(self, action: Action, is_dry_run: bool) -> tuple[bool, str]:
        """Retries or discards it; returns whether that was possible, and a sentence.

        A retry is refused where the file itself is at fault, and after five within a day.
        """
        if action == "retry" and (refusal := self._find_refusal()):
            return False, f"left alone: {refusal}"
        if is_dry_run:
            return True, f"would {action}"
        try:
            self.retry() if action == "retry" else self.discard()
        except InvalidUploadError as error:
            return False, f"left alone: {error}"
        return True, DONE[action]

    def _find_refusal(self) -> str | None:
        reason, retries = self.row["reason"], self.row["retries"]
        if not list_reasons().get(reason, True):
            return f"{reason}, which no other try can help: push a better file"
        return f"retried {retries} times within a day" if retries >= MAX_RETRIES_PER_DAY else None


class Failures:
    """All failures of a stack.

    Args:
        catalogue: where a retried image is accepted again.
        images: the failed images.
        queue: where the dead letters are.
        report: is told if the dead letters cannot be listed.
    """

    def __init__(
        self,
        catalogue: "Catalogue",
        images: "FailedImages",
        queue: "UploadQueue",
        report: Callable[[str], None],
    ) -> None:
        self._catalogue = catalogue
        self._images = images
        self._queue = queue
        self._report = report

    def iterate(self, reason: str | None = None) -> Iterator[Failure]:
        """Failed images, newest first, then dead letters if Redis answers; of one reason or all."""
        if reason != UNREADABLE:
            for image in self._images.iterate(reason):
                yield self._describe_image(image)
        if reason in (None, UNREADABLE):
            try:
                letters = self._queue.list_dead()
            except StackError as error:
                self._report(str(error))
                return
            for letter in letters:
                yield self._describe_letter(letter)

    def get(self, failure_id: str) -> Failure:
        """One failure, with all that is known of it.

        Raises:
            ImagePipelineError: there is none of that ID.
            StackError: a dead letter is meant and Redis does not answer.
        """
        image = self._catalogue.get(failure_id)
        if image is not None and image["status"] == Status.FAILED and image["discarded_at"] is None:
            return self._describe_image(image)
        if image is None and failure_id.startswith("dead-"):
            for letter in self._queue.list_dead():
                if letter["id"] == failure_id:
                    return self._describe_letter(letter)
        raise ImagePipelineError(
            f"{failure_id!r:.80} is not among the failures: see `imagepipeline failed list`"
        )

    def _describe_image(self, image: dict[str, Any]) -> Failure:
        a_day_ago = datetime.now(UTC) - timedelta(days=1)
        row = image | {"retries": self._images.count_retries(image["id"], a_day_ago)}

        def retry() -> None:
            # Built only now: an ID from an earlier version may be invalid, and stops only this one.
            # One of the bulk lane leaves it: only uploads are accepted.
            priority = max(image["priority"], -PRIORITY_LIMIT)
            upload = Upload(image["id"], image["requested_path"], priority)
            self._catalogue.accept([upload], "retried")

        return Failure(row, retry, partial(self._images.discard, image["id"]))

    def _describe_letter(self, letter: Mapping[str, Any]) -> Failure:
        row = {
            "id": letter["id"],
            "reason": UNREADABLE,
            "error": f"{letter['reason']}: {letter['entry']}",
            "attempts": letter["copies"],
            "retries": 0,
            "updated_at": datetime.fromtimestamp(letter["at"], UTC),
        }
        queue = self._queue
        return Failure(row, partial(queue.retry_dead, letter), partial(queue.discard_dead, letter))

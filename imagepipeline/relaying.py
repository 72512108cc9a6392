"""Relays events from the outbox to the Redis stream and to the app's webhook.

An event is marked after it was sent. A crash in between repeats it, with the same ID and in the
same order. Only one relay for each channel may run at a time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from imagepipeline.errors import NoticeRefusedError, NotificationError, PostponedError, StackError
from imagepipeline.events import EventType
from imagepipeline.services.notifier import EventWebhook
from imagepipeline.stores.events import EventLog, StoredEvent
from imagepipeline.stores.stream import EventStream

STREAMED_TOGETHER = 500
POSTED_TOGETHER = 25  # some 40 kB: many servers accept bodies of 100 kB only
PAUSE_SECONDS = 0.5  # between two looks at the outbox


@dataclass(frozen=True)
class Relayed:
    """How many events were sent, and why no more were."""

    count: int
    problem: str | None = None


def relay_for(seconds: float, relay: Callable[[], Relayed], lock: Lock) -> Relayed:
    """Relays for that time; returns the total and the last problem. Returns at once if locked."""
    if not lock.acquire(blocking=False):
        return Relayed(0, "an earlier tick is still at work")
    try:
        total, until = 0, time.monotonic() + seconds
        while True:
            done = relay()
            total += done.count
            if time.monotonic() + PAUSE_SECONDS > until:
                return Relayed(total, done.problem)
            if not done.count:
                time.sleep(PAUSE_SECONDS)
    finally:
        lock.release()


def relay_to_stream(log: EventLog, stream: EventStream) -> Relayed:
    """Moves some events to the stream; those that cannot be wait.

    Earlier events of an erased image are removed from it. Here, because nobody else can know that
    none is on its way.
    """
    try:
        unsent = log.list_unsent(STREAMED_TOGETHER)
        if unsent:
            erased = {event.image_id for event in unsent if event.type == EventType.ERASED}
            if erased:
                stream.remove(erased)
            stream.add(event.payload for event in unsent)
            log.mark_streamed(unsent)
    except (StackError, PostponedError) as error:
        return Relayed(0, str(error))
    return Relayed(len(unsent))


class WebhookRelay:
    """Posts events to the webhook, up to 25 together.

    If it does not answer, all wait: 5 s, 10 s, … 5 minutes. If it refuses events, half as many are
    tried, until a single one is refused: that one is postponed, with later ones of its image.
    """

    def __init__(self, log: EventLog, webhook: EventWebhook) -> None:
        self._log = log
        self._webhook = webhook
        self._size = POSTED_TOGETHER

    def relay(self) -> Relayed:
        """Posts some events; those that cannot be wait."""
        try:
            state = self._log.open_webhook()
            if state.is_waiting:
                return Relayed(0, state.problem)
            owed = self._log.list_owed(self._size)
            return self._post(owed) if owed else Relayed(0)
        except PostponedError as error:
            return Relayed(0, str(error))

    def _post(self, owed: list[StoredEvent]) -> Relayed:
        try:
            self._webhook.send([event.payload for event in owed])
        except NoticeRefusedError as error:
            if len(owed) > 1:
                self._size = len(owed) // 2
                return self._post(owed[: self._size])
            self._log.postpone(owed[0])
            self._log.note_webhook_failure(str(error))
            return Relayed(0, str(error))
        except NotificationError as error:
            self._log.note_webhook_failure(str(error))
            return Relayed(0, str(error))
        self._log.mark_posted(owed)
        self._size = min(self._size * 2, POSTED_TOGETHER)
        return Relayed(len(owed))

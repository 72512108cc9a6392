"""The sensor that empties the outbox: administrators are notified once of every final failure."""

from collections.abc import Callable, Iterable
from functools import partial

import dagster as dg

from imagepipeline.errors import NoticeRefusedError, NotificationError, PostponedError
from imagepipeline.services.notifier import Notifier
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.outbox import Outbox

DIGEST_ABOVE = 5


@dg.sensor(minimum_interval_seconds=15, default_status=dg.DefaultSensorStatus.RUNNING)
def notification_sensor(
    context: dg.SensorEvaluationContext,
    outbox: dg.ResourceParam[Outbox],
    ledger: dg.ResourceParam[Ledger],
    notifiers: dg.ResourceParam[list[Notifier]],
) -> dg.SkipReason:
    """Notifies the administrators of failed images and of pauses, every 15 s.

    More than five failures share one message. A notice that cannot be sent stays in the outbox for
    a week and is retried. It is marked after it was sent, so a crash in between repeats it, with
    the same event ID.
    """
    lines = []
    for notifier in notifiers:
        told, problems = 0, []
        for work in (partial(tell_of_pauses, ledger), partial(tell, outbox)):
            try:
                told += work(notifier)
            except (NotificationError, PostponedError) as error:
                problems.append(str(error))
            except Exception as error:  # one channel must not stop the other
                problems.append(f"{type(error).__name__} was raised")
        for problem in dict.fromkeys(problems):
            context.log.error(f"{notifier.channel}: {problem}; it stays in the outbox.")
            lines.append(f"{notifier.channel}: {problem}.")
        if not problems:
            lines.append(f"{notifier.channel}: {told} sent.")
    return dg.SkipReason(" ".join(lines) or "No webhook or mail server is set.")


def tell_of_pauses(ledger: Ledger, notifier: Notifier) -> int:
    """As `tell`, of each pause once; returns their number."""
    untold = ledger.list_untold(notifier.channel)
    notices = [
        (partial(notifier.send_pause, one), partial(ledger.mark_told, notifier.channel, [one]))
        for one in untold
    ]
    _send_each(notices)
    return len(untold)


def tell(outbox: Outbox, notifier: Notifier) -> int:
    """Sends what this notifier has not sent yet and marks it; returns the number of failures.

    A refused notice does not stop the others, and is tried again in the next tick.

    Raises:
        NotificationError: one could not be sent.
    """
    unsent = outbox.list_unsent(notifier.channel)
    messages = [unsent] if len(unsent) > DIGEST_ABOVE else [[failure] for failure in unsent]
    notices = [
        (partial(notifier.send, some), partial(outbox.mark_sent, notifier.channel, some))
        for some in messages
    ]
    _send_each(notices)
    return len(unsent)


def _send_each(notices: Iterable[tuple[Callable[[], None], Callable[[], None]]]) -> None:
    refusal = None
    for send, mark in notices:
        try:
            send()
        except NoticeRefusedError as error:
            refusal = error
        else:
            mark()
    if refusal:
        raise refusal

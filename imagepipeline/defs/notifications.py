"""Emptying the outbox: the administrators are told once of every image that has failed for good."""

import dagster as dg

from imagepipeline.errors import NotificationError, PostponedError
from imagepipeline.services.notifier import Notifier
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.ledger import Ledger

DIGEST_ABOVE = 5


@dg.sensor(minimum_interval_seconds=15, default_status=dg.DefaultSensorStatus.RUNNING)
def notification_sensor(
    context: dg.SensorEvaluationContext,
    catalogue: dg.ResourceParam[Catalogue],
    ledger: dg.ResourceParam[Ledger],
    notifiers: dg.ResourceParam[list[Notifier]],
) -> dg.SkipReason:
    """Tells the administrators of failed images and of pauses, every 15 s; more than five failures in one message.

    What cannot be sent stays in the outbox for a week and is tried again. A notice is marked after it was taken, so
    a crash in between repeats it, with the same event ID.
    """
    lines = []
    for notifier in notifiers:
        try:
            lines.append(f"{notifier.channel}: {tell_of_pauses(ledger, notifier) + tell(catalogue, notifier)} told.")
        except (NotificationError, PostponedError) as error:
            context.log.error(f"{notifier.channel}: {error}; it stays in the outbox.")
            lines.append(f"{notifier.channel}: {error}.")
    return dg.SkipReason(" ".join(lines) or "No webhook or mail server is set.")


def tell_of_pauses(ledger: Ledger, notifier: Notifier) -> int:
    """Tells of each pause once; gives the number told."""
    untold = ledger.list_untold(notifier.channel)
    for pause in untold:
        notifier.send_pause(pause)
        ledger.mark_told(notifier.channel, [pause])
    return len(untold)


def tell(catalogue: Catalogue, notifier: Notifier) -> int:
    """Sends what this notifier has not sent yet and marks it; gives the number of failures told."""
    unsent = catalogue.list_unsent(notifier.channel)
    messages = [unsent] if len(unsent) > DIGEST_ABOVE else [[failure] for failure in unsent]
    for failures in messages:
        notifier.send(failures)
        catalogue.mark_sent(notifier.channel, failures)
    return len(unsent)

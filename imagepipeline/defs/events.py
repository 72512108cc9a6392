"""The sensors that empty the outbox of events: to the Redis stream, and to the app's webhook."""

from functools import partial
from threading import Lock

import dagster as dg

from imagepipeline.errors import PostponedError
from imagepipeline.relaying import Relayed, WebhookRelay, relay_for, relay_to_stream
from imagepipeline.services.notifier import EventWebhook
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.stream import EventStream

TICK_SECONDS = 4  # a tick relays what comes in meanwhile, as a tick each second would cost more
# Dagster abandons a tick after a minute and starts another, which would disturb the order.
_streaming, _posting = Lock(), Lock()


@dg.sensor(minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING)
def event_sensor(
    context: dg.SensorEvaluationContext,
    event_log: dg.ResourceParam[EventLog],
    event_stream: dg.ResourceParam[EventStream],
    event_webhook: dg.ResourceParam[EventWebhook | None],
) -> dg.SkipReason:
    """Moves events to the Redis stream `image-processing:events`, and deletes old ones.

    While Redis does not answer, they wait in the catalogue. A crash repeats some, with the same IDs
    and in the same order.
    """
    try:
        if event_webhook is None:
            event_log.close_webhook()
        event_log.prune()
    except PostponedError as error:
        return dg.SkipReason(str(error))
    relay = partial(relay_to_stream, event_log, event_stream)
    return _report(context, relay_for(TICK_SECONDS, relay, _streaming))


@dg.sensor(minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING)
def event_webhook_sensor(
    context: dg.SensorEvaluationContext,
    event_log: dg.ResourceParam[EventLog],
    event_webhook: dg.ResourceParam[EventWebhook],
) -> dg.SkipReason:
    """Sends events to the app's webhook, up to 25 in one message.

    A webhook that fails is tried again after 5 s, 10 s, … 5 minutes. What it has not taken within a
    day is on the dead list: `imagepipeline events --dead`.
    """
    relay = WebhookRelay(event_log, event_webhook).relay
    return _report(context, relay_for(TICK_SECONDS, relay, _posting))


def _report(context: dg.SensorEvaluationContext, relayed: Relayed) -> dg.SkipReason:
    if relayed.problem:
        context.log.error(f"{relayed.problem}; events wait in the outbox.")
    return dg.SkipReason(
        f"{relayed.count} events sent." + (f" {relayed.problem}." if relayed.problem else "")
    )

"""Keeps events out of Dagster's tables that no page, command or person reads.

They were a third of a run's events. Each would be a transaction, and stay for a week.
"""

from typing import Any

from dagster import DagsterEventType
from dagster._core.events.log import EventLogEntry

# With its resources a run lists our classes; what it prints is not captured (see dagster.yaml).
UNREAD_TYPES = {
    DagsterEventType.RESOURCE_INIT_STARTED,
    DagsterEventType.RESOURCE_INIT_SUCCESS,
    DagsterEventType.LOGS_CAPTURED,
}
# How the engine's events of every run begin. If a new version of Dagster words them differently,
# they are stored again, and a test fails.
UNREAD_MESSAGES = (
    "Executing steps in process",
    "Finished steps in process",
    "Process for run exited",
)


class EventFilter:
    """A mixin for an event log storage that does not store what nobody reads."""

    def store_event(self, event: EventLogEntry) -> None:
        """Stores an event, unless nobody reads it."""
        if not is_unread(event):
            storage: Any = super()
            storage.store_event(event)


def is_unread(event: EventLogEntry) -> bool:
    """Whether nobody reads an event; an event with an error is read."""
    told = event.dagster_event
    if told is None or event.error_info is not None:
        return False
    if told.event_type == DagsterEventType.ENGINE_EVENT:
        is_error = told.engine_event_data.error is not None
        return not is_error and (told.message or "").startswith(UNREAD_MESSAGES)
    return told.event_type in UNREAD_TYPES

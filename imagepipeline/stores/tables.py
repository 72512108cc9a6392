"""The tables of the catalogue. A change needs a migration; a test compares the two."""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from imagepipeline.models import Status


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Timezone-aware UTC on every backend; SQLite stores no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Stores UTC."""
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        """Returns UTC."""
        stored: datetime | None = value
        return stored.replace(tzinfo=UTC) if stored and stored.tzinfo is None else stored


schema = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

UNENDED = "status = 'pending' OR status = 'processing'"
COUNTED_EVENTS = ("claimed", "completed", "failed", "check_failed")  # of all images, by time


def _index_part(name: str, condition: str, *columns: Any) -> sa.Index:
    """An index of the rows that meet a condition; see `equals`."""
    where = sa.text(condition)
    return sa.Index(name, *columns, sqlite_where=where, postgresql_where=where)


images = sa.Table(
    "images",
    schema,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False),
    # One generation is one life, from push to end; the number never falls.
    sa.Column("generation", sa.Integer, nullable=False),
    # The fencing token: every claim raises it, and writes with a lower one are refused.
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    # The most attempts that an asset has needed in this generation.
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("run_id", sa.String(64)),  # the Dagster run that holds the claim, or held it last
    # What the upload named; empty: the one file original/<id>.*
    sa.Column("requested_path", sa.String(512)),
    sa.Column("path", sa.String(512), index=True),  # where the original was when it was last read
    sa.Column("focus", sa.JSON(none_as_null=True)),  # what crops keep in view: x and y, 0 to 1
    # How often the ID was pushed, and how often before the last claim: that run covers those.
    sa.Column("pushes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("pushes_seen", sa.Integer, nullable=False, server_default="0"),
    sa.Column("original_bytes", sa.Integer),
    sa.Column("original_sha256", sa.String(64)),
    sa.Column("width", sa.Integer),  # of the original, upright, in pixels
    sa.Column("height", sa.Integer),
    # A data URI of a tiny WebP, for a page to show first.
    sa.Column("placeholder", sa.String(2000)),
    sa.Column("dominant_color", sa.String(7)),  # #rrggbb
    sa.Column("flaw", sa.String(300)),  # what is missing from a salvaged original
    sa.Column("metadata", sa.JSON(none_as_null=True)),
    sa.Column("reason", sa.String(32)),
    sa.Column("error", sa.String(300)),
    sa.Column("not_before", UtcDateTime),  # a pending image waits until then
    # The heartbeat: a living run raises it; one that stands still is dead.
    sa.Column("beat", sa.Integer, nullable=False),
    sa.Column("discarded_at", UtcDateTime),  # when an administrator discarded the failure
    sa.Column("accepted_at", UtcDateTime, nullable=False),
    # The generation in which it was accepted last; recoveries and waits raise `generation` alone.
    sa.Column("accepted_generation", sa.Integer, nullable=False, server_default="0"),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.Column("apply_id", sa.Integer),  # the last apply that began a generation
    sa.Column("tenant", sa.String(64), nullable=False, server_default=""),  # empty: none is named
    # What Dagster has of it: its `runs`, or a `summary` of them, or nothing.
    sa.Column("in_dagster", sa.String(8)),
    sa.Column("in_dagster_since", UtcDateTime),  # when a run took it last, or it was restored
    sa.Column("pruned_cost_usd", sa.Float),  # of paid calls for it whose rows were pruned
    sa.CheckConstraint(sa.column("status").in_([status.value for status in Status]), name="status"),
    # In the order in which runs start, so that a tick reads the first rows alone. Nearly all images
    # have ended, so these two are small.
    _index_part(
        *("ix_images_next", UNENDED, "status"),
        *(sa.column("priority").desc(), "accepted_at", "id"),
    ),
    _index_part(
        *("ix_images_next_of_tenant", UNENDED, "status", "tenant"),
        *(sa.column("priority").desc(), "accepted_at", "id"),
    ),
    sa.Index(None, "status", "updated_at"),
    _index_part("ix_images_apply_id_status", "apply_id IS NOT NULL", "apply_id", "status"),
    _index_part("ix_images_requested_path", "requested_path IS NOT NULL", "requested_path"),
    _index_part("ix_images_in_dagster", "in_dagster IS NOT NULL", "in_dagster", "in_dagster_since"),
)


def equals(column: sa.Column[str], value: str) -> sa.ColumnElement[bool]:
    """A condition with its value in the statement's text, not as a parameter.

    Only so does SQLite see that it may use an index of the rows with such values.
    """
    return column == sa.literal(value, sa.String, literal_execute=True)


# One row: the Dagster instance whose runs are named above.
catalogue_owner = sa.Table(
    "catalogue_owner",
    schema,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("dagster_instance_id", sa.String(64), nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
)

image_variants = sa.Table(
    "image_variants",
    schema,
    sa.Column("id", sa.String(96), primary_key=True),  # <image_id>-<name>-<format>
    sa.Column("image_id", sa.String(64), sa.ForeignKey("images.id"), nullable=False, index=True),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("format", sa.String(8), nullable=False),
    sa.Column("path", sa.String(512), nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    # It has the pixels of an earlier variant of the image, and usually its file.
    sa.Column("is_alias", sa.Boolean, nullable=False, server_default=sa.false()),
    # What made the file. Empty: an earlier version did, and the result says what, if it is not
    # stale; or the file is being made.
    sa.Column("recipe", sa.String(128)),
    # Whether there is a file for apps to show: not before the first one is checked, and not when
    # the variant is to be removed.
    sa.Column("is_published", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Index(
        "uq_image_variants_path",
        "path",
        unique=True,
        sqlite_where=sa.text("NOT is_alias"),
        postgresql_where=sa.text("NOT is_alias"),
    ),
    _index_part("ix_image_variants_alias_path", "is_alias", "path"),
)


def select_at_paths(
    column: sa.Column[str], paths: Collection[str], *conditions: sa.ColumnElement[bool]
) -> sa.CompoundSelect[tuple[str]]:
    """A column of the variants at these paths, from each of the two indexes by path."""
    found = sa.select(column).where(image_variants.c.path.in_(paths), *conditions)
    return sa.union_all(*(found.where(sa.text(part)) for part in ("NOT is_alias", "is_alias")))


INPUT_KEY = "substr(input_sha256, 1, 16)"  # enough to find the few rows with the same input

# What made each image's current results.
image_results = sa.Table(
    "image_results",
    schema,
    sa.Column("image_id", sa.String(64), sa.ForeignKey("images.id"), primary_key=True),
    sa.Column("asset", sa.String(16), primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("provider", sa.String(64), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("settings", sa.String(128), nullable=False),
    sa.Column("input_sha256", sa.String(64), nullable=False),
    sa.Column("made_at", UtcDateTime, nullable=False),
    # Not to be used: the original or, for the embedding, the text has changed; or it is being made.
    sa.Column("is_stale", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index(None, "asset", "provider", "model", "settings", "is_stale"),
    sa.Index("ix_image_results_input", sa.text(INPUT_KEY)),
)

# Answers that were paid for and whose results are not in place yet, by a hash of what was asked.
answers = sa.Table(
    "answers",
    schema,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
)

# What people have asked to be made of a plan. One without `ended_at` begins images, unless its
# lease has expired.
applies = sa.Table(
    "applies",
    schema,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("began_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime, index=True),
    sa.Column("end_reason", sa.String(16)),
    sa.Column("expires_at", UtcDateTime),  # empty: no lease
    sa.Column("max_images", sa.Integer),
    sa.Column("budget_usd", sa.Float),
    sa.Column("recipes", sa.JSON, nullable=False),  # version by asset
    sa.Column("conditions", sa.Text, nullable=False),  # JSON: what `Filter.to_list` gives
    sa.Column("begun_count", sa.Integer, nullable=False),
    sa.Column("last_id", sa.String(64), nullable=False),  # images begin in the order of their IDs
    sa.Column("spent_usd", sa.Float, nullable=False),
)

# Every change of an image, written in the transaction that makes it.
image_history = sa.Table(
    "image_history",
    schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("image_id", sa.String(64), sa.ForeignKey("images.id"), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("run_id", sa.String(64)),  # with `claimed` alone; it holds until the next claim
    sa.Column("event", sa.String(16), nullable=False),
    sa.Column("detail", sa.String(300)),
    sa.Index(None, "image_id"),
    _index_part(
        "ix_image_history_event_at",
        " OR ".join(f"event = '{event}'" for event in COUNTED_EVENTS),
        *("event", "at"),
    ),
)

# Images that were erased: if one is pushed again, its generation and fence go on from here.
erasures = sa.Table(
    "erasures",
    schema,
    sa.Column("image_id", sa.String(64), primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("erased_at", UtcDateTime, nullable=False),
)

# The outbox: one row for each final failure, written in the transaction that fails the image.
notifications = sa.Table(
    "notifications",
    schema,
    sa.Column("image_id", sa.String(64), sa.ForeignKey("images.id"), primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("error", sa.String(300), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failed_at", UtcDateTime, nullable=False, index=True),
    sa.Column("webhook_sent_at", UtcDateTime),
    sa.Column("mail_sent_at", UtcDateTime),
)

# What apps are told, written in the transaction of the change. There is no foreign key, because an
# event outlives an erased image.
#
# The views that apps read (docs/events.md) stand on images, image_variants and image_results. They
# keep their columns; on SQLite, a migration that rebuilds a table drops them and creates them anew.
events = sa.Table(
    "events",
    schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("event_id", sa.String(36), nullable=False, unique=True),
    sa.Column("image_id", sa.String(64), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("stream_sent_at", UtcDateTime),
    sa.Column("webhook_since", UtcDateTime),  # the webhook is owed it since then; empty: it is not
    sa.Column("webhook_due_at", UtcDateTime),  # the webhook refused it; not tried again before
    sa.Column("webhook_sent_at", UtcDateTime),
    sa.Column("webhook_died_at", UtcDateTime),  # when we gave it up
    sa.Index(None, "image_id", "seq"),
    _index_part("ix_events_for_stream", "stream_sent_at IS NULL", "seq"),
    _index_part("ix_events_for_webhook", "webhook_since IS NOT NULL", "seq"),
    sqlite_autoincrement=True,  # numbers of deleted events are not used again
)

# One row while a webhook for events is set, and how it does. New events are owed to it.
event_webhook = sa.Table(
    "event_webhook",
    schema,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("due_at", UtcDateTime, nullable=False),
    sa.Column("problem", sa.String(300)),
)

# One row for each call to a paid provider, whatever its outcome; old ones are pruned.
provider_calls = sa.Table(
    "provider_calls",
    schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
    sa.Column("image_id", sa.String(64)),
    sa.Column("generation", sa.Integer),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("provider", sa.String(64), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("outcome", sa.String(32), nullable=False),
    sa.Column("tokens_in", sa.Integer),
    sa.Column("tokens_out", sa.Integer),
    sa.Column("cost_usd", sa.Float),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("waited_seconds", sa.Float, nullable=False),
    sa.Column("batch", sa.Integer),  # provider_batches.seq, if it was made in one
    sa.Index(None, "image_id", "generation"),
    _index_part("ix_provider_calls_answered", "outcome = 'answered'", "model", "at"),
)

# What the calls of each day cost, written with each call: it outlives the calls.
call_sums = sa.Table(
    "call_sums",
    schema,
    sa.Column("day", sa.String(10), primary_key=True),  # in UTC, such as 2026-11-23
    sa.Column("stage", sa.String(16), primary_key=True),
    sa.Column("provider", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("tenant", sa.String(64), primary_key=True, server_default=""),  # the image's
    sa.Column("calls", sa.BigInteger, nullable=False),
    sa.Column("answered", sa.BigInteger, nullable=False),
    sa.Column("tokens_in", sa.BigInteger, nullable=False),
    sa.Column("tokens_out", sa.BigInteger, nullable=False),
    sa.Column("cost_usd", sa.Float, nullable=False),
    sa.Column("unpriced", sa.BigInteger, nullable=False),  # of unknown cost
)

# Many questions that are sent to a provider at once, to be answered within a day at half the price.
provider_batches = sa.Table(
    "provider_batches",
    schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("provider", sa.String(64), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("file_id", sa.String(128)),  # the provider's, once the questions are uploaded
    sa.Column("batch_id", sa.String(128)),  # the provider's, once the batch is created
    sa.Column("state", sa.String(16), nullable=False),  # the provider's, or `sending`
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("answered", sa.Integer, nullable=False),
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime, index=True),  # empty: answers may still come
)

# The questions of batches that are open, by the key under which the answer will be kept.
batch_requests = sa.Table(
    "batch_requests",
    schema,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column(
        "batch", sa.Integer, sa.ForeignKey("provider_batches.seq"), nullable=False, index=True
    ),
    sa.Column("image_id", sa.String(64), nullable=False),  # empty: it was erased since
)

# What stops all paid work: a bad key, no credit, a budget; or all work: a person. Open while
# ended_at is empty.
pauses = sa.Table(
    "pauses",
    schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("stage", sa.String(16)),  # whose calls caused it; empty: all
    sa.Column("message", sa.String(300), nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
    sa.Column("until", UtcDateTime),  # empty: until a person resumes
    sa.Column("ended_at", UtcDateTime),
    sa.Column("webhook_sent_at", UtcDateTime),
    sa.Column("mail_sent_at", UtcDateTime),
)

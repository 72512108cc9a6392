"""The asset `queue`: what waits and why, with its history, reported every minute."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import BaseModel

from imagepipeline.errors import PostponedError, StackError, list_rejections
from imagepipeline.models import BY_PERSON, Pause, now_utc
from imagepipeline.paid_calls import PaidCalls
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.uploads import UploadQueue
from imagepipeline.tenants import Tenants

QUEUE = dg.AssetKey("queue")
STUCK_AFTER = timedelta(minutes=10)  # a run takes seconds, a restart of all services one minute
MAX_AGE = timedelta(hours=1)
RECENT = timedelta(hours=1)
FAILURES_WITHIN = timedelta(days=1)
MAX_FAILURES = 10
# Unchanged figures are reported so often all the same, so that a gap in the history means trouble.
# At one report a minute a busy day adds as much to Dagster's database as forty images.
REPORT_EVERY = timedelta(minutes=15)
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN

queue_spec = dg.AssetSpec(
    QUEUE,
    group_name="images",
    owners=["team:imagepipeline"],
    kinds={"redis"},
    description="""What waits, how long, and why: look here first.

`waiting_count` uploads are on the Redis list, `pending_count` images wait for a run,
`processing_count` have one; the oldest of them was pushed `oldest_seconds` ago. `failures` lists
the newest failed images of a day with their reasons. `Plots` shows the history. Dagster's own queue
(Runs, Queued) holds only the next few runs; the rest waits here. If uploads name tenants, `tenants`
shows what each has waiting, its limits, and its costs of today.

Red: an operator must act. The check says what to do.""",
)
CHECKS = {
    "not_stuck": "Whatever waits moves: a run has taken an image within ten minutes, unless paid "
    "work is paused.",
    "none_waits_long": "No upload has waited for more than an hour.",
    "no_pause": "Work is not paused. A pause that a provider caused and a person must end is an "
    "error.",
    "nothing_to_mend": "No image has failed for a reason that an operator must remove, such as a "
    "missing original. Rejected and cancelled uploads do not count.",
    "no_dead_letters": "Every entry of the Redis list could be read.",
}


@dataclass(frozen=True)
class Backlog:
    """What waits, at one moment.

    Attributes:
        figures: numbers by metadata key; a key's meaning and unit never change.
        oldest_seconds: since the oldest upload that has not ended was accepted; 0 if there is none.
        is_moving: whether a run has claimed an image lately.
        pauses: of paid work.
        rate_problem: why no paid call is permitted soon, or empty.
        problem: why figures are missing: Redis does not answer.
        failures: the newest failures of a day.
        reasons: how many images have failed, by reason.
        tenants: what `Tenants.list_used` gives.
    """

    figures: Mapping[str, float]
    oldest_seconds: int
    is_moving: bool
    pauses: list[Pause]
    rate_problem: str
    problem: str | None
    failures: list[dict[str, Any]]
    reasons: Mapping[str, int]
    tenants: list[dict[str, Any]]

    @classmethod
    def measure(
        cls,
        queue: UploadQueue,
        catalogue: Catalogue,
        paid_calls: PaidCalls,
        tenants: Tenants,
        now: datetime,
    ) -> "Backlog":
        """Asks Redis and the catalogue.

        Raises:
            PostponedError: the catalogue does not answer.
        """
        figures: dict[str, float] = {}
        rate_problem, problem = "", None
        try:
            lists = queue.count()
            figures |= {
                "waiting_count": lists["waiting"],
                "dead_letter_count": lists["dead"],
            } | paid_calls.measure_use()
            _, rate_problem = paid_calls.count_affordable()
        except StackError as error:
            problem = str(error)
        counts = catalogue.count()
        since = now - RECENT
        figures |= {f"{status}_count": count for status, count in counts.items()} | {
            "completed_last_hour_count": catalogue.count_events("completed", since),
            "failed_last_hour_count": catalogue.count_events("failed", since),
        }
        oldest_at = catalogue.find_oldest()
        return cls(
            figures=figures,
            oldest_seconds=max(0, round((now - oldest_at).total_seconds())) if oldest_at else 0,
            is_moving=catalogue.count_events("claimed", now - STUCK_AFTER) > 0,
            pauses=paid_calls.list_pauses(),
            rate_problem=rate_problem,
            problem=problem,
            failures=catalogue.list_events("failed", now - FAILURES_WITHIN, MAX_FAILURES),
            reasons=catalogue.count_failures(),
            tenants=tenants.list_used(),
        )

    @property
    def waiting_count(self) -> int:
        """How many uploads and images wait for a run."""
        return int(self.figures.get("waiting_count", 0) + self.figures["pending_count"])

    @property
    def paused(self) -> str:
        """Why paid work is paused, as a text for people."""
        pauses = "; ".join(_explain(pause) for pause in self.pauses)
        return pauses or self.rate_problem or "no"

    @property
    def is_paused(self) -> bool:
        """Whether images wait for paid work that must not be done now."""
        return bool(self.pauses or self.rate_problem)

    def build_materialization(self) -> dg.AssetMaterialization:
        """The event of the asset."""
        failures = [
            {
                "at": f"{failure['at']:%F %T}",
                "image": failure["image_id"],
                "why": failure["detail"],
            }
            for failure in self.failures
        ]
        return dg.AssetMaterialization(
            QUEUE,
            metadata={
                "paused": self.paused,
                **self.figures,
                "oldest_seconds": self.oldest_seconds,
                **_build_table("failures", failures),
                **_build_table("tenants", self.tenants),
                **({"problem": self.problem} if self.problem else {}),
            },
        )

    def evaluate(self) -> list[dg.AssetCheckEvaluation]:
        """The results of the checks. Their texts change only when there is something new to say."""
        return [
            self._check_movement(),
            self._check_age(),
            self._check_pause(),
            self._check_failures(),
            self._check_dead_letters(),
        ]

    def _check_movement(self) -> dg.AssetCheckEvaluation:
        minutes = int(STUCK_AFTER.total_seconds() / 60)
        if self.problem:
            return _result("not_stuck", ERROR, self.problem)
        if not self.waiting_count or self.is_moving or self.figures["processing_count"]:
            return _result("not_stuck")
        if self.is_paused:
            return _result("not_stuck", description="Images wait because paid work is paused.")
        return _result(
            "not_stuck",
            ERROR,
            f"Uploads wait, and no run has taken one for {minutes} minutes: run `imagepipeline "
            "doctor`.",
        )

    def _check_age(self) -> dg.AssetCheckEvaluation:
        if self.oldest_seconds <= MAX_AGE.total_seconds():
            return _result("none_waits_long")
        if self.is_paused:
            return _result("none_waits_long", WARN, "Uploads wait because paid work is paused.")
        return _result(
            "none_waits_long",
            ERROR,
            "An upload has waited for more than an hour: if uploads pile up, add workers or slots.",
        )

    def _check_pause(self) -> dg.AssetCheckEvaluation:
        if not self.pauses:
            return _result("no_pause")
        needs_a_person = any(
            pause.until is None and pause.reason != BY_PERSON for pause in self.pauses
        )
        return _result("no_pause", ERROR if needs_a_person else WARN, self.paused)

    def _check_failures(self) -> dg.AssetCheckEvaluation:
        # A run of many images succeeds, whatever becomes of one. So this is red, not the run.
        excused = list_rejections() | {"cancelled"}
        reasons = [reason for reason in self.reasons if reason not in excused]
        if not reasons:
            return _result("nothing_to_mend")
        return _result(
            "nothing_to_mend",
            ERROR,
            f"Images have failed ({', '.join(sorted(reasons))}): see `imagepipeline failed list`, "
            "remove the cause, then retry or discard them.",
        )

    def _check_dead_letters(self) -> dg.AssetCheckEvaluation:
        count = self.figures.get("dead_letter_count", 0)
        if not count:
            return _result("no_dead_letters")
        return _result(
            "no_dead_letters",
            WARN,
            f"{count:g} unreadable entries wait for a decision: see `imagepipeline failed list "
            "--reason unreadable`.",
        )


def _build_table(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, dg.TableMetadataValue]:
    """The rows as a table, with all columns as texts; nothing without rows."""
    if not rows:
        return {}
    records = [dg.TableRecord({key: str(value) for key, value in row.items()}) for row in rows]
    columns = [dg.TableColumn(key, "string") for key in rows[0]]
    return {name: dg.MetadataValue.table(records, dg.TableSchema(columns))}


def _explain(pause: Pause) -> str:
    until = f"until {pause.until:%F %R} UTC" if pause.until else "until `imagepipeline resume`"
    return f"{pause.reason}, {until}: {pause.message}"


def _result(
    name: str, severity: dg.AssetCheckSeverity | None = None, description: str = "All is well."
) -> dg.AssetCheckEvaluation:
    """The result of a check; without a severity it has passed."""
    return dg.AssetCheckEvaluation(
        asset_key=QUEUE,
        check_name=name,
        passed=severity is None,
        severity=severity or ERROR,
        description=description,
    )


@dg.multi_asset_check(
    name="queue_checks",
    specs=[dg.AssetCheckSpec(name, asset=QUEUE, description=text) for name, text in CHECKS.items()],
)
def queue_checks(
    queue: dg.ResourceParam[UploadQueue],
    catalogue: dg.ResourceParam[Catalogue],
    paid_calls: dg.ResourceParam[PaidCalls],
    tenants: dg.ResourceParam[Tenants],
) -> Iterator[dg.AssetCheckResult]:
    """The checks of what waits now, as `queue_sensor` makes them."""
    for one in Backlog.measure(queue, catalogue, paid_calls, tenants, now_utc()).evaluate():
        yield dg.AssetCheckResult(
            passed=one.passed,
            check_name=one.check_name,
            severity=one.severity,
            description=one.description,
        )


class Reported(BaseModel):
    """The sensor's cursor: when it last reported, and what."""

    at: datetime = datetime.min.replace(tzinfo=UTC)
    figures: dict[str, float] = {}
    paused: str = ""
    checks: dict[str, str] = {}


@dg.sensor(minimum_interval_seconds=60, default_status=dg.DefaultSensorStatus.RUNNING)
def queue_sensor(
    context: dg.SensorEvaluationContext,
    queue: dg.ResourceParam[UploadQueue],
    catalogue: dg.ResourceParam[Catalogue],
    paid_calls: dg.ResourceParam[PaidCalls],
    tenants: dg.ResourceParam[Tenants],
) -> dg.SensorResult | dg.SkipReason:
    """Reports what waits, every minute if that changes and every 15 minutes if not.

    It starts no run, so it reports also when runs are stuck.
    """
    now = now_utc()
    try:
        backlog = Backlog.measure(queue, catalogue, paid_calls, tenants, now)
    except PostponedError as error:
        return dg.SkipReason(str(error))
    reported = Reported.model_validate_json(context.cursor) if context.cursor else Reported()
    results = {one.check_name: one for one in backlog.evaluate()}
    said = {name: f"{one.passed} {one.description}" for name, one in results.items()}
    is_due = now - reported.at >= REPORT_EVERY
    is_changed = (backlog.figures, backlog.paused) != (reported.figures, reported.paused)
    if not (is_due or is_changed or backlog.oldest_seconds or said != reported.checks):
        return dg.SkipReason("Nothing new to report.")
    changed = [one for name, one in results.items() if said[name] != reported.checks.get(name)]
    cursor = Reported(at=now, figures=dict(backlog.figures), paused=backlog.paused, checks=said)
    return dg.SensorResult(
        asset_events=[backlog.build_materialization(), *changed],
        cursor=cursor.model_dump_json(),
    )

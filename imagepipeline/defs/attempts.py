"""An attempt at one asset of one image: its claim, and what a failure means to Dagster and us."""

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from imagepipeline.defs.outcomes import REASON_TAG, STATUS_TAG, build_outcome, report_outcome
from imagepipeline.errors import (
    ImageBusyError,
    InvalidUploadError,
    PermanentError,
    PostponedError,
    RetryableError,
    StaleClaimError,
)
from imagepipeline.models import ASSETS, Claim, Status, check_image_id
from imagepipeline.originals import Originals
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.text import clean_error

MACHINE_TAG = "imagepipeline/machine"  # the host name of the worker that executes a run
GENERATION_TAG = "imagepipeline/generation"
ANEW_TAG = "imagepipeline/anew"  # assets to make although they are current, or `all`
GENERATION = re.compile(r"[0-9]{1,9}")
MAX_ATTEMPTS = 3
# For unclassified errors. Dagster waits (2^n - 1) x delay: 1 s, then 3 s.
RETRY_POLICY = dg.RetryPolicy(max_retries=MAX_ATTEMPTS - 1, delay=1, backoff=dg.Backoff.EXPONENTIAL)
BEAT_SECONDS = 10
STOPPED = "its run was stopped (SIGTERM, as after IMAGEPIPELINE_MAX_RUN_SECONDS)"
log = logging.getLogger(__name__)
# A run that is terminated by force is CANCELED at once.
CANCELLED_STATUSES = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


@dataclass(frozen=True)
class Work:
    """One attempt at one asset of one image.

    Attributes:
        claim: on the image.
        number: of the attempt, from 1.
        asked: assets to make although they are current, or `all`.
        report: writes a line to the run's log.
    """

    claim: Claim
    number: int
    asked: frozenset[str]
    report: Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """What an error means for an image.

    Attributes:
        text: a sentence for the run's log.
        wait_seconds: until the next attempt; None if this run makes no other.
        status: of the image, if this run has ended its claim: `failed`, or `pending`.
        reason: the code of the failure or the wait, if this run has ended its claim.
        needs_operator: whether the run must be red.
    """

    text: str
    wait_seconds: float | None = None
    status: Status | None = None
    reason: str | None = None
    needs_operator: bool = True

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which the list of runs shows it."""
        if self.status is None or self.reason is None:
            return {}
        return {STATUS_TAG: self.status.value, REASON_TAG: self.reason}


@contextmanager
def attempt(
    context: dg.AssetExecutionContext, catalogue: Catalogue, originals: Originals
) -> Iterator[Work | None]:
    """Claims the partition's image for the body, and ends the claim after the run's last asset.

    Yields None if another run has taken over the image: the asset then yields nothing, its step
    succeeds and later steps are skipped. A retryable error is retried after 1 s, 2 s, or the time
    that the provider asked for. A permanent error, or the last attempt, fails the image. The run
    fails only if an operator must act; otherwise it succeeds, and later steps are skipped. The
    asset `original` shows what became of the image.
    """
    claim = _claim(context, catalogue)
    if claim is None:
        context.log.info(
            f"{context.partition_key} was cancelled, or belongs to another run now: nothing was "
            "done."
        )
        yield None
        return
    number = context.retry_number + 1
    asked = frozenset(context.run.tags.get(ANEW_TAG, "").replace(" ", "").split(","))
    try:
        catalogue.record_attempt(claim, number)
        if start_heartbeat(catalogue, claim):
            context.instance.add_run_tags(context.run.run_id, {MACHINE_TAG: socket.gethostname()})
        yield Work(claim, number, asked, context.log.info)
        if not _is_last_asset(context):
            return
        status = catalogue.finish(claim)
        context.log.info(f"{claim.image_id} is {status}.")
        stop_heartbeat(claim)
        verdict = Verdict("", status=status, needs_operator=False)
    except DagsterExecutionInterruptedError as error:
        # If it were re-raised, Dagster would retry the step and ignore the stop.
        cause: BaseException = error
        verdict = interrupt_work(context, catalogue, claim)
    except Exception as error:
        cause = error
        verdict = settle(catalogue, claim, context.asset_key.to_user_string(), number, error)
        if isinstance(error, StaleClaimError):
            context.log.warning(verdict.text)
            return
        if verdict.wait_seconds is not None:
            context.log.warning(verdict.text)
            if not isinstance(error, RetryableError):
                raise  # RETRY_POLICY waits as long
            raise dg.RetryRequested(
                max_retries=MAX_ATTEMPTS - 1, seconds_to_wait=verdict.wait_seconds
            ) from error
    _show_end(context, catalogue, claim, originals, verdict)
    if verdict.needs_operator:
        context.log.error(verdict.text)
        raise _to_failure(claim, verdict) from cause


def _show_end(
    context: dg.AssetExecutionContext,
    catalogue: Catalogue,
    claim: Claim,
    originals: Originals,
    verdict: Verdict,
) -> None:
    if verdict.text and not verdict.needs_operator:
        context.log.warning(verdict.text)
    tags = verdict.tags
    if not tags and verdict.status and STATUS_TAG in context.run.tags:
        # A re-executed run begins with the tags of the failed one, and Dagster removes none.
        tags = {STATUS_TAG: verdict.status.value, REASON_TAG: "none"}
    if tags:
        context.instance.add_run_tags(context.run.run_id, tags)
    with suppress(PostponedError):  # the row has it all
        thumbnail = originals.find_thumbnail(claim)
        outcome = build_outcome(catalogue, claim.image_id, thumbnail)
        if verdict.needs_operator:
            report_outcome(context.instance, context.run, outcome)
        else:
            context.log_event(outcome)


def settle(
    catalogue: Catalogue, claim: Claim, asset: str, number: int, error: Exception
) -> Verdict:
    """Decides what an error in an attempt means, and records it.

    A postponed image waits for another run. A permanent error, or the last attempt, fails it.
    """
    if isinstance(error, StaleClaimError):
        return Verdict(f"{error}: this run writes nothing more.")
    if isinstance(error, PostponedError):
        verdict = _hand_back(catalogue, claim, str(error), error.wait_seconds, error.reason)
        return replace(verdict, needs_operator=error.needs_operator)
    if isinstance(error, PermanentError):
        verdict = _fail(catalogue, claim, error.reason, str(error))
        return replace(verdict, needs_operator=error.needs_operator)
    if isinstance(error, RetryableError):
        reason, text = error.reason, str(error)
        wait_seconds = max(error.retry_after_seconds or 0, 2 ** (number - 1))
        last_text = f"{text} (after {number} attempts)"
    else:
        clean_error(error)  # Dagster stores its text
        reason, text = "unexpected", f"{type(error).__name__}: {error}"
        wait_seconds, last_text = RETRY_POLICY.calculate_delay(number), text
    if number >= MAX_ATTEMPTS:
        return _fail(catalogue, claim, reason, last_text)
    with suppress(StaleClaimError, PostponedError):  # the next attempt handles it
        catalogue.record_failure(claim, asset, number, wait_seconds, text)
    return Verdict(
        f"{claim.image_id}: attempt {number} of {MAX_ATTEMPTS} at {asset} failed, "
        f"next in {wait_seconds:g} s: {text}",
        wait_seconds,
    )


def interrupt_work(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, catalogue: Catalogue, claim: Claim
) -> Verdict:
    """Fails the image if a person cancelled the run; any other stop counts as a lost run.

    Otherwise, an image that always takes too long would be tried, and paid for, without end.
    """
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status in CANCELLED_STATUSES:
        return _fail(catalogue, claim, "cancelled", f"run {run.run_id} was cancelled")
    try:
        status = catalogue.recover(claim, STOPPED)
    except (StaleClaimError, PostponedError) as problem:  # the reconciler recovers it
        return Verdict(f"{STOPPED}; {problem}.")
    reason = "poison" if status == Status.FAILED else "stopped"
    return Verdict(f"{STOPPED}; {claim.image_id} is {status}.", status=status, reason=reason)


def _claim(context: dg.AssetExecutionContext, catalogue: Catalogue) -> Claim | None:
    is_re_execution = context.run.parent_run_id is not None  # of a run whose generation has ended
    try:
        image_id = check_image_id(context.partition_key)  # Dagster accepts any text as a key
        if GENERATION_TAG in context.run.tags and not is_re_execution:
            generation = read_generation(context.run.tags)
            if generation is None:
                raise InvalidUploadError(
                    f"the run's tag {GENERATION_TAG} is not a number: start it without that tag"
                )
            return catalogue.claim(image_id, generation, context.run.run_id)
        return catalogue.claim_anew(image_id, context.run.run_id)
    except (ImageBusyError, InvalidUploadError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def read_generation(tags: Mapping[str, str]) -> int | None:
    """The generation in a run's tags, which anyone may write; None if there is none."""
    text = tags.get(GENERATION_TAG, "")
    return int(text) if GENERATION.fullmatch(text) else None


_beating: dict[tuple[str, int], threading.Event] = {}


def start_heartbeat(catalogue: Catalogue, claim: Claim) -> bool:
    """Raises the row's beat while this process holds the claim, also between attempts.

    A beat that stops tells the reconciler that the process died. Returns False if the heartbeat
    runs already.
    """
    if claim.key in _beating:
        return False
    _beating[claim.key] = threading.Event()
    arguments = (catalogue, claim, _beating[claim.key])
    threading.Thread(target=_beat, args=arguments, name="heartbeat", daemon=True).start()
    return True


def stop_heartbeat(claim: Claim) -> None:
    """Ends the heartbeat of a claim, if it runs."""
    if ended := _beating.pop(claim.key, None):
        ended.set()


def _beat(catalogue: Catalogue, claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            catalogue.beat(claim)
        except StaleClaimError:  # the image ended, or another run took over
            stop_heartbeat(claim)
            return
        except PostponedError:
            continue
        except Exception as error:  # without heartbeats, a healthy run would lose its image
            # Without the error's text, which may name an address.
            log.warning("a heartbeat of %s failed: %s", claim.image_id, type(error).__name__)


def _is_last_asset(context: dg.AssetExecutionContext) -> bool:
    """Whether the run has no later asset of this image; runs started by hand may select any."""
    steps = context.run.step_keys_to_execute
    selection = context.run.asset_selection
    names = (
        set(steps)
        if steps
        else {key.to_user_string() for key in selection}
        if selection
        else set(ASSETS)
    )
    this = context.asset_key.to_user_string()
    return not names.intersection(ASSETS[ASSETS.index(this) + 1 :])


def _fail(catalogue: Catalogue, claim: Claim, reason: str, error: str) -> Verdict:
    try:
        catalogue.fail(claim, reason, error)
    except (StaleClaimError, PostponedError) as problem:  # the reconciler recovers it
        return Verdict(f"{problem}. It failed anyway: {error}")
    text = f"{claim.image_id} failed ({reason}): {error}"
    return Verdict(text, status=Status.FAILED, reason=reason)


def _hand_back(
    catalogue: Catalogue, claim: Claim, cause: str, wait_seconds: float, reason: str
) -> Verdict:
    try:
        catalogue.hand_back(claim, cause, wait_seconds)
    except (StaleClaimError, PostponedError) as problem:  # the reconciler hands it back
        return Verdict(f"{cause}; {problem}.")
    text = f"{cause}; {claim.image_id} waits for another run."
    return Verdict(text, status=Status.PENDING, reason=reason)


def _to_failure(claim: Claim, verdict: Verdict) -> dg.Failure:
    metadata = {"image_id": claim.image_id, "reason": verdict.reason} if verdict.reason else None
    return dg.Failure(verdict.text, metadata=metadata, allow_retries=False)

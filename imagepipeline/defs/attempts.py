"""An attempt at one asset of one image: its claim, and what a failure means to Dagster and us."""

import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from imagepipeline.errors import (
    ImageBusyError,
    InvalidUploadError,
    PermanentError,
    PostponedError,
    RetryableError,
    StaleClaimError,
)
from imagepipeline.models import ASSETS, Claim, check_image_id
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.text import clean_error

MACHINE_TAG = "imagepipeline/machine"  # the host name of the worker that executes a run
GENERATION_TAG = "imagepipeline/generation"
GENERATION = re.compile(r"[0-9]{1,9}")
MAX_ATTEMPTS = 3
# For unclassified errors. Dagster waits (2^n - 1) x delay: 1 s, then 3 s.
RETRY_POLICY = dg.RetryPolicy(max_retries=MAX_ATTEMPTS - 1, delay=1, backoff=dg.Backoff.EXPONENTIAL)
BEAT_SECONDS = 10
# A run that is terminated by force is CANCELED at once.
CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


@contextmanager
def attempt(context: dg.AssetExecutionContext, catalogue: Catalogue) -> Iterator[Claim | None]:
    """Claims the partition's image for the body, and ends the claim after the run's last asset.

    Yields None if another run has taken over the image: the asset then yields nothing, its step
    succeeds and later steps are skipped. A retryable error is retried after 1 s, 2 s, or the time
    that the provider asked for. A permanent error, or the last attempt, fails the image.
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
    try:
        catalogue.record_attempt(claim, number)
        if _start_heartbeat(catalogue, claim):
            context.instance.add_run_tags(context.run.run_id, {MACHINE_TAG: socket.gethostname()})
        yield claim
        if _is_last_asset(context):
            context.log.info(f"{claim.image_id} is {catalogue.finish(claim)}.")
            _stop_heartbeat(claim)
    except StaleClaimError as error:
        context.log.warning(f"{error}: this run writes nothing more.")
    except RetryableError as error:
        if number < MAX_ATTEMPTS:
            wait_seconds = max(error.retry_after_seconds or 0, 2**context.retry_number)
            context.log.warning(
                f"Attempt {number} of {MAX_ATTEMPTS} failed, next in {wait_seconds:g} s: {error}"
            )
            _note_failure(context, catalogue, claim, wait_seconds, str(error))
            raise dg.RetryRequested(
                max_retries=MAX_ATTEMPTS - 1, seconds_to_wait=wait_seconds
            ) from error
        raise _failed(
            context, catalogue, claim, error.reason, f"{error} (after {number} attempts)"
        ) from error
    except PermanentError as error:
        raise _failed(context, catalogue, claim, error.reason, str(error)) from error
    except PostponedError as error:
        raise _handed_back(catalogue, claim, str(error), error.wait_seconds) from error
    except DagsterExecutionInterruptedError as interrupt:
        # If it were re-raised, Dagster would retry the step and ignore the stop.
        raise _interrupted(context, catalogue, claim) from interrupt
    except Exception as error:
        clean_error(error)  # Dagster stores its text
        description = f"{type(error).__name__}: {error}"
        if number == MAX_ATTEMPTS:
            raise _failed(context, catalogue, claim, "unexpected", description) from error
        _note_failure(context, catalogue, claim, RETRY_POLICY.calculate_delay(number), description)
        raise


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


def _start_heartbeat(catalogue: Catalogue, claim: Claim) -> bool:
    """Raises the row's beat while this process holds the claim, also between attempts.

    A beat that stops tells the reconciler that the process died. Returns False if the heartbeat
    runs already.
    """
    key = (claim.image_id, claim.fence)
    if key in _beating:
        return False
    _beating[key] = threading.Event()
    arguments = (catalogue, claim, _beating[key])
    threading.Thread(target=_beat, args=arguments, name="heartbeat", daemon=True).start()
    return True


def _stop_heartbeat(claim: Claim) -> None:
    if ended := _beating.pop((claim.image_id, claim.fence), None):
        ended.set()


def _beat(catalogue: Catalogue, claim: Claim, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        try:
            catalogue.beat(claim)
        except StaleClaimError:  # the image ended, or another run took over
            _stop_heartbeat(claim)
            return
        except PostponedError:
            continue


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


def _note_failure(
    context: dg.AssetExecutionContext,
    catalogue: Catalogue,
    claim: Claim,
    wait_seconds: float,
    error: str,
) -> None:
    asset = context.asset_key.to_user_string()
    try:
        catalogue.record_failure(claim, asset, context.retry_number + 1, wait_seconds, error)
    except (StaleClaimError, PostponedError) as problem:  # the next attempt handles it
        context.log.warning(str(problem))


def _failed(
    context: dg.AssetExecutionContext, catalogue: Catalogue, claim: Claim, reason: str, error: str
) -> dg.Failure:
    try:
        catalogue.fail(claim, reason, error)
    except (StaleClaimError, PostponedError) as problem:
        return dg.Failure(f"{problem}. It failed anyway: {error}", allow_retries=False)
    context.log.error(
        f"{claim.image_id} failed ({reason}) at attempt {context.retry_number + 1}: {error}"
    )
    return dg.Failure(
        f"{claim.image_id} failed ({reason}): {error}",
        metadata={"image_id": claim.image_id, "reason": reason},
        allow_retries=False,
    )


def _handed_back(catalogue: Catalogue, claim: Claim, cause: str, wait_seconds: float) -> dg.Failure:
    try:
        catalogue.hand_back(claim, cause, wait_seconds)
    except (StaleClaimError, PostponedError) as problem:  # the reconciler hands it back
        return dg.Failure(f"{cause}; {problem}.", allow_retries=False)
    return dg.Failure(f"{cause}; {claim.image_id} waits for another run.", allow_retries=False)


def _interrupted(
    context: dg.AssetExecutionContext, catalogue: Catalogue, claim: Claim
) -> dg.Failure:
    """Fails the image if a person cancelled the run; any other stop hands the image back."""
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status in CANCELLED:
        return _failed(
            context, catalogue, claim, "cancelled", f"run {context.run.run_id} was cancelled"
        )
    return _handed_back(catalogue, claim, "the run was stopped", 0)

"""Every error this package raises on purpose.

    ImagePipelineError
    ├── SettingsError               a setting is missing or malformed
    ├── StackError                  the local stack cannot be started, reached or stopped
    │   ├── CatalogueTakenError     the catalogue belongs to another Dagster instance
    │   └── RedisClusterError
    ├── InvalidUploadError          an entry on the Redis list is malformed
    ├── InvalidFilterError          a filter of images is malformed
    ├── NotificationError           a notice could not be sent; it will be tried again
    │   └── NoticeRefusedError      only this notice was refused
    ├── BatchError                  a batch of paid calls cannot be sent
    │   └── BatchBusyError          another process sends batches
    ├── ImageBusyError              another run is working on the image
    ├── StaleClaimError             the claim was taken over; write nothing more
    ├── PostponedError              the image is fine; it waits and no attempt is used
    │   ├── CatalogueDownError
    │   ├── ResidentDownError
    │   ├── SandboxMissingError
    │   ├── SandboxDownError
    │   ├── PausedError             all paid work is paused
    │   │   └── ForbiddenError      perhaps for this image only
    │   ├── RateLimitError
    │   ├── TenantSpentError
    │   ├── StorageDownError
    │   └── DiskFullError
    ├── RetryableError              another attempt may succeed
    │   ├── ProviderUnavailableError
    │   │   └── ProviderTimedOutError
    │   ├── BadAnswerError
    │   │   └── FormatRefusedError
    │   ├── MissingOriginalError
    │   ├── SandboxLostError
    │   └── WrongVariantsError
    └── PermanentError              no further attempt can succeed
        ├── EmptyOriginalError
        ├── TooLargeError
        ├── LimitError
        ├── UnsupportedFormatError
        ├── UnreadableImageError
        ├── TruncatedImageError
        ├── MissingMetadataError
        ├── PathTakenError
        ├── UnsafePathError
        ├── InputInvalidError
        ├── RefusedError
        └── ProviderRejectedError

`reason` is the code stored in the catalogue, for filters; the message is for people.
`can_be_retried` says whether the same file can succeed later, perhaps under other settings.
If not `needs_operator`, the upload is rejected or waits for paid work, and the run succeeds all the
same: the pipeline is healthy. docs/failures.md describes every reason.
"""

from typing import Any, ClassVar

from imagepipeline.text import make_printable
from imagepipeline.usage import CallUsage


class ImagePipelineError(Exception):
    """The root. Its text is printable: messages quote untrusted input and end in terminals."""

    needs_operator: ClassVar[bool] = True

    def __str__(self) -> str:
        return make_printable(super().__str__())


class SettingsError(ImagePipelineError):
    """A setting is missing or malformed. The message names it and says what it must look like."""


class StackError(ImagePipelineError):
    """The local stack cannot be started, reached or stopped.

    The message may have several lines: the end of a log.
    """

    def __str__(self) -> str:
        return "\n".join(map(make_printable, Exception.__str__(self).split("\n")))


class CatalogueTakenError(StackError):
    """The catalogue belongs to another Dagster instance; two would think each other's runs dead."""


class RedisClusterError(StackError):
    """Redis runs as a cluster, which cannot change several of our lists in one step."""


class InvalidUploadError(ImagePipelineError):
    """An upload is malformed; an entry of the Redis list goes to the dead list with this."""


class InvalidFilterError(ImagePipelineError):
    """A filter of images names an unknown field, or a value that does not fit its field."""


class NotificationError(ImagePipelineError):
    """A notice could not be sent and stays in the outbox. The message contains no address."""


class NoticeRefusedError(NotificationError):
    """The receiver answers but refuses this notice; it may accept others."""


class BatchError(ImagePipelineError):
    """The provider has no batches, or answered nothing in one. Ordinary calls may work."""


class BatchBusyError(BatchError):
    """Another process sends batches, or their answers must be awaited first."""


class ApplyBusyError(StackError):
    """Another apply is under way; the message says whose."""


class UnknownCostError(ImagePipelineError):
    """A budget cannot be kept, because it is not known what some calls cost."""


class ImageBusyError(ImagePipelineError):
    """Another run is processing the image; the message names that run."""


class StaleClaimError(ImagePipelineError):
    """A later run took over the image. The run that gets this must write nothing more."""


class PostponedError(ImagePipelineError):
    """The image cannot be processed now, through no fault of its own.

    It waits for `wait_seconds` and no attempt is used.
    """

    reason: str = "postponed"
    wait_seconds: ClassVar[float] = 60


class CatalogueDownError(PostponedError):
    """The database does not answer. The message omits the address, which may hold a password."""

    reason = "catalogue_down"
    wait_seconds = 5


class ResidentDownError(PostponedError):
    """The process with the index and the offline models does not answer; it is being restarted."""

    reason = "resident_down"
    wait_seconds = 5


class SandboxMissingError(PostponedError):
    """The kernel cannot confine decoders here, and a setting forbids decoding without that."""

    reason = "sandbox_missing"


class SandboxDownError(PostponedError):
    """No process that decodes can be started: the machine lacks memory, or runs too many."""

    reason = "sandbox_down"


class PausedError(PostponedError):
    """No paid call may be made now: a bad key, no credit, a spent budget, an overloaded provider.

    `reason` is the pause's code. `pause_seconds` None means until a person resumes.
    """

    needs_operator = False  # the pause itself is shown, once for all images
    wait_seconds = 0  # images go on as soon as the pause ends

    def __init__(self, reason: str, message: str, pause_seconds: float | None) -> None:
        super().__init__(message)
        self.reason = reason
        self.pause_seconds = pause_seconds


class ForbiddenError(PausedError):
    """The provider forbids the call and does not say whether because of the key or the picture."""


class RateLimitError(PostponedError):
    """The rate limit of paid calls is exhausted for longer than a run waits."""

    reason = "rate_limit"
    needs_operator = False
    wait_seconds = 0  # no run starts without a permit, so a raised limit takes effect at once


class TenantSpentError(PostponedError):
    """The tenant's budget of today is used up."""

    reason = "tenant_budget"
    needs_operator = False


class StorageDownError(PostponedError):
    """The object store does not answer, or denies access."""

    reason = "storage_down"


class DiskFullError(PostponedError):
    """The disk is full."""

    reason = "disk_full"


class RetryableError(ImagePipelineError):
    """Another attempt may succeed. `outcome` is the ledger's code if it is not the reason."""

    reason: ClassVar[str] = "unexpected"
    outcome: ClassVar[str | None] = None
    can_be_retried: ClassVar[bool] = True

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ProviderUnavailableError(RetryableError):
    """The provider did not answer, was overloaded, or asked us to slow down."""

    reason = "provider_unavailable"


class ProviderTimedOutError(ProviderUnavailableError):
    """The answer was not complete in the time a call may take. The provider may still charge."""

    outcome = "timed_out"


class BadAnswerError(RetryableError):
    """The answer does not fit the schema. `usage` is what the provider charges for it."""

    reason = "bad_output"

    def __init__(self, message: str, usage: CallUsage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


class FormatRefusedError(BadAnswerError):
    """The provider does not know an optional parameter; the next attempt omits it."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class MissingOriginalError(RetryableError):
    """There is no original, more than one, or it is not a plain file under the storage root.

    Another attempt may succeed: some uploaders push the ID before the file is in place.
    """

    reason = "missing"


class SandboxLostError(RetryableError):
    """The process that decoded or encoded the image crashed or timed out."""

    reason = "crashed"


class WrongVariantsError(RetryableError):
    """The variants that were stored are incomplete, or contain more than pixels."""

    reason = "wrong_variants"


class PermanentError(ImagePipelineError):
    """No further attempt can succeed, unless `can_be_retried` and a person changes something."""

    reason: ClassVar[str] = "unexpected"
    can_be_retried: ClassVar[bool] = False


class EmptyOriginalError(PermanentError):
    """The original has no bytes."""

    reason = "empty"
    needs_operator = False


class TooLargeError(PermanentError):
    """The original has too many bytes."""

    reason = "too_large"
    needs_operator = False
    can_be_retried = True


class LimitError(PermanentError):
    """The original exceeds a limit: pixels, frames, side, profile, texts, memory or CPU time."""

    reason = "limits"
    needs_operator = False
    can_be_retried = True


class UnsupportedFormatError(PermanentError):
    """The bytes are not in an accepted image format."""

    reason = "unsupported"
    needs_operator = False


class UnreadableImageError(PermanentError):
    """The bytes claim an accepted format but are damaged."""

    reason = "corrupt"
    needs_operator = False


class TruncatedImageError(PermanentError):
    """The end of the original is missing."""

    reason = "truncated"
    needs_operator = False


class MissingMetadataError(PermanentError):
    """The image has no metadata yet, from which this asset is made."""

    reason = "missing_metadata"
    can_be_retried = True


class PathTakenError(PermanentError):
    """Another image already owns the path a variant would be written to."""

    reason = "path_taken"
    needs_operator = False


class UnsafePathError(PermanentError):
    """The path of a file leads through a symbolic link or a file, or its name is too long."""

    reason = "unsafe_path"
    can_be_retried = True


class InputInvalidError(PermanentError):
    """The provider cannot read the picture it was sent."""

    reason = "input_invalid"
    can_be_retried = True


class RefusedError(PermanentError):
    """The model or its content policy refused. `usage` is what the provider charges for it."""

    reason = "refused"
    needs_operator = False
    can_be_retried = True
    usage: CallUsage | None = None


class ProviderRejectedError(PermanentError):
    """The provider rejects the request (model, address, parameter), or its vectors do not fit."""

    reason = "provider_rejected"
    can_be_retried = True


def list_reasons() -> dict[str, bool]:
    """Every reason for which an image can fail, and whether it can be retried."""
    # These have no class: foreign errors, lost and cancelled runs, invalid IDs of old versions.
    reasons = {"unexpected": True, "poison": True, "cancelled": True, "invalid_id": False}
    for kind in _list_kinds(RetryableError, PermanentError):
        reasons.setdefault(kind.reason, kind.can_be_retried)
    return reasons


def explain_next(image_id: str, reason: str, retry: str = "") -> str:
    """What a person can do about a failed image; `retry` is another way to retry it."""
    if list_reasons().get(reason, True):
        return f"once the cause is removed, run `imagepipeline failed retry {image_id}`{retry}"
    return "push a better file: no retry can help"


def list_rejections() -> set[str]:
    """The reasons for which the upload is at fault."""
    return {kind.reason for kind in _list_kinds(PermanentError) if not kind.needs_operator}


def _list_kinds(*roots: type[ImagePipelineError]) -> list[Any]:
    kinds = [*roots]
    for kind in kinds:  # it grows meanwhile
        kinds += kind.__subclasses__()
    return kinds

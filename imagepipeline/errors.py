"""Every error this package raises on purpose.

    ImagePipelineError
    ├── SettingsError               a setting is missing or malformed
    ├── StackError                  the local stack cannot be started, reached or stopped
    │   ├── CatalogueTakenError     the catalogue belongs to another Dagster instance
    │   └── RedisClusterError
    ├── InvalidUploadError          an entry on the Redis list cannot be read
    ├── NotificationError           the administrators could not be told; they will be
    │   └── NoticeRefusedError      of this one thing
    ├── ImageBusyError              another run is working on the image
    ├── StaleClaimError             the claim was taken over; write nothing more
    ├── PostponedError              nothing is wrong with the image; it waits, and no attempt is used
    │   ├── CatalogueDownError
    │   ├── ResidentDownError
    │   ├── SandboxMissingError
    │   ├── PausedError             nor will any other image be worked on
    │   │   └── ForbiddenError      unless it is this image alone that is forbidden
    │   ├── RateLimitError
    │   ├── StorageDownError
    │   └── DiskFullError
    ├── RetryableError              another attempt may succeed
    │   ├── ProviderUnavailableError
    │   │   └── ProviderTimedOutError
    │   ├── BadAnswerError
    │   │   └── FormatRefusedError
    │   ├── MissingOriginalError
    │   └── SandboxLostError
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

`reason` is the word the catalogue stores beside the message; it is for filters, the message is for people.
`can_be_retried` says whether a later try of the same file can succeed, perhaps under other settings.
"""

from typing import ClassVar

from imagepipeline.text import make_printable
from imagepipeline.usage import CallUsage


class ImagePipelineError(Exception):
    """Root of the tree. Messages may quote what others wrote and end in logs and terminals: they are printable."""

    def __str__(self) -> str:
        return make_printable(super().__str__())


class SettingsError(ImagePipelineError):
    """A setting is missing or malformed; the message names it and says what it must look like."""


class StackError(ImagePipelineError):
    """The local stack cannot be started, reached or stopped. The message may have several lines: the end of a log."""

    def __str__(self) -> str:
        return "\n".join(map(make_printable, Exception.__str__(self).split("\n")))


class CatalogueTakenError(StackError):
    """The catalogue belongs to another Dagster instance: two of them would take each other's runs for dead."""


class RedisClusterError(StackError):
    """Redis runs as a cluster, which spreads our lists over several servers; they must be moved as one."""


class InvalidUploadError(ImagePipelineError):
    """An entry on the Redis list cannot be read; it belongs on the dead list with this message."""


class NotificationError(ImagePipelineError):
    """The administrators could not be told; the notice stays in the outbox. The message names no address."""


class NoticeRefusedError(NotificationError):
    """The other end is there and refuses this one notice; others it may take."""


class ImageBusyError(ImagePipelineError):
    """Another run is working on the image; the message names that run."""


class StaleClaimError(ImagePipelineError):
    """The claim was taken over by a successor: whoever gets this writes nothing more and ends quietly."""


class PostponedError(ImagePipelineError):
    """Nothing is wrong with the image, but it cannot be worked on now: it goes back to wait, no attempt is used."""

    wait_seconds: ClassVar[float] = 60


class CatalogueDownError(PostponedError):
    """The database does not answer. The message leaves out the address, which may hold a password."""

    wait_seconds = 5


class ResidentDownError(PostponedError):
    """The process that keeps the index and the offline models does not answer; it is being started again."""

    wait_seconds = 5


class SandboxMissingError(PostponedError):
    """The kernel does not confine decoders here, and a setting forbids decoding without."""


class PausedError(PostponedError):
    """No paid call may be made now, for any image: a bad key, no credit, a budget reached, a provider that wants quiet.

    `reason` is the pause's word; `pause_seconds` None means until a person resumes.
    """

    wait_seconds = 0  # the pause alone decides, so that its end counts at once

    def __init__(self, reason: str, message: str, pause_seconds: float | None) -> None:
        super().__init__(message)
        self.reason = reason
        self.pause_seconds = pause_seconds


class ForbiddenError(PausedError):
    """The provider forbids the call and does not say whether for the key's sake or the picture's."""


class RateLimitError(PostponedError):
    """The rate limit of paid calls is used up for longer than a run waits."""

    wait_seconds = (
        0  # no run begins before there is a permit again, so that a raised limit counts at once
    )


class StorageDownError(PostponedError):
    """The object store does not answer, or refuses us."""


class DiskFullError(PostponedError):
    """There is no room left to write to."""


class RetryableError(ImagePipelineError):
    """Another attempt may succeed. `outcome` is the word for the ledger, where that is not the reason."""

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
    """The whole answer was not there within the time a call may take; the provider may charge for it all the same."""

    outcome = "timed_out"


class BadAnswerError(RetryableError):
    """The provider answered something that does not fit the schema. `usage` is what it will charge for it."""

    reason = "bad_output"
    usage: CallUsage | None = None


class FormatRefusedError(BadAnswerError):
    """The provider does not know an optional parameter; the next attempt does without it."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class MissingOriginalError(RetryableError):
    """There is no original, or more than one, or it is not a plain file under the storage root.

    Another attempt may succeed, as some uploaders push the ID before its file is in place.
    """

    reason = "missing"


class SandboxLostError(RetryableError):
    """The process that decoded or encoded the image crashed, or took too long by the clock."""

    reason = "crashed"


class WrongVariantsError(RetryableError):
    """The variants that were stored are incomplete, or contain more than pixels."""

    reason = "wrong_variants"


class PermanentError(ImagePipelineError):
    """No further attempt can succeed, as things are; where `can_be_retried`, a person may change them."""

    reason: ClassVar[str] = "unexpected"
    can_be_retried: ClassVar[bool] = False


class EmptyOriginalError(PermanentError):
    """The original has no bytes."""

    reason = "empty"


class TooLargeError(PermanentError):
    """The original has too many bytes."""

    reason = "too_large"
    can_be_retried = True


class LimitError(PermanentError):
    """The original exceeds another limit: pixels, frames, side, profile, texts, or the memory or CPU time it takes."""

    reason = "limits"
    can_be_retried = True


class UnsupportedFormatError(PermanentError):
    """The bytes are of no accepted image format."""

    reason = "unsupported"


class UnreadableImageError(PermanentError):
    """The bytes claim an accepted format but are damaged."""

    reason = "corrupt"


class TruncatedImageError(PermanentError):
    """The end of the original is missing."""

    reason = "truncated"


class MissingMetadataError(PermanentError):
    """The image has no metadata yet, which this asset is made from."""

    reason = "missing_metadata"
    can_be_retried = True


class PathTakenError(PermanentError):
    """Another image already owns the path a variant would be written to."""

    reason = "path_taken"


class UnsafePathError(PermanentError):
    """A file would be written through a symbolic link."""

    reason = "unsafe_path"
    can_be_retried = True


class InputInvalidError(PermanentError):
    """The provider cannot read the picture it was sent."""

    reason = "input_invalid"
    can_be_retried = True


class RefusedError(PermanentError):
    """The model declined to describe the image, or its content policy did. `usage` is what it will charge for it."""

    reason = "refused"
    can_be_retried = True
    usage: CallUsage | None = None


class ProviderRejectedError(PermanentError):
    """The provider rejects the request itself: wrong model, address or parameter; or its vectors do not fit."""

    reason = "provider_rejected"
    can_be_retried = True


def list_reasons() -> dict[str, bool]:
    """Every reason an image can have failed for, and whether it can be tried again."""
    # Those of errors that are not ours, of runs that were lost or cancelled, and of IDs that earlier versions let in.
    reasons = {"unexpected": True, "poison": True, "cancelled": True, "invalid_id": False}
    kinds: list[type[RetryableError] | type[PermanentError]] = [RetryableError, PermanentError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        reasons.setdefault(kind.reason, kind.can_be_retried)
    return reasons

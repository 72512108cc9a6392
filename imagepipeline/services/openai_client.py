"""The openai client as we use it: no retries of its own, bounds on time and size, and its errors made ours.

Both remote models stand on it: any provider that speaks the OpenAI wire format will do.
"""

import email.utils
import functools
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx2
import openai

from imagepipeline.deadlines import call_within
from imagepipeline.errors import (
    BadAnswerError,
    ForbiddenError,
    FormatRefusedError,
    ImagePipelineError,
    InputInvalidError,
    PausedError,
    ProviderRejectedError,
    ProviderTimedOutError,
    ProviderUnavailableError,
    RefusedError,
)
from imagepipeline.usage import CallUsage

TIMEOUT_SECONDS = 60.0  # between two signs of life
CALL_SECONDS = 90.0  # for a whole call, however many signs of life there are
MAX_ANSWER_BYTES = 4_000_000  # an embedding of 4,096 dimensions has 100 kB
MAX_TOKENS, MAX_COST_USD = 1e9, 1e3  # of one call, that are believed
MAX_RETRY_AFTER_SECONDS, MAX_PAUSE_SECONDS = 120, 86_400
# How long nothing is asked after a bad key or an empty account; then one image tries whether it was mended.
PROBE_SECONDS = 600
FORBIDDEN_PROBE_SECONDS = (
    60  # a 403 may be about the picture, and then it should not keep the others for long
)
RETRYABLE_STATUSES = frozenset({408, 409, 429})
FORBIDDING_STATUSES = frozenset({403, 451})
QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
    }
)
POLICY_CODES = frozenset(
    {
        "content_policy_violation",
        "content_filter",
        "moderation_blocked",
        "ResponsibleAIPolicyViolation",
    }
)
# Where no code says so: how providers write that they object to what they were sent.
POLICY_STATUSES = frozenset({400, 403, 422, 451})
POLICY_TEXT = re.compile(
    r"flagged|moderat(ed|ion)|nsfw|unsafe|inappropriate|prohibited[_ ]content|responsible ?ai|not allowed by our"
    r"|content.{0,3}(polic|filter|manage|violat|restrict)|(polic|guideline|terms|rules).{0,30}violat"
    r"|(violat|against)\w{0,10}.{0,30}(polic|guideline|terms|rules)|usage (polic|guideline)"
    r"|safety.{0,3}(polic|system|filter|check|reason|violat)|(due to|reason).{0,5}safety",
    re.IGNORECASE,
)
# The same words may be about the caller. Then nothing can be said of the picture, unless the body quotes it.
CALLER_TEXT = re.compile(
    r"\b(account|organi[sz]ation|api.?key|subscription|billing|region|country|territory|suspended|deactivated|banned)\b",
    re.IGNORECASE,
)
PICTURE_TEXT = re.compile(r"flagged_input|\"reasons\"\s*:\s*\[")
POLICY_ENDS = (
    "content_filter",
    "safety",
    "image_safety",
    "prohibited_content",
    "refusal",
    "blocklist",
)
MAX_ERROR_CHARACTERS = 4_000  # of an error's body, that are looked at
IMAGE_CODES = frozenset(
    {
        "invalid_image",
        "invalid_image_format",
        "image_too_large",
        "image_parse_error",
        "invalid_base64",
    }
)
# Only these are quoted: whatever else a provider writes may repeat our key.
KNOWN_CODES = (
    QUOTA_CODES
    | POLICY_CODES
    | IMAGE_CODES
    | {"invalid_api_key", "model_not_found", "rate_limit_exceeded"}
)
# Parameters that some providers and models do not know; the vision model then asks in another way.
OPTIONAL_PARAMETERS = (
    "response_format",
    "json_schema",
    "json_object",
    "max_completion_tokens",
    "max_tokens",
    "detail",
)


# What the client lets through when the body is not what it expects.
UNREADABLE = (
    *(
        openai.OpenAIError,
        httpx2.HTTPError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ),
)


class RawAnswer(Protocol):
    """What the client gives by `with_raw_response`, as far as it is used here."""

    http_response: httpx2.Response

    @property
    def content(self) -> bytes:
        """The body, unpacked."""


A = TypeVar("A", bound=RawAnswer)


class ProviderClient:
    """A provider under the name errors call it by.

    It tries once: attempts are the pipeline's business, and a client's own retries would multiply them. It follows no
    redirect, which would take the picture and the key elsewhere.
    """

    def __init__(self, name: str, api_key: str, base_url: str) -> None:
        self._name = name
        self._open = functools.partial(_open_client, api_key, base_url)
        self._client = self._open()

    @contextmanager
    def call(self) -> Iterator[Callable[[Callable[[openai.OpenAI], A]], A]]:
        """Gives what asks with the client. What it raises becomes one of our errors, which never quote the answer."""
        try:
            yield self._ask
        except openai.APIStatusError as error:
            text = f"{error.param or ''} {error.message}"
            raise _classify(
                self._name, _Complaint(error.status_code, error.code, text, error.response)
            ) from None
        except UnboundedAnswerError as error:
            raise BadAnswerError(f"{self._name} sent {error}") from None
        except openai.APIConnectionError as error:  # includes timeouts
            cause = (
                error.__cause__
            )  # where there is one, it came up before the client had the status
            if isinstance(cause, UnboundedAnswerError):
                raise BadAnswerError(f"{self._name} sent {cause}") from None
            if isinstance(cause, httpx2.DecodingError):
                raise BadAnswerError(
                    f"{self._name} sent an answer that cannot be unpacked"
                ) from None
            raise ProviderUnavailableError(
                f"{self._name} did not answer: {type(error).__name__}"
            ) from None
        except UNREADABLE as error:
            raise BadAnswerError(
                f"{self._name} sent an answer that cannot be read: {type(error).__name__}"
            ) from None

    def _ask(self, request: Callable[[openai.OpenAI], A]) -> A:
        """The answer to a request, if it comes in time.

        One that is late is left behind with its client. To close its connection from here could close a file that has
        been given the same number by then.
        """
        client = self._client
        try:
            raw = call_within(CALL_SECONDS, lambda: request(client))
        except TimeoutError:
            self._client = self._open()
            message = f"{self._name} did not answer in full within {CALL_SECONDS:g} s"
            raise ProviderTimedOutError(message) from None
        if complaint := _find_complaint(raw):
            raise _classify(self._name, complaint)
        return raw


def _open_client(api_key: str, base_url: str) -> openai.OpenAI:
    http_client = openai.DefaultHttpxClient(
        verify=load_certificates(), follow_redirects=False, event_hooks={"response": [_bound]}
    )
    return openai.OpenAI(
        api_key=api_key,
        base_url=base_url,
        timeout=TIMEOUT_SECONDS,
        max_retries=0,
        http_client=http_client,
        default_headers={"Accept-Encoding": "identity"},
    )


class UnboundedAnswerError(Exception):
    """An answer is too large, as it comes or unpacked."""


class _BoundedStream(httpx2.SyncByteStream):
    """The bytes of an answer, unpacked piece by piece, up to a limit."""

    def __init__(self, response: httpx2.Response) -> None:
        headers = {"Content-Encoding": response.headers.pop("content-encoding", "identity")}
        self._packed = httpx2.Response(200, headers=headers, stream=response.stream)

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._packed.iter_bytes():
            length += len(chunk)
            if length > MAX_ANSWER_BYTES:
                raise UnboundedAnswerError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
            yield chunk

    def close(self) -> None:
        self._packed.close()


def _bound(response: httpx2.Response) -> None:
    """Before the body of an answer is read: has its bytes counted, also where it is packed, though we do not ask so.

    It is UTF-8, as JSON is, whatever its header says: of the encodings it could name, some take quadratic time.
    """
    response.encoding = "utf-8"
    response.stream = _BoundedStream(response)


@functools.cache
def load_certificates() -> ssl.SSLContext:
    """The authorities we trust, read once a process: that takes 20 ms."""
    return httpx2.create_ssl_context()


def read_usage(usage: Any) -> CallUsage | None:
    """What an answer says it used, or None if it says nothing that can be; OpenRouter adds the cost in US dollars."""
    names = (
        ("prompt_tokens", MAX_TOKENS),
        ("completion_tokens", MAX_TOKENS),
        ("cost", MAX_COST_USD),
    )
    tokens_in, tokens_out, cost_usd = (
        _read_number(getattr(usage, name, None), most) for name, most in names
    )
    if not tokens_in and not cost_usd:  # no call uses nothing
        return None
    return CallUsage(int(tokens_in or 0), int(tokens_out or 0), cost_usd)


def _read_number(value: Any, most: float) -> float | None:
    """A number from 0 to that; some servers write numbers as text."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if number is not None and 0 <= number <= most else None


@dataclass(frozen=True)
class _Complaint:
    """What a provider objects to: an HTTP status, its own code, and the text in which parameters are named."""

    status: int
    code: Any
    text: str
    response: httpx2.Response


def _find_complaint(raw: RawAnswer) -> _Complaint | None:
    """The error in an answer whose status says that all is well, as routers send it when they have begun to answer."""
    if b'"error"' not in raw.content:
        return None
    answer = json.loads(raw.content)
    parts = [answer, *(answer.get("choices") or [])[:1]] if isinstance(answer, dict) else []
    for error in (part.get("error") for part in parts if isinstance(part, dict)):
        if not isinstance(error, dict):
            continue
        code = error.get("code")
        status = int(_read_number(code, 599) or 0)
        if status >= 400 or code in KNOWN_CODES:
            return _Complaint(status or 400, code, str(error.get("message")), raw.http_response)
    return None


def _classify(provider: str, complaint: _Complaint) -> ImagePipelineError:
    status, code, headers = complaint.status, str(complaint.code or ""), complaint.response.headers
    summary = f"{provider} answered {status}" + (f" ({code})" if code in KNOWN_CODES else "")
    body = complaint.response.text[:MAX_ERROR_CHARACTERS]
    speaks_of_content = status in POLICY_STATUSES and bool(
        POLICY_TEXT.search(body) or PICTURE_TEXT.search(body)
    )
    speaks_of_caller = CALLER_TEXT.search(body) and not PICTURE_TEXT.search(body)
    if code in POLICY_CODES or (speaks_of_content and not speaks_of_caller):
        return RefusedError(f"{summary}: the image is against its content policy")
    if code in QUOTA_CODES or status == 402:
        advice = "top up the account, or raise its limit; `imagepipeline resume` tries at once"
        return PausedError("quota", f"{summary}: {advice}", PROBE_SECONDS)
    advice = "check the key; `imagepipeline resume` tries at once"
    if status == 401:
        return PausedError("auth", f"{summary}: {advice}", PROBE_SECONDS)
    if status in FORBIDDING_STATUSES or speaks_of_content:
        return ForbiddenError("auth", f"{summary}: {advice}", FORBIDDEN_PROBE_SECONDS)
    if status in RETRYABLE_STATUSES or status >= 500:
        wait_seconds = read_retry_after(headers)
        if wait_seconds is not None and wait_seconds > MAX_RETRY_AFTER_SECONDS:
            asked = f"{summary} and asked for {wait_seconds:.0f} s of quiet"
            return PausedError("rate_limited", asked, min(wait_seconds, MAX_PAUSE_SECONDS))
        return ProviderUnavailableError(summary, wait_seconds)
    if code in IMAGE_CODES:
        return InputInvalidError(f"{summary}: it cannot read the picture")
    parameter = _refused_parameter(complaint)
    if parameter:
        return FormatRefusedError(f"{summary}: it does not know {parameter}", parameter)
    if 300 <= status < 400:
        return ProviderRejectedError(
            f"{summary}, and redirects are not followed: set the address it redirects to"
        )
    return ProviderRejectedError(f"{summary}: check the model's name and the address")


def _refused_parameter(complaint: _Complaint) -> str | None:
    """The optional parameter a 400 or 422 complains of."""
    if complaint.status not in (400, 422):
        return None
    return next((name for name in OPTIONAL_PARAMETERS if name in complaint.text), None)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """How long to wait, in seconds: `retry-after-ms`, else `Retry-After` as seconds or as a date (RFC 9110, 10.2.3).

    A date counts from the answer's own Date. None if there is none that can be read.
    """
    for name, unit_seconds in (("retry-after-ms", 0.001), ("retry-after", 1)):
        try:
            seconds = float(str(headers.get(name))) * unit_seconds
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        asked = email.utils.parsedate_to_datetime(headers.get("retry-after") or "")
        answered = email.utils.parsedate_to_datetime(headers.get("date") or "")
        return max(0.0, (asked - answered).total_seconds())
    except (ValueError, TypeError):
        return None

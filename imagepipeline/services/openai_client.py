"""A wrapper of the openai client that adds limits on time and size, and raises our own errors.

Both remote models use it. It works with any provider that speaks the OpenAI wire format.
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

TIMEOUT_SECONDS = 60.0  # without any data received
CALL_SECONDS = 90.0  # for a whole call, even if data keeps arriving
MAX_ANSWER_BYTES = 4_000_000  # an embedding of 4,096 dimensions has 100 kB
MAX_TOKENS, MAX_COST_USD = 1e9, 1e3  # higher values for one call are considered wrong
MAX_RETRY_AFTER_SECONDS, MAX_PAUSE_SECONDS = 120, 86_400
# Length of the pause after a bad key or an empty account. Then one image probes the provider.
PROBE_SECONDS = 600
# Shorter, because a 403 may be about one picture and should not delay the others for long.
FORBIDDEN_PROBE_SECONDS = 60
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
# How providers express a content policy violation without one of these codes.
POLICY_STATUSES = frozenset({400, 403, 422, 451})
POLICY_TEXT = re.compile(
    r"flagged|moderat(ed|ion)|nsfw|unsafe|inappropriate|prohibited[_ ]content"
    r"|responsible ?ai|not allowed by our"
    r"|content.{0,3}(polic|filter|manage|violat|restrict)"
    r"|(polic|guideline|terms|rules).{0,30}violat"
    r"|(violat|against)\w{0,10}.{0,30}(polic|guideline|terms|rules)|usage (polic|guideline)"
    r"|safety.{0,3}(polic|system|filter|check|reason|violat)|(due to|reason).{0,5}safety",
    re.IGNORECASE,
)
# The same words may be about the caller's account and then tell nothing about the picture, unless
# the body contains a verdict on the input.
CALLER_TEXT = re.compile(
    r"\b(account|organi[sz]ation|api.?key|subscription|billing|region|country|territory"
    r"|suspended|deactivated|banned)\b",
    re.IGNORECASE,
)
INPUT_VERDICT_TEXT = re.compile(r"flagged_input|\"reasons\"\s*:\s*\[")
POLICY_FINISH_REASONS = (
    "content_filter",
    "safety",
    "image_safety",
    "prohibited_content",
    "refusal",
    "blocklist",
)
MAX_ERROR_CHARACTERS = 4_000  # the rest of an error's body is ignored
IMAGE_CODES = frozenset(
    {
        "invalid_image",
        "invalid_image_format",
        "image_too_large",
        "image_parse_error",
        "invalid_base64",
    }
)
# Only these are quoted in messages; any other text of a provider may contain our key.
KNOWN_CODES = (
    QUOTA_CODES
    | POLICY_CODES
    | IMAGE_CODES
    | {"invalid_api_key", "model_not_found", "rate_limit_exceeded"}
)
# Parameters that some providers and models do not support; the vision model then does without them.
OPTIONAL_PARAMETERS = (
    "response_format",
    "json_schema",
    "json_object",
    "max_completion_tokens",
    "max_tokens",
    "detail",
)


# Errors that the client raises for a body it cannot read.
UNREADABLE = (
    *(
        openai.OpenAIError,
        httpx2.HTTPError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ),
)


class RawAnswer(Protocol):
    """The part of a response from the client's `with_raw_response` that is used here."""

    http_response: httpx2.Response

    @property
    def content(self) -> bytes:
        """The decompressed body."""


A = TypeVar("A", bound=RawAnswer)


class ProviderClient:
    """A client for one provider.

    It does not retry, because the pipeline does. It does not follow redirects, which would send the
    picture and the key elsewhere.

    Args:
        name: What error messages call the provider.
        api_key: The key.
        base_url: The address of the API.
        max_answer_bytes: The largest answer that is read; None for `MAX_ANSWER_BYTES`.
        call_seconds: The time for a whole call, even if data keeps arriving; None for
            `CALL_SECONDS`.
    """

    def __init__(
        self,
        name: str,
        api_key: str,
        base_url: str,
        max_answer_bytes: int | None = None,
        call_seconds: float | None = None,
    ) -> None:
        self._name = name
        self._call_seconds = call_seconds or CALL_SECONDS
        self._open = functools.partial(
            _open_client, api_key, base_url, max_answer_bytes or MAX_ANSWER_BYTES
        )
        self._client = self._open()

    @contextmanager
    def call(self) -> Iterator[Callable[[Callable[[openai.OpenAI], A]], A]]:
        """Yields a function that makes a request with the client.

        Errors in the context become our own errors, which never quote the response.
        """
        try:
            yield self._ask
        except openai.APIStatusError as error:
            text = f"{error.param or ''} {error.message}"
            raise _classify(
                self._name, _ProviderError(error.status_code, error.code, text, error.response)
            ) from None
        except AnswerTooLargeError as error:
            raise BadAnswerError(f"{self._name} sent {error}") from None
        except openai.APIConnectionError as error:  # includes timeouts
            cause = error.__cause__  # if set, raised before the client had the status
            if isinstance(cause, AnswerTooLargeError):
                raise BadAnswerError(f"{self._name} sent {cause}") from None
            if isinstance(cause, httpx2.DecodingError):
                raise BadAnswerError(
                    f"{self._name} sent an answer that cannot be decompressed"
                ) from None
            raise ProviderUnavailableError(
                f"{self._name} did not answer: {type(error).__name__}"
            ) from None
        except UNREADABLE as error:
            raise BadAnswerError(explain_unreadable(self._name, error)) from None

    def _ask(self, request: Callable[[openai.OpenAI], A]) -> A:
        """Makes a request and returns the answer, if it arrives in time.

        A late request is abandoned together with its client. Closing its connection from this
        thread could close another file that has since been given the same descriptor.
        """
        client = self._client
        try:
            raw = call_within(self._call_seconds, lambda: request(client))
        except TimeoutError:
            self._client = self._open()
            message = f"{self._name} did not complete its answer within {self._call_seconds:g} s"
            raise ProviderTimedOutError(message) from None
        if error := _find_error(raw):
            raise _classify(self._name, error)
        return raw


def explain_unreadable(name: str, error: Exception) -> str:
    """Returns a sentence about a body that cannot be read; it quotes nothing of it."""
    return f"{name} sent an answer that cannot be read: {type(error).__name__}"


def _open_client(api_key: str, base_url: str, max_answer_bytes: int) -> openai.OpenAI:
    limit_size = functools.partial(_limit_size, max_bytes=max_answer_bytes)
    http_client = openai.DefaultHttpxClient(
        verify=load_certificates(), follow_redirects=False, event_hooks={"response": [limit_size]}
    )
    return openai.OpenAI(
        api_key=api_key,
        base_url=base_url,
        timeout=TIMEOUT_SECONDS,
        max_retries=0,
        http_client=http_client,
        default_headers={"Accept-Encoding": "identity"},
    )


class AnswerTooLargeError(Exception):
    """An answer is too large, before or after decompression."""


class _SizeLimitedStream(httpx2.SyncByteStream):
    """Streams the bytes of an answer, decompressed, up to a limit."""

    def __init__(self, response: httpx2.Response, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        headers = {"Content-Encoding": response.headers.pop("content-encoding", "identity")}
        self._compressed = httpx2.Response(200, headers=headers, stream=response.stream)

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._compressed.iter_bytes():
            length += len(chunk)
            if length > self._max_bytes:
                raise AnswerTooLargeError(f"an answer of more than {self._max_bytes:,} bytes")
            yield chunk

    def close(self) -> None:
        self._compressed.close()


def _limit_size(response: httpx2.Response, max_bytes: int) -> None:
    """Limits the size of a response's body, before it is read.

    The limit applies to the decompressed body, as a provider may compress it although we ask for
    none. The body is always decoded as UTF-8, like any JSON, because the header could name an
    encoding that takes quadratic time.
    """
    response.encoding = "utf-8"
    response.stream = _SizeLimitedStream(response, max_bytes)


@functools.cache
def load_certificates() -> ssl.SSLContext:
    """Returns the trusted certificates, which are loaded once per process, as it takes 20 ms."""
    return httpx2.create_ssl_context()


def read_usage(usage: Any) -> CallUsage | None:
    """Returns the usage that an answer reports, or None if it reports none that is plausible.

    OpenRouter also reports the cost in US dollars.
    """
    names = (
        ("prompt_tokens", MAX_TOKENS),
        ("completion_tokens", MAX_TOKENS),
        ("cost", MAX_COST_USD),
    )
    tokens_in, tokens_out, cost_usd = (
        _read_number(getattr(usage, name, None), maximum) for name, maximum in names
    )
    if not tokens_in and not cost_usd:  # every call uses something
        return None
    return CallUsage(int(tokens_in or 0), int(tokens_out or 0), cost_usd)


def _read_number(value: Any, maximum: float) -> float | None:
    """Returns a number from 0 to `maximum`, or None; some servers send numbers as strings."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if number is not None and 0 <= number <= maximum else None


def _is_file(raw: RawAnswer) -> bool:
    """Returns whether it is a file of ours or of answers, which may well contain errors."""
    return raw.http_response.request.url.path.endswith("/content")


@dataclass(frozen=True)
class _ProviderError:
    """An error response: the HTTP status, the provider's code, and a text that names parameters."""

    status: int
    code: Any
    text: str
    response: httpx2.Response


def _find_error(raw: RawAnswer) -> _ProviderError | None:
    """Returns the error in a response with status 200.

    Routers send such responses when an error occurs after they have begun to answer.
    """
    if b'"error"' not in raw.content or _is_file(raw):
        return None
    answer = json.loads(raw.content)
    parts = [answer, *(answer.get("choices") or [])[:1]] if isinstance(answer, dict) else []
    for error in (part.get("error") for part in parts if isinstance(part, dict)):
        if not isinstance(error, dict):
            continue
        code = error.get("code")
        status = int(_read_number(code, 599) or 0)
        if status >= 400 or code in KNOWN_CODES:
            return _ProviderError(status or 400, code, str(error.get("message")), raw.http_response)
    return None


def _classify(provider: str, error: _ProviderError) -> ImagePipelineError:
    status, code, headers = error.status, str(error.code or ""), error.response.headers
    summary = f"{provider} answered {status}" + (f" ({code})" if code in KNOWN_CODES else "")
    body = error.response.text[:MAX_ERROR_CHARACTERS]
    mentions_policy = status in POLICY_STATUSES and bool(
        POLICY_TEXT.search(body) or INPUT_VERDICT_TEXT.search(body)
    )
    mentions_caller = CALLER_TEXT.search(body) and not INPUT_VERDICT_TEXT.search(body)
    if code in POLICY_CODES or (mentions_policy and not mentions_caller):
        return RefusedError(f"{summary}: the image violates its content policy")
    if code in QUOTA_CODES or status == 402:
        advice = "top up the account or raise its limit; `imagepipeline resume` retries at once"
        return PausedError("quota", f"{summary}: {advice}", PROBE_SECONDS)
    advice = "check the key; `imagepipeline resume` retries at once"
    if status == 401:
        return PausedError("auth", f"{summary}: {advice}", PROBE_SECONDS)
    if status in FORBIDDING_STATUSES or mentions_policy:
        return ForbiddenError("auth", f"{summary}: {advice}", FORBIDDEN_PROBE_SECONDS)
    if status in RETRYABLE_STATUSES or status >= 500:
        wait_seconds = read_retry_after(headers)
        if wait_seconds is not None and wait_seconds > MAX_RETRY_AFTER_SECONDS:
            message = f"{summary} and asked to wait for {wait_seconds:.0f} s"
            return PausedError("rate_limited", message, min(wait_seconds, MAX_PAUSE_SECONDS))
        return ProviderUnavailableError(summary, wait_seconds)
    if code in IMAGE_CODES:
        return InputInvalidError(f"{summary}: it cannot read the picture")
    parameter = _find_refused_parameter(error)
    if parameter:
        return FormatRefusedError(f"{summary}: it does not support {parameter}", parameter)
    if 300 <= status < 400:
        return ProviderRejectedError(
            f"{summary}, and redirects are not followed: set the URL that it redirects to"
        )
    return ProviderRejectedError(f"{summary}: check the model's name and the base URL")


def _find_refused_parameter(error: _ProviderError) -> str | None:
    """Returns the optional parameter that a 400 or 422 response names."""
    if error.status not in (400, 422):
        return None
    return next((name for name in OPTIONAL_PARAMETERS if name in error.text), None)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns how many seconds to wait, or None if the headers do not say so.

    Reads `retry-after-ms`, or else `Retry-After` as seconds or as a date (RFC 9110, 10.2.3). A date
    is relative to the response's own Date.
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
    except (ValueError, TypeError, OverflowError):
        return None

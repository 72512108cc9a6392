"""The openai client as we use it: no retries of its own, bounds on time and size, and its errors made ours.

Both remote models stand on it: any provider that speaks the OpenAI wire format will do.
"""

import email.utils
import functools
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
import openai
from openai.types import CreateEmbeddingResponse

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
from imagepipeline.models import CallUsage

TIMEOUT_SECONDS = 60.0  # between two signs of life
CALL_SECONDS = 90.0  # for a whole call, however many signs of life there are
MAX_ANSWER_BYTES = 4_000_000  # an embedding of 4,096 dimensions has 100 kB
MAX_RETRY_AFTER_SECONDS, MAX_PAUSE_SECONDS = 120, 86_400
# How long nothing is asked after a bad key or an empty account; then one image tries whether it was mended.
PROBE_SECONDS = 600
FORBIDDEN_PROBE_SECONDS = 60  # a 403 may be about the picture, and then it should not keep the others for long
RETRYABLE_STATUSES = frozenset({408, 409, 429})
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
    {"content_policy_violation", "content_filter", "moderation_blocked", "ResponsibleAIPolicyViolation"}
)
# Where no code says so: how providers write that it is the picture they object to, and not the caller.
POLICY_STATUSES = frozenset({400, 403, 422, 451})
POLICY_TEXT = re.compile(
    r"flagged_input|requires moderation|moderation (block|fail|reject)|content[_ ]?(polic|filter|management|moderation)"
    r"|(safety|usage) (polic|system|filter)|prohibited[_ ]content|responsible ?ai|inappropriate"
    r"|(input|image|picture|prompt|content)\b.{0,40}\b(flagged|unsafe|not allowed by our)"
    r"|(flagged|unsafe)\b.{0,40}\b(input|image|picture|prompt|content)",
    re.IGNORECASE,
)
MAX_ERROR_CHARACTERS = 4_000  # of an error's body, that are looked at
IMAGE_CODES = frozenset(
    {"invalid_image", "invalid_image_format", "image_too_large", "image_parse_error", "invalid_base64"}
)
# Only these are quoted: whatever else a provider writes may repeat our key.
KNOWN_CODES = QUOTA_CODES | POLICY_CODES | IMAGE_CODES | {"invalid_api_key", "model_not_found", "rate_limit_exceeded"}
# Parameters that some providers and models do not know; the vision model then asks in another way.
OPTIONAL_PARAMETERS = ("response_format", "json_schema", "json_object", "max_completion_tokens", "max_tokens", "detail")


A = TypeVar("A")


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
        """Gives what asks with the client, and turns what is raised into one of our errors, never quoting the answer.

        The client lets foreign errors through when the body is not what it expects (ValueError, TypeError, …).
        """
        try:
            yield self._ask
        except openai.APIStatusError as error:
            raise _classify(self._name, error) from None
        except UnboundedAnswerError as error:
            raise BadAnswerError(f"{self._name} sent {error}") from None
        except openai.APIConnectionError as error:  # includes timeouts
            if isinstance(error.__cause__, UnboundedAnswerError):  # it came up before the client had the status
                raise BadAnswerError(f"{self._name} sent {error.__cause__}") from None
            raise ProviderUnavailableError(f"{self._name} did not answer: {type(error).__name__}") from None
        except (openai.OpenAIError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise BadAnswerError(f"{self._name} sent an answer that cannot be read: {type(error).__name__}") from None

    def _ask(self, request: Callable[[openai.OpenAI], A]) -> A:
        """What the request gives, if it does so in time.

        In a thread, since a client's timeouts begin anew with every byte: one that comes now and then, of a header or
        of the TLS handshake, would hold the caller for as long as the provider likes. A thread that is late is left
        behind; its next read fails, as its connection is closed.
        """
        answer: Future[A] = Future()
        client = self._client

        def work() -> None:
            try:
                answer.set_result(request(client))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=work, name="provider call", daemon=True).start()
        try:
            return answer.result(CALL_SECONDS)
        except TimeoutError:
            if answer.done():  # it was the request's own
                raise
            client.close()
            self._client = self._open()
            problem = f"{self._name} did not answer in full within {CALL_SECONDS:g} s"
            raise ProviderTimedOutError(problem) from None


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
    """An answer is too large, or may become so when it is unpacked."""


class _BoundedStream(httpx2.SyncByteStream):
    """The bytes of an answer, up to a limit."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._stream:
            length += len(chunk)
            if length > MAX_ANSWER_BYTES:
                raise UnboundedAnswerError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    """Before the body of an answer is read: refuses one that is packed, and has its bytes counted."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnboundedAnswerError("a packed answer, which was not asked for")
    response.stream = _BoundedStream(response.stream)


@functools.cache
def load_certificates() -> ssl.SSLContext:
    """The authorities we trust, read once a process: that takes 20 ms."""
    return httpx2.create_ssl_context()


def rehearse() -> None:
    """Reads the certificates, and has the client make what it makes when it is first used; nobody is asked."""
    load_certificates()
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "{}"}}
    answer = {"id": "", "object": "list", "created": 0, "model": "", "choices": [choice], "data": [], "usage": usage}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=answer))
    with httpx2.Client(transport=transport) as http_client:
        client = openai.OpenAI(api_key="none", base_url="http://localhost", http_client=http_client)
        picture: Any = {"type": "image_url", "image_url": {"url": "data:"}}
        messages: Any = [{"role": "user", "content": [{"type": "text", "text": "?"}, picture]}]
        client.chat.completions.create(model="none", messages=messages, max_completion_tokens=1)
        raw = client.embeddings.with_raw_response.create(model="none", input="?", encoding_format="float")
        CreateEmbeddingResponse.model_validate_json(raw.content)


def read_usage(usage: Any) -> CallUsage | None:
    """What an answer says it used; OpenRouter adds the cost in US dollars."""
    if usage is None:
        return None
    said = (usage.model_extra or {}).get("cost")
    cost_usd = float(said) if isinstance(said, int | float) and 0 <= said < 1000 else None
    tokens_out = getattr(usage, "completion_tokens", 0)
    return CallUsage(usage.prompt_tokens or 0, tokens_out or 0, cost_usd)


def _classify(provider: str, error: openai.APIStatusError) -> ImagePipelineError:
    status, code = error.status_code, str(error.code or "")
    summary = f"{provider} answered {status}" + (f" ({code})" if code in KNOWN_CODES else "")
    if code in POLICY_CODES or _speaks_of_content(error):
        return RefusedError(f"{summary}: the image is against its content policy")
    if code in QUOTA_CODES or status == 402:
        advice = "top up the account, or raise its limit; `imagepipeline resume` tries at once"
        return PausedError("quota", f"{summary}: {advice}", PROBE_SECONDS)
    if status in (401, 403):
        advice = "check the key; `imagepipeline resume` tries at once"
        if status == 403:
            return ForbiddenError("auth", f"{summary}: {advice}", FORBIDDEN_PROBE_SECONDS)
        return PausedError("auth", f"{summary}: {advice}", PROBE_SECONDS)
    if status in RETRYABLE_STATUSES or status >= 500:
        wait_seconds = read_retry_after(error.response.headers)
        if wait_seconds is not None and wait_seconds > MAX_RETRY_AFTER_SECONDS:
            asked = f"{summary} and asked for {wait_seconds:.0f} s of quiet"
            return PausedError("rate_limited", asked, min(wait_seconds, MAX_PAUSE_SECONDS))
        return ProviderUnavailableError(summary, wait_seconds)
    if code in IMAGE_CODES:
        return InputInvalidError(f"{summary}: it cannot read the picture")
    parameter = _refused_parameter(error)
    if parameter:
        return FormatRefusedError(f"{summary}: it does not know {parameter}", parameter)
    return ProviderRejectedError(f"{summary}: check the model's name and the address")


def _speaks_of_content(error: openai.APIStatusError) -> bool:
    """Whether an error's body says that the provider objects to what it was sent."""
    if error.status_code not in POLICY_STATUSES:
        return False
    return POLICY_TEXT.search(json.dumps(error.body, default=str)[:MAX_ERROR_CHARACTERS]) is not None


def _refused_parameter(error: openai.APIStatusError) -> str | None:
    """The optional parameter a 400 or 422 complains of."""
    text = f"{error.param or ''} {error.message}"
    if error.status_code not in (400, 422):
        return None
    return next((name for name in OPTIONAL_PARAMETERS if name in text), None)


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

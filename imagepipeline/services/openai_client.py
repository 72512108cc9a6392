"""The openai client as we use it: no retries of its own, one minute of patience, and its errors made ours.

Both remote models stand on it: any provider that speaks the OpenAI wire format will do.
"""

import email.utils
import functools
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
from openai.types import CreateEmbeddingResponse

from imagepipeline.errors import (
    BadAnswerError,
    FormatRefusedError,
    ImagePipelineError,
    InputInvalidError,
    PausedError,
    ProviderRejectedError,
    ProviderUnavailableError,
    RefusedError,
)
from imagepipeline.models import CallUsage

TIMEOUT_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS, MAX_PAUSE_SECONDS = 120, 86_400
# How long nothing is asked after a bad key or an empty account; then one image tries whether it was mended.
PROBE_SECONDS = 600
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
IMAGE_CODES = frozenset(
    {"invalid_image", "invalid_image_format", "image_too_large", "image_parse_error", "invalid_base64"}
)
# Only these are quoted: whatever else a provider writes may repeat our key.
KNOWN_CODES = QUOTA_CODES | POLICY_CODES | IMAGE_CODES | {"invalid_api_key", "model_not_found", "rate_limit_exceeded"}
# Parameters that some providers and models do not know; the vision model then asks in another way.
OPTIONAL_PARAMETERS = ("response_format", "json_schema", "json_object", "max_completion_tokens", "max_tokens", "detail")


class ProviderClient:
    """A provider under the name errors call it by.

    It tries once: attempts are the pipeline's business, and a client's own retries would multiply them.
    """

    def __init__(self, name: str, api_key: str, base_url: str) -> None:
        self._name = name
        transport = openai.DefaultHttpxClient(verify=load_certificates())
        self._client = openai.OpenAI(
            api_key=api_key, base_url=base_url, timeout=TIMEOUT_SECONDS, max_retries=0, http_client=transport
        )

    @contextmanager
    def call(self) -> Iterator[openai.OpenAI]:
        """Gives the client and turns whatever a call raises into one of our errors, never quoting the answer.

        The client lets foreign errors through when the body is not what it expects (ValueError, TypeError, …).
        """
        try:
            yield self._client
        except openai.APIStatusError as error:
            raise _classify(self._name, error) from None
        except openai.APIConnectionError as error:  # includes timeouts
            raise ProviderUnavailableError(f"{self._name} did not answer: {type(error).__name__}") from None
        except (openai.OpenAIError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise BadAnswerError(f"{self._name} sent an answer that cannot be read: {type(error).__name__}") from None


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
    if code in POLICY_CODES:
        return RefusedError(f"{summary}: the image is against its content policy")
    if code in QUOTA_CODES or status == 402:
        advice = "top up the account, or raise its limit; `imagepipeline resume` tries at once"
        return PausedError("quota", f"{summary}: {advice}", PROBE_SECONDS)
    if status in (401, 403):
        advice = "check the key; `imagepipeline resume` tries at once"
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

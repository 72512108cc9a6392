"""The openai client as we use it: no retries of its own, one minute of patience, and its errors made ours.

Both remote models stand on it: any provider that speaks the OpenAI wire format will do.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from imagepipeline.errors import BadAnswerError, ProviderRejectedError, ProviderUnavailableError, RefusedError

TIMEOUT_SECONDS = 60.0
RETRYABLE_STATUSES = frozenset({408, 409, 429})
QUOTA_CODES = frozenset({"insufficient_quota", "credit_balance_exhausted"})
POLICY_CODES = frozenset({"content_policy_violation", "content_filter", "moderation_blocked"})


def connect(api_key: str, base_url: str) -> openai.OpenAI:
    """A client that tries once: attempts are the pipeline's business, and a client's own retries multiply them."""
    return openai.OpenAI(api_key=api_key, base_url=base_url, timeout=TIMEOUT_SECONDS, max_retries=0)


@contextmanager
def translated_errors(provider: str) -> Iterator[None]:
    """Turns whatever a call raises into one of our errors, naming the provider but never quoting its answer.

    The client lets foreign errors through when the body is not what it expects (ValueError, TypeError, …).
    """
    try:
        yield
    except openai.APIStatusError as error:
        raise _classify(provider, error) from None
    except openai.APIConnectionError as error:  # includes timeouts
        raise ProviderUnavailableError(f"{provider} did not answer: {type(error).__name__}") from None
    except openai.ContentFilterFinishReasonError:
        raise RefusedError(f"{provider} stopped at its content policy") from None
    except (openai.OpenAIError, json.JSONDecodeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise BadAnswerError(f"{provider} sent an answer that cannot be read: {type(error).__name__}") from None


def _classify(provider: str, error: openai.APIStatusError) -> Exception:
    status, code = error.status_code, str(error.code or "")
    summary = f"{provider} answered {status}" + (f" ({code[:60]})" if code else "")
    if code in POLICY_CODES:
        return RefusedError(f"{summary}: the image is against its content policy")
    if code not in QUOTA_CODES and (status in RETRYABLE_STATUSES or status >= 500):
        return ProviderUnavailableError(summary, _retry_after_seconds(error))
    return ProviderRejectedError(f"{summary}: check the key, the credit and the model's name")


def _retry_after_seconds(error: openai.APIStatusError) -> float | None:
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:  # absent, or a date
        return None
    return seconds if 0 <= seconds <= 120 else None

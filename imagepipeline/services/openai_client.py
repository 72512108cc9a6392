"""The openai client as we use it: no retries of its own, one minute of patience, and its errors made ours.

Both remote models stand on it: any provider that speaks the OpenAI wire format will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import openai

from imagepipeline.errors import BadAnswerError, ProviderRejectedError, ProviderUnavailableError, RefusedError

TIMEOUT_SECONDS = 60.0
RETRYABLE_STATUSES = frozenset({408, 409, 429})
QUOTA_CODES = frozenset({"insufficient_quota", "credit_balance_exhausted"})
POLICY_CODES = frozenset({"content_policy_violation", "content_filter", "moderation_blocked"})


class ProviderClient:
    """A provider under the name errors call it by.

    It tries once: attempts are the pipeline's business, and a client's own retries would multiply them.
    """

    def __init__(self, name: str, api_key: str, base_url: str) -> None:
        self._name = name
        self._client = openai.OpenAI(api_key=api_key, base_url=base_url, timeout=TIMEOUT_SECONDS, max_retries=0)

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

"""What a paid call used. A leaf, so that errors can tell it as well as answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallUsage:
    """The tokens of a call, and its cost in US dollars where the provider states it."""

    tokens_in: int
    tokens_out: int = 0
    cost_usd: float | None = None

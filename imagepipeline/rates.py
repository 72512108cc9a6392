"""Rate limits as text: the one place that knows their grammar and the default."""

import re
from dataclasses import dataclass

from imagepipeline.errors import SettingsError

DEFAULT_RATE_LIMIT = "10/minute"
EXAMPLES = "10/minute, metadata=10/minute,embedding=100/minute, or off"
UNITS_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
LIMIT = re.compile(
    r"(?:(?P<stage>metadata|embedding)=)?(?P<count>[1-9]\d{0,6})/"
    rf"(?P<unit>{'|'.join(UNITS_SECONDS)})"
)


@dataclass(frozen=True)
class CallLimit:
    """At most `count` calls in any `seconds`, of one stage, or of all where `stage` is None."""

    count: int
    seconds: int
    stage: str | None = None


def parse_limits(text: str) -> tuple[CallLimit, ...]:
    """Reads `10/minute` (all calls together), `metadata=10/minute,embedding=100/minute`, or `off`.

    Raises:
        SettingsError: it is none of these.
    """
    if text.strip() == "off":
        return ()
    limits = []
    for part in text.split(","):
        match = LIMIT.fullmatch(part.strip())
        if match is None:
            raise SettingsError(
                f"{part.strip()!r:.40} is not a rate limit: it must look like {EXAMPLES}"
            )
        limits.append(CallLimit(int(match["count"]), UNITS_SECONDS[match["unit"]], match["stage"]))
    return tuple(limits)

"""Filters: which images a plan is about, as a person writes it: `category=animal`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Self

from imagepipeline.errors import InvalidFilterError
from imagepipeline.models import Status, is_image_id

EXAMPLE = "category=animal, tag=cat, id=abc* or updated-before=2026-11-01"


@dataclass(frozen=True)
class Condition:
    """What an image must fulfil: one of FIELDS, and its value as a person wrote it."""

    field: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `FIELD=VALUE`.

        Raises:
            InvalidFilterError: there is no such field, or the value does not fit it.
        """
        field, has_value, value = (part.strip() for part in text.partition("="))
        if not has_value:
            raise InvalidFilterError(f"{text!r:.80} is not a filter: it must look like {EXAMPLE}")
        if field not in FIELDS:
            raise InvalidFilterError(
                f"{field!r:.40} is not a field of an image: it must be one of {', '.join(FIELDS)}"
            )
        try:
            FIELDS[field](value)
        except ValueError as error:
            raise InvalidFilterError(f"the value of {field}, {value!r:.80}, {error}") from None
        return cls(field, value)

    @property
    def time(self) -> datetime:
        """The value as a time in UTC."""
        return read_time(self.value)


@dataclass(frozen=True)
class Filter:
    """The conditions that an image must all fulfil; without any, it is every image."""

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Reads what `to_list` gives and what a person writes, one condition a text.

        Raises:
            InvalidFilterError: as `Condition.parse`.
        """
        return cls(tuple(Condition.parse(text) for text in texts))

    def to_list(self) -> list[str]:
        """The conditions as texts, to be stored as JSON."""
        return [f"{one.field}={one.value}" for one in self.conditions]


ALL = Filter()


def read_time(text: str) -> datetime:
    """A date, which means its midnight, or a time; UTC if it names no zone.

    Raises:
        ValueError: it is neither.
    """
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # the first and last day have no UTC in some zones
        raise ValueError("must be a date such as 2026-11-01 or 2026-11-01T12:30") from None


def _check_id(value: str) -> None:
    if not is_image_id(value.removesuffix("*")):
        raise ValueError("must be an ID, or how IDs start and a `*`")


def _check_status(value: str) -> None:
    if value not in [*Status]:
        raise ValueError(f"must be one of {', '.join(Status)}")


def _check_word(value: str) -> None:
    if not value:
        raise ValueError("must not be empty")


# What checks the value of a field; it raises a ValueError.
FIELDS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "id": _check_id,
        "category": _check_word,
        "tag": _check_word,
        "status": _check_status,
        "accepted-since": read_time,
        "accepted-before": read_time,
        "updated-since": read_time,
        "updated-before": read_time,
    }
)

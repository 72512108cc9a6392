"""Events: what an app is told when an image has its pictures, completes, fails or is erased.

`Event` is the payload on every channel. Its JSON schema is the file `event.schema.json` beside this
module, written by `python -m imagepipeline_tests.reference`.
"""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class EventType(StrEnum):
    """What happened to an image."""

    PICTURES_READY = "image.pictures_ready"
    COMPLETED = "image.completed"
    FAILED = "image.failed"
    ERASED = "image.erased"


class _Payload(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, frozen=True)


class EventVariant(_Payload):
    """One file of an image that a page can show."""

    name: str = Field(description="As in the settings; the first versions' are sm, md and lg.")
    path: str = Field(description="Below the storage root.")
    format: str = Field(description="webp, avif, jpeg or png.")
    width: int = Field(description="In pixels.")
    height: int = Field(description="In pixels.")
    bytes: int


class EventWording(_Payload):
    """A description in one language."""

    description: str
    alt_text: str = Field(description="At most 125 characters.")
    tags: tuple[str, ...]
    category: str
    mood: str


class Event(_Payload):
    """What happened to an image, and all that a page needs to show it, as it was at that moment.

    Fields may be added in later versions; what is there keeps its meaning within a `version`.
    """

    version: Literal[1] = 1
    event_id: str = Field(description="The same in every repetition of the event.")
    type: EventType
    at: datetime = Field(description="When it happened, in UTC.")
    image_id: str
    generation: int = Field(
        description="Which life of the image it is about; it rises with each push."
    )
    status: Literal["processing", "completed", "failed", "erased"]
    reason: str | None = Field(None, description="Of a failure: a word to filter by.")
    error: str | None = Field(
        None, description="Of a failure: a sentence for the person who uploaded the file."
    )
    flaw: str | None = Field(None, description="What is missing from a salvaged original.")
    width: int | None = Field(None, description="Of the upright original, in pixels.")
    height: int | None = Field(None, description="Of the upright original, in pixels.")
    placeholder: str | None = Field(
        None, description="A data URI to show until the image has loaded."
    )
    dominant_color: str | None = Field(None, description="#rrggbb")
    description: str | None = None
    tags: tuple[str, ...] = ()
    category: str | None = None
    mood: str | None = None
    languages: dict[str, EventWording] = Field(
        default_factory=dict,
        description="The description by language, a BCP 47 tag; absent for English alone.",
        exclude_if=lambda value: not value,
    )
    variants: tuple[EventVariant, ...] = Field(
        (), description="The files made from this original, by format, then width; each once."
    )

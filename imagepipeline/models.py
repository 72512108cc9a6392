"""The domain: uploads, claims, images, variants and metadata, as frozen values without I/O.

Storing, rendering and fetching them belongs to `stores`, `imaging` and `services`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote_plus

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from imagepipeline.errors import InvalidUploadError, UnsafePathError
from imagepipeline.output_formats import AVIF, OUTPUT_FORMATS, WEBP
from imagepipeline.usage import CallUsage

IMAGE_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Dagster's UI shows Markdown of less than 1,000 characters at once, and a link to longer ones.
MAX_THUMBNAIL_CHARACTERS = 960
CLASSIFIER_PX = 224  # width and height of the offline vision model's input, raw RGB
PRIORITY_LIMIT = 1000
MAX_COUNT = 2**31 - 1  # the greatest integer that a column holds
FIELDS = {"imageId", "path", "priority", "tenant", "focus"}  # of an entry
TENANT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
BULK_PRIORITY = -PRIORITY_LIMIT - 1  # of planned work: below every upload
MAX_ENTRY_BYTES = 4096
# Database columns hold 512 characters; disks allow 255 bytes for each name (POSIX NAME_MAX).
MAX_PATH_BYTES, MAX_NAME_BYTES = 480, 255
DEFAULT_WIDTHS_PX = {"sm": 640, "md": 1024, "lg": 1920}
DEFAULT_FORMATS = (WEBP, AVIF)
MAX_VARIANT_NAME_CHARACTERS = 16
SHORT_ENDING_BYTES = len("-sm.avif")  # for longer ones, see `VariantSpec.path_for`
MAX_SIDE_PX = 16_383  # of a variant; WebP can encode no more
MAX_SETTINGS_CHARACTERS = 128  # of a recipe, as its column holds
ROUNDING_PX = 2  # each width is scaled from the next larger one, and its height rounded
ASSETS = ("metadata", "variants", "embedding")  # in the order they are made


def check_image_id(value: object) -> str:
    """The value itself, if it is a valid image ID.

    Raises:
        InvalidUploadError: it is not. Dagster does not check dynamic partition keys, and the ID
            becomes part of paths and queries, so this must run first.
    """
    if not isinstance(value, str) or not IMAGE_ID_PATTERN.fullmatch(value):
        raise InvalidUploadError(
            f"{value!r:.80} is not an image ID: 1 to 64 letters, digits, '-' or '_', "
            "the first a letter or digit"
        )
    return value


def check_tenant(value: object) -> str:
    """The value itself, if it is a tenant, or empty for none.

    Raises:
        InvalidUploadError: it is neither.
    """
    if not isinstance(value, str) or not TENANT_PATTERN.fullmatch(value or "none"):
        raise InvalidUploadError(
            f"{value!r:.80} is not a tenant: 1 to 64 letters, digits, '-', '_', '.' or '@', the "
            "first a letter or digit"
        )
    return value


@dataclass(frozen=True)
class TenantSet:
    """Some tenants: those named or, with `is_all_but`, all others."""

    names: frozenset[str] = frozenset()
    is_all_but: bool = False

    def __contains__(self, tenant: str) -> bool:
        return bool(tenant) and (tenant in self.names) != self.is_all_but

    def __bool__(self) -> bool:
        return bool(self.names) or self.is_all_but


NO_TENANTS = TenantSet()


def is_image_id(value: str) -> bool:
    """Whether it is a valid image ID."""
    return IMAGE_ID_PATTERN.fullmatch(value) is not None


def find_named_image(path: str) -> str | None:
    """The image ID in a path `original/<image_id>.*`; None for other paths.

    Files in subfolders may have any name.
    """
    folder, _, name = path.rpartition("/")
    image_id = name.partition(".")[0]
    return image_id if folder == "original" and is_image_id(image_id) else None


def check_original_path(value: object) -> str:
    """The value itself, if it is a path below `original/` with an extension and without `..`.

    Raises:
        InvalidUploadError: it is not, or it or a variant's path would be too long for a disk or
            the catalogue.
    """
    path = (
        PurePosixPath(value)
        if isinstance(value, str) and value.isprintable() and "\\" not in value
        else None
    )
    is_below = (
        path is not None
        and path.parts[:1] == ("original",)
        and len(path.parts) > 1
        and ".." not in path.parts
    )
    if path is None or not (is_below and path.suffix and str(path) == value):
        raise InvalidUploadError(
            f"{value!r:.80} is not the path of an original: it must look like "
            "original/NAME.EXT, below the storage root"
        )
    names = [*path.parts, path.stem + SHORT_ENDING_BYTES * "x"]
    longest = max(len(name.encode()) for name in names)
    if longest > MAX_NAME_BYTES or len(str(path).encode()) > MAX_PATH_BYTES:
        raise InvalidUploadError(
            f"{value!r:.80} is too long: a path may have {MAX_PATH_BYTES} bytes and a name "
            f"{MAX_NAME_BYTES}, also with a variant's ending such as -sm.avif instead of the "
            "extension"
        )
    return str(path)


def choose_extension(name: str) -> str:
    """The extension that an original of that file name gets: up to 8 of a-z and 0-9."""
    return re.sub(r"[^a-z0-9]", "", PurePosixPath(name).suffix.lower())[:8] or "bin"


def now_utc() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


class Status(StrEnum):
    """Where an image is in its life."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens until the ID is pushed again."""
        return self in (Status.COMPLETED, Status.FAILED)


@dataclass(frozen=True)
class Upload:
    """One message on the Redis list: process this image.

    Attributes:
        image_id: see `check_image_id`.
        path: the original's path below the storage root; None means the one file
            `original/<image_id>.*` that exists when a run starts.
        priority: -1000 to 1000; higher runs sooner.
        tenant: whose upload it is, if uploads of several customers share the stack; empty for none.
        ignored: unknown fields of the entry.
        focus: what cropped variants keep in view, as fractions (0 to 1) of the upright image's
            width and height; None keeps what an earlier push said.
    """

    image_id: str
    path: str | None = None
    priority: int = 0
    tenant: str = ""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    focus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_image_id(self.image_id)
        if self.path is not None:
            check_original_path(self.path)
        if type(self.priority) is not int or abs(self.priority) > PRIORITY_LIMIT:
            raise InvalidUploadError(
                f"priority of {self.image_id} must be a whole number from -{PRIORITY_LIMIT} "
                f"to {PRIORITY_LIMIT}"
            )
        check_tenant(self.tenant)
        if self.focus is not None:
            object.__setattr__(self, "focus", _check_focus(self.image_id, self.focus))

    @classmethod
    def from_entry(cls, entry: bytes) -> "Upload":
        """Parses an entry: a bare image ID, or JSON, whose fields are those of `docs/uploads.md`.

        Accepts what clients produce: surrounding whitespace, a quoted or numeric ID, and `null`
        for an absent field. Also accepts the message that S3 sends of a new object, and MinIO's.

        Raises:
            InvalidUploadError: it is malformed; the message says how.
        """
        if len(entry) > MAX_ENTRY_BYTES:
            raise InvalidUploadError(
                f"the entry has {len(entry):,} bytes; at most {MAX_ENTRY_BYTES:,} are read"
            )
        try:
            text = entry.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise InvalidUploadError("the entry is not UTF-8 text") from None
        if not text.startswith(("{", '"', "[")):
            return cls(text)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidUploadError("the entry starts like JSON but is not valid JSON") from None
        if isinstance(value, list) or (isinstance(value, dict) and "Records" in value):
            path = _read_object_path(value)
            return cls(str(find_named_image(path)), path)
        given: dict[str, Any] = {"imageId": value} if isinstance(value, str) else value
        fields = {name: content for name, content in given.items() if content is not None}
        if "imageId" not in fields:
            raise InvalidUploadError(f"the entry has no imageId, but {sorted(fields)!r:.80}")
        ignored = tuple(sorted(given.keys() - FIELDS))
        return cls(
            _read_id(fields.get("imageId")),
            fields.get("path"),
            fields.get("priority", 0),
            _read_id(fields.get("tenant", "")),
            ignored,
            fields.get("focus"),
        )

    def to_entry(self) -> str:
        """The entry that `from_entry` parses: the bare ID if there is nothing else to say."""
        if self == Upload(self.image_id):
            return self.image_id
        fields: dict[str, Any] = {"imageId": self.image_id, "priority": self.priority}
        further = {"path": self.path, "tenant": self.tenant or None, "focus": self.focus}
        return json.dumps(
            fields | {name: value for name, value in further.items() if value is not None}
        )


def _read_object_path(message: Any) -> str:
    """The path `original/<image_id>.<ext>` at the end of the key of an object that was created.

    S3 sends `{"Records": [record]}`, and MinIO pushes `[{"Event": [record]}]`.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html

    Raises:
        InvalidUploadError: it is about something else.
    """
    try:
        [record] = message[0]["Event"] if isinstance(message, list) else message["Records"]
        event, key = record["eventName"], unquote_plus(record["s3"]["object"]["key"])
    except (LookupError, TypeError, ValueError):
        raise InvalidUploadError(
            "the entry is neither an upload nor an object store's message of one new object"
        ) from None
    if not str(event).removeprefix("s3:").startswith("ObjectCreated:"):
        raise InvalidUploadError(f"{event!r:.80} is no new object: send ObjectCreated only")
    path = "/".join(key.split("/")[-2:])
    if find_named_image(path) is None:
        raise InvalidUploadError(
            f"{key!r:.200} does not end with original/<image ID>.<extension>: send the messages of "
            "that folder only, and push other paths with their IDs"
        )
    return path


def _check_focus(image_id: str, value: Any) -> tuple[float, float]:
    is_point = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_point or not all(type(part) in (int, float) and 0 <= part <= 1 for part in value):
        raise InvalidUploadError(
            f"focus of {image_id} must be two numbers from 0 to 1, such as [0.5, 0.3]: how far "
            "from the left and from the top"
        )
    return round(float(value[0]), 4), round(float(value[1]), 4)


def _read_id(value: object) -> Any:
    """An ID as databases and JSON libraries write it: a number, or text with whitespace."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if type(value) is int else value


@dataclass(frozen=True)
class StoredFile:
    """A file in a storage: its path, its size in bytes, and why it cannot be read, if so.

    `changed_at`, which not all lists have, is when it was written.
    """

    path: str
    size: int
    fault: str | None = None
    changed_at: datetime | None = None


@dataclass(frozen=True)
class Claim:
    """A run's right to write to an image's row, until a later claim raises the fence.

    Attributes:
        image_id: the claimed image.
        generation: counts how often the image was processed anew.
        fence: the fencing token; writes with a lower one are refused.
        path: the original's path, if the upload named one.
        last_path: where the original was when it was last read.
        last_sha256: the hash it had then.
        tenant: whose image it is; empty for none.
        focus: see `Upload`.
        is_planned: whether it is in the bulk lane, and lets uploads go first.
    """

    image_id: str
    generation: int
    fence: int
    path: str | None
    last_path: str | None = None
    last_sha256: str | None = None
    tenant: str = ""
    focus: tuple[float, float] | None = None
    is_planned: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Image ID and fence, which no other claim has."""
        return self.image_id, self.fence


@dataclass(frozen=True)
class OriginalFacts:
    """What the catalogue stores about an original: columns of the image's row.

    `width` and `height` are the upright image's, in pixels. `placeholder` is a data URI of a tiny
    WebP, `dominant_color` is `#rrggbb`. `flaw` says what is missing from a salvaged file.
    """

    path: str
    original_bytes: int
    original_sha256: str
    width: int
    height: int
    placeholder: str
    dominant_color: str
    flaw: str | None = None


@dataclass(frozen=True)
class PixelFacts:
    """Facts that the pixels and EXIF give, without a model.

    `colors` are the dominant ones as (name, `#rrggbb`, share of the pixels 0..1), largest first.
    In CIE Lab, `brightness` is the mean of L* (0..100), `contrast` its standard deviation,
    `saturation` the mean chroma (0..about 130), and `warmth` the mean of b* (below 0 blue, above 0
    yellow). `palette` has up to 16 `#rrggbb` that represent all pixels.
    """

    width: int
    height: int
    colors: tuple[tuple[str, str, float], ...]
    brightness: float
    contrast: float
    saturation: float
    warmth: float
    palette: tuple[str, ...] = ()
    camera: str | None = None
    taken_on: str | None = None


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=80)]
Color = Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$", to_lower=True)]


MAX_ALT_CHARACTERS = 125  # screen readers read longer ones in parts
MAX_EMBEDDED_CHARACTERS = 6000  # of all languages together; embedding models take 8,192 tokens


class Wording(BaseModel):
    """A description in one language."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="forbid")

    description: Text
    alt_text: Annotated[Text, Field(max_length=MAX_ALT_CHARACTERS)] = Field(alias="altText")
    tags: list[Word] = Field(max_length=50)
    category: Word
    mood: Word

    @property
    def embedding_text(self) -> str:
        """The text that is embedded: description, tags, category, mood."""
        return " ".join([self.description, *self.tags, self.category, self.mood])


class ImageMetadata(BaseModel):
    """The vision model's answer; the aliases are the names that the web product reads.

    The bounds are far above any honest answer. An answer that exceeds them is refused. Without
    `languages` it is in the default language; otherwise its own fields are in the first of them.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="forbid")

    description: Text
    tags: list[Word] = Field(max_length=50)
    category: Word
    dominant_colors: list[Color] = Field(alias="dominantColors", max_length=16)
    mood: Word
    languages: dict[str, Wording] = Field(default_factory=dict, exclude_if=lambda value: not value)

    @classmethod
    def combine(cls, wordings: Mapping[str, Wording], dominant_colors: Sequence[str]) -> Self:
        """Metadata in several languages."""
        first = next(iter(wordings.values()))
        return cls(
            description=first.description,
            tags=first.tags,
            category=first.category,
            dominant_colors=list(dominant_colors),
            mood=first.mood,
            languages=dict(wordings),
        )

    @classmethod
    def read(cls, stored: object) -> Self | None:
        """The answer in the column of a row; None if there is none, or one of an earlier kind."""
        try:
            return cls.model_validate(stored)
        except ValueError:
            return None

    @property
    def embedding_text(self) -> str:
        """The text that is embedded: description, tags, category, mood, in each language."""
        if not self.languages:
            return " ".join([self.description, *self.tags, self.category, self.mood])
        share = MAX_EMBEDDED_CHARACTERS // len(self.languages)
        return " ".join(one.embedding_text[:share] for one in self.languages.values())


@dataclass(frozen=True)
class VisionAnswer:
    """Metadata, and the usage of the call that returned it."""

    metadata: ImageMetadata
    usage: CallUsage | None = None


@dataclass(frozen=True)
class Embedding:
    """A text as a vector of unit length, with the version of its recipe and the call's usage.

    Vectors of different versions cannot be compared.
    """

    text: str
    vector: tuple[float, ...]
    version: str
    usage: CallUsage | None = None


@dataclass(frozen=True)
class Neighbour:
    """An image near a query, with its embedded text.

    `score` is the cosine similarity, -1 to 1; higher is nearer.
    """

    image_id: str
    score: float
    text: str


@dataclass(frozen=True)
class VariantSpec:
    """One variant to make: a size in one format.

    Attributes:
        name: of the size; unique together with the format.
        width_px: the most pixels across.
        format: one of OUTPUT_FORMATS.
        quality: 1 to 100; None if the format is lossless.
        height_px: the most pixels down; None for any height.
        fit: `inside` shows the whole image; `cover` shows the part with the box's proportions. No
            image is enlarged: of one that is too small, `cover` shows as much as it can.
        focus: what `cover` keeps: the centre, what draws attention, or what is around a point,
            given as fractions of width and height.
    """

    name: str
    width_px: int
    format: str
    quality: int | None
    height_px: int | None = None
    fit: Literal["inside", "cover"] = "inside"
    focus: Literal["centre", "attention"] | tuple[float, float] = "centre"

    @property
    def id(self) -> str:
        """Its name and format, which identify it among those of an image."""
        return f"{self.name}-{self.format}"

    @property
    def recipe(self) -> str:
        """What it is as text: `640-webp-80`, or `thumb-300x300-cover-attention-jpeg-80`.

        The names of the default widths are left out, as in the first versions, so that what those
        made is current.
        """
        parts = [str(self.width_px)]
        if self.height_px is not None:
            parts = [f"{self.width_px}x{self.height_px}"]
        if DEFAULT_WIDTHS_PX.get(self.name) != self.width_px or self.height_px is not None:
            parts = [self.name, *parts]
        if self.fit == "cover":
            is_word = isinstance(self.focus, str)
            parts += ["cover", str(self.focus) if is_word else "{:g}x{:g}".format(*self.focus)]
        quality = [] if self.quality is None else [str(self.quality)]
        return "-".join([*parts, self.format, *quality])

    def at(self, focus: tuple[float, float] | None) -> "VariantSpec":
        """The same around a point of one image; itself if there is none, or nothing is cut off."""
        return self if focus is None or self.fit != "cover" else replace(self, focus=focus)

    def path_for(self, original_path: str) -> str:
        """The variant's path: `variants/a/b-sm.webp` for `original/a/b.jpg`.

        Raises:
            UnsafePathError: its name would be too long for a disk.
        """
        path = PurePosixPath("variants", *PurePosixPath(original_path).parts[1:])
        path = path.with_name(f"{path.stem}-{self.name}.{OUTPUT_FORMATS[self.format].suffix}")
        if len(path.name.encode()) > MAX_NAME_BYTES:
            raise UnsafePathError(
                f"the name of {original_path!r:.80} is too long for the variant {self.name}: "
                f"{path.name!r:.80} would have more than {MAX_NAME_BYTES} bytes"
            )
        return str(path)

    def is_alias(self, path: str) -> bool:
        """Whether the file at a path has the name of another variant."""
        return not PurePosixPath(path).stem.endswith(f"-{self.name}")

    def scale_for(self, width: int, height: int) -> float:
        """The smallest scale (at most 1) at which an image of that size has enough pixels."""
        scales = [self.width_px / width]
        if self.height_px is not None:
            scales.append(self.height_px / height)
        return min(1.0, max(scales) if self.fit == "cover" else min(scales))

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Its width and height if it is made of an image of that size."""
        if self.fit == "cover" and self.height_px is not None:
            scale = min(1.0, width / self.width_px, height / self.height_px)
            sides = self.width_px * scale, self.height_px * scale
            return max(1, round(sides[0])), max(1, round(sides[1]))
        if self.height_px is not None and self.height_px * width < self.width_px * height:
            if height <= self.height_px:
                return width, height
            return max(1, round(width * self.height_px / height)), self.height_px
        if width <= self.width_px:
            return width, height
        return self.width_px, max(1, round(height * self.width_px / width))

    def is_possible(self, size: tuple[int, int], original: tuple[int, int]) -> bool:
        """Whether it may have that size, made of an original of that size."""
        width, height = self.size_for(*original)
        most = ROUNDING_PX if self.height_px is None else 0
        return size[0] == width and abs(size[1] - height) <= most


def build_variant_specs(*qualities: int) -> tuple[VariantSpec, ...]:
    """The specs of the default variants: each of DEFAULT_WIDTHS_PX in each of DEFAULT_FORMATS.

    Args:
        qualities: one for each format, in their order; none for the default ones.
    """
    chosen = qualities or [one.default_quality for one in DEFAULT_FORMATS]
    return tuple(
        VariantSpec(name, width_px, one.name, quality)
        for name, width_px in DEFAULT_WIDTHS_PX.items()
        for one, quality in zip(DEFAULT_FORMATS, chosen, strict=True)
    )


@dataclass(frozen=True)
class Variant:
    """One rendered variant: its size in pixels and its encoded bytes."""

    spec: VariantSpec
    width: int
    height: int
    content: bytes


def place_variants(
    specs: Iterable[VariantSpec], width: int, height: int, original_path: str
) -> dict[str, str]:
    """The path of each variant of an original of that size, by the spec's ID.

    Variants that show all its pixels in the same format and quality share the file of the first.
    """
    shared: dict[tuple[str, int | None], str] = {}
    placed = {}
    for spec in specs:
        path = spec.path_for(original_path)
        if spec.fit == "inside" and spec.size_for(width, height) == (width, height):
            path = shared.setdefault((spec.format, spec.quality), path)
        placed[spec.id] = path
    return placed


@dataclass(frozen=True)
class Recipe:
    """What made a result: the provider, its model, and the settings that affect the outcome.

    `version` identifies it: as the asset's code version in Dagster, and beside each result in the
    catalogue.
    """

    provider: str
    model: str
    settings: str = ""

    @property
    def version(self) -> str:
        """`provider:model[:settings]`."""
        return ":".join(part for part in (self.provider, self.model, self.settings) if part)


@dataclass(frozen=True)
class PaidCall:
    """One call to a paid provider.

    `outcome` is `answered` or the reason of the failure. Tokens and cost are None if unknown.
    `seconds` is the call's duration, `waited_seconds` the wait for the rate limit before it.
    """

    image_id: str | None
    generation: int | None
    stage: str
    provider: str
    model: str
    outcome: str
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    seconds: float
    waited_seconds: float


BY_PERSON = "person"  # the reason of a pause of all work


@dataclass(frozen=True)
class Pause:
    """A time in which no paid work starts; `until` None means until a person resumes.

    With the reason BY_PERSON, no work starts at all.

    When the time is over (`is_over`) the pause is on probation: one image is tried, and its success
    ends the pause. `stage` is the stage whose calls caused it, None for all.
    """

    seq: int
    reason: str
    message: str
    since: datetime
    until: datetime | None
    is_over: bool
    stage: str | None = None

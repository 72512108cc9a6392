"""Reads the variants that a user has defined, and refuses what makes no sense."""

import re
from collections.abc import Mapping, Sequence

from imagepipeline.models import (
    DEFAULT_FORMATS,
    MAX_SIDE_PX,
    MAX_VARIANT_NAME_CHARACTERS,
    VariantSpec,
)
from imagepipeline.output_formats import OUTPUT_FORMATS

# Without hyphens, so that no other image's variant can get the same path; in lower case, because
# some disks do not tell the cases apart.
NAME_PATTERN = re.compile(rf"[a-z0-9_]{{1,{MAX_VARIANT_NAME_CHARACTERS}}}")
KEYS = ("name", "width", "height", "fit", "focus", "formats", "quality")
FITS, FOCUSES = ("inside", "cover"), ("centre", "attention")
MAX_FILES = 64  # of an image; all of them are in memory at once


def parse_variants(value: object) -> tuple[VariantSpec, ...]:
    """The specs of variants given as dictionaries with KEYS, of which name and width are needed.

    Args:
        value: for example `[{"name": "thumb", "width": 300, "height": 300, "fit": "cover"}]`.

    Returns:
        One spec for each variant and format, smallest first, whatever the order of `value`. Where
        no quality is given, it is None.

    Raises:
        ValueError: names the variant and what is wrong with it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("must be a list of one or more variants")
    specs = [spec for position, one in enumerate(value, 1) for spec in _parse(one, position)]
    names = [str(one["name"]) for one in value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} variants are named {name}")
    if len(specs) > MAX_FILES:
        raise ValueError(f"these are {len(specs)} files for each image, at most {MAX_FILES} may be")
    formats = list(OUTPUT_FORMATS)
    return tuple(
        sorted(
            specs,
            key=lambda one: (
                *(one.width_px, one.height_px or 0, one.name),
                formats.index(one.format),
            ),
        )
    )


def _parse(one: object, position: int) -> list[VariantSpec]:
    if not isinstance(one, Mapping):
        raise ValueError(f"variant {position} must be an object with name and width")
    name = one.get("name")
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"the name of variant {position} must be 1 to {MAX_VARIANT_NAME_CHARACTERS} lower-case "
            "letters, digits or '_'"
        )

    def require(is_true: bool, what: str) -> None:
        if not is_true:
            raise ValueError(f"variant {name}: {what}")

    for key in one:
        require(key in KEYS, f"{key!r:.40} is not one of {', '.join(KEYS)}")
    for key in ("width", "height"):
        side = one.get(key)
        require(
            (type(side) is int and 1 <= side <= MAX_SIDE_PX) or (side is None and key == "height"),
            f"{key} must be a whole number of pixels from 1 to {MAX_SIDE_PX}",
        )
    fit, focus = one.get("fit", "inside"), one.get("focus", "centre")
    require(fit in FITS, f"fit must be one of {', '.join(FITS)}")
    require(focus in FOCUSES, f"focus must be one of {', '.join(FOCUSES)}")
    require(fit == "inside" or one.get("height") is not None, "fit cover also needs a height")
    require(fit == "cover" or "focus" not in one, "focus matters only with fit cover")
    formats = one.get("formats", [format_.name for format_ in DEFAULT_FORMATS])
    known = ", ".join(OUTPUT_FORMATS)
    require(
        isinstance(formats, Sequence) and not isinstance(formats, str), "formats must be a list"
    )
    require(bool(formats), f"formats must name at least one of {known}")
    for format_ in formats:
        is_known = isinstance(format_, str) and format_ in OUTPUT_FORMATS
        require(is_known, f"{format_!r:.40} is not one of the formats {known}")
        require(list(formats).count(format_) == 1, f"it has the format {format_} more than once")
    qualities = one.get("quality", {})
    require(isinstance(qualities, Mapping), "quality must give a number for each format")
    for format_, quality in qualities.items():
        require(format_ in formats, f"it has a quality for {format_!r:.40}, but not that format")
        is_lossless = OUTPUT_FORMATS[format_].default_quality is None
        require(not is_lossless, f"{format_} is lossless, so it has no quality")
        is_in_range = type(quality) is int and 1 <= quality <= 100
        require(is_in_range, f"the quality of {format_} must be a whole number from 1 to 100")
    return [
        VariantSpec(
            *(name, one["width"], format_, qualities.get(format_), one.get("height"), fit, focus)
        )
        for format_ in formats
    ]

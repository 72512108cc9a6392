"""Checks whether the answers of a decoding process, which the run does not trust, are possible."""

import re
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from imagepipeline.headers import measure_jpeg
from imagepipeline.imaging.formats import FORMATS
from imagepipeline.imaging.limits import max_original_pixels
from imagepipeline.models import (
    CLASSIFIER_PX,
    MAX_THUMBNAIL_CHARACTERS,
    PixelFacts,
    Variant,
    VariantSpec,
)
from imagepipeline.output_formats import OUTPUT_FORMATS

if TYPE_CHECKING:  # these modules import this one
    from imagepipeline.imaging.decoding import Rules
    from imagepipeline.imaging.inspection import Inspection
    from imagepipeline.imaging.preparation import Prepared

MAX_PREVIEW_BYTES = 20_000_000
MAX_PLACEHOLDER_CHARACTERS = 4_000
MAX_TEXT_CHARACTERS = 500
COLOR = re.compile(r"#[0-9a-f]{6}")
NAME = re.compile(r"[a-z -]{1,30}")
DATA_URI = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/]+={0,2}")


class ImpossibleAnswerError(Exception):
    """The answer is impossible; the message names the impossible part."""


def verify_prepared(prepared: "Prepared", rules: "Rules", preview_px: int | None) -> None:
    """Checks the answer of `prepare`.

    Args:
        prepared: the answer.
        rules: the limits on the original.
        preview_px: the long side of the preview, or None for the square, as requested.

    Raises:
        ImpossibleAnswerError: the answer is impossible.
    """
    _require(prepared.format in FORMATS, "its format")
    _require(len(prepared.flaw or "") <= MAX_TEXT_CHARACTERS, "its flaw")
    _verify_data_uri("placeholder", prepared.placeholder, MAX_PLACEHOLDER_CHARACTERS)
    _verify_data_uri("thumbnail", prepared.thumbnail, MAX_THUMBNAIL_CHARACTERS)
    _verify_facts(prepared.facts, prepared.format, rules)
    if preview_px is None:
        _require(len(prepared.preview) == 3 * CLASSIFIER_PX**2, "the size of the preview")
    else:
        _verify_preview(prepared.preview, preview_px)


def verify_variants(
    variants: Sequence[Variant], specs: Sequence[VariantSpec], size: tuple[int, int]
) -> None:
    """Checks variants against their specs, the size of the original, and their own headers.

    Raises:
        ImpossibleAnswerError: the variants are not the requested ones.
    """
    _require([variant.spec for variant in variants] == list(specs), "the list of variants")
    for variant in variants:
        name = f"variant {variant.spec.id}"
        measured = _measure(name, variant.content, OUTPUT_FORMATS[variant.spec.format].measure)
        _require(
            measured == (variant.width, variant.height),
            f"{name} says {variant.width} x {variant.height} px",
        )
        is_expected = variant.spec.is_possible((variant.width, variant.height), size)
        _require(is_expected, f"{name} is {variant.width} x {variant.height} px")


def verify_own_inspections(
    inspections: Sequence["Inspection"], variants: Sequence[Variant], compared: Sequence[int]
) -> None:
    """Checks inspections of variants that were just verified.

    `compared` holds the positions of the variants that were to be compared.

    Raises:
        ImpossibleAnswerError: an inspection contradicts the variant's bytes or what was asked for.
    """
    verify_inspections(inspections, compared, len(variants))
    for found, variant in zip(inspections, variants, strict=True):
        is_same = (found.format, found.width, found.height) == (
            variant.spec.format,
            variant.width,
            variant.height,
        )
        _require(found.fault is not None or is_same, "the inspection of a variant")


def verify_inspections(
    inspections: Sequence["Inspection"], compared: Sequence[int], count: int
) -> None:
    """Checks inspections of `count` stored variants; `compared` as in `verify_own_inspections`.

    Raises:
        ImpossibleAnswerError: they cannot be true.
    """
    _require(len(inspections) == count, "the number of inspections")
    for position, inspection in enumerate(inspections):
        texts = (inspection.fault or "", inspection.format, *inspection.attachments)
        _require(
            len(texts) <= 20 and all(len(text) <= MAX_TEXT_CHARACTERS for text in texts),
            "an inspection's texts",
        )
        _require(min(inspection.width, inspection.height) >= 0, "an inspection's size")
        was_compared = inspection.similarity is not None
        is_as_asked = was_compared == (position in compared) or inspection.fault is not None
        _require(is_as_asked, "which variants were compared")
        _require(-1.001 <= (inspection.similarity or 0) <= 1.001, "an inspection's similarity")


def _verify_data_uri(name: str, uri: str, most_characters: int) -> None:
    is_right = len(uri) <= most_characters and DATA_URI.fullmatch(uri) is not None
    _require(is_right, f"its {name}")


def _verify_preview(content: bytes, most_px: int) -> None:
    size = _measure("the preview", content, measure_jpeg)
    is_small = len(content) <= MAX_PREVIEW_BYTES and max(size) <= most_px
    _require(is_small and min(size) >= 1, "the size of the preview")


def _measure(
    name: str, content: bytes, measure: Callable[[bytes], tuple[int, int]]
) -> tuple[int, int]:
    try:
        return measure(content)
    except (IndexError, ValueError, struct.error) as error:
        raise ImpossibleAnswerError(f"{name}: its header is not one of ours: {error}") from None


def _verify_facts(facts: PixelFacts, format_: str, rules: "Rules") -> None:
    # `max_side_px` is no limit on an original: its variants are smaller.
    is_allowed = facts.width * facts.height <= max_original_pixels(format_, rules)
    _require(min(facts.width, facts.height) >= 1 and is_allowed, "its size")
    _require(1 <= len(facts.colors) <= 64 and len(facts.palette) <= 64, "the number of its colours")
    _require(
        all(NAME.fullmatch(name) is not None for name, _, _ in facts.colors), "the name of a colour"
    )
    values = (*(value for _, value, _ in facts.colors), *facts.palette)
    _require(all(COLOR.fullmatch(value) is not None for value in values), "a colour")
    _require(all(-0.001 <= share <= 1.001 for *_, share in facts.colors), "the share of a colour")
    # CIE Lab, with room for rounding: the largest b* of sRGB is 108, the largest chroma 134.
    figures = (facts.brightness, facts.contrast, facts.saturation, abs(facts.warmth))
    limits = zip(figures, (101, 101, 140, 115), strict=True)
    _require(all(-0.1 <= figure <= limit for figure, limit in limits), "a figure")
    _require(
        max(len(facts.camera or ""), len(facts.taken_on or "")) <= MAX_TEXT_CHARACTERS,
        "what its camera said",
    )


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise ImpossibleAnswerError(what)

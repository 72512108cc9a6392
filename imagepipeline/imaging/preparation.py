"""Extracts what the assets need from a decoded original, small enough to send between processes."""

from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import (
    render_placeholder,
    render_preview,
    render_square,
    render_thumbnail,
    shrink,
)
from imagepipeline.models import PixelFacts

SMALL_PX = 1024  # long side of the copy from which all smaller ones are made


@dataclass(frozen=True)
class Prepared:
    """Measurements and small copies of a decoded original.

    Attributes:
        format: format of the file.
        flaw: see `Decoded`.
        facts: size, colours and camera.
        preview: the vision model's input: a JPEG, or for the offline model the central square as
            raw RGB [224, 224, 3].
        thumbnail: a data URI of at most 96 px for the UI.
        placeholder: a data URI for a page to show first.
    """

    format: str
    flaw: str | None
    facts: PixelFacts
    preview: bytes
    thumbnail: str
    placeholder: str


def prepare(decoded: Decoded, preview_px: int | None = None) -> Prepared:
    """Measures a decoded original and renders its small copies.

    Args:
        decoded: the original.
        preview_px: long side of the preview; None for the raw square.
    """
    small = shrink(decoded.image, SMALL_PX)
    return Prepared(
        decoded.format,
        decoded.flaw,
        measure(decoded, small),
        render_square(small)
        if preview_px is None
        else render_preview(small if preview_px <= SMALL_PX else decoded.image, preview_px),
        render_thumbnail(small),
        render_placeholder(small),
    )

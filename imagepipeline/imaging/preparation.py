"""All that the assets need to know of a decoded original, small enough to be moved between processes."""

from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_placeholder, render_preview, render_square, shrink
from imagepipeline.models import THUMBNAIL_PX, PixelFacts

SMALL_PX = 1024  # long side of the copy that all smaller ones are made of


@dataclass(frozen=True)
class Prepared:
    """The facts of a decoded original and its small copies.

    `format` is that of the file, `flaw` as in `Decoded`. `preview` is what the vision model is shown: a JPEG, or the
    raw RGB [224, 224, 3] of the central square for the offline one. `thumbnail` is the JPEG of at most 160 px for the
    UI, `placeholder` a data URI.
    """

    format: str
    flaw: str | None
    facts: PixelFacts
    preview: bytes
    thumbnail: bytes
    placeholder: str


def prepare(decoded: Decoded, preview_px: int | None = None) -> Prepared:
    """Reads off an image what the assets need; `preview_px` is the preview's long side, None means the square."""
    small = shrink(decoded.image, SMALL_PX)
    return Prepared(
        decoded.format,
        decoded.flaw,
        measure(decoded, small),
        render_square(small)
        if preview_px is None
        else render_preview(small if preview_px <= SMALL_PX else decoded.image, preview_px),
        render_preview(small, THUMBNAIL_PX),
        render_placeholder(small),
    )

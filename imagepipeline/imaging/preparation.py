"""All that the assets need to know of a decoded original, small enough to be moved between processes."""

from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_placeholder, render_preview, shrink
from imagepipeline.models import PixelFacts

SMALL_PX = 1024  # long side of the copy that all smaller ones are made of
THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Prepared:
    """The facts of a decoded original and its small copies.

    `format` is that of the file, `flaw` as in `Decoded`. `preview` is the JPEG for the vision model, `thumbnail` the
    one of at most 160 px for the UI, `placeholder` a data URI.
    """

    format: str
    flaw: str | None
    facts: PixelFacts
    preview: bytes
    thumbnail: bytes
    placeholder: str


def prepare(decoded: Decoded, preview_px: int = 1024) -> Prepared:
    """Reads off an image what the assets need; `preview_px` is the long side of the preview."""
    small = shrink(decoded.image, SMALL_PX)
    return Prepared(
        decoded.format,
        decoded.flaw,
        measure(decoded, small),
        render_preview(small if preview_px <= SMALL_PX else decoded.image, preview_px),
        render_preview(small, THUMBNAIL_PX),
        render_placeholder(small),
    )

"""All that the assets need to know of a decoded original, small enough to be moved between processes."""

from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_placeholder, render_preview
from imagepipeline.models import PixelFacts

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
    image = decoded.image
    return Prepared(
        decoded.format,
        decoded.flaw,
        measure(decoded),
        render_preview(image, preview_px),
        render_preview(image, THUMBNAIL_PX),
        render_placeholder(image),
    )

"""All that is read off an original at once, so that it is decoded once."""

from dataclasses import dataclass

from imagepipeline.imaging.decoding import Decoded, Rules, decode
from imagepipeline.imaging.palette import measure
from imagepipeline.imaging.variants import render_placeholder, render_preview
from imagepipeline.models import PixelFacts

THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Prepared:
    """A decoded original, the facts of its pixels, and its small copies.

    `preview` is the JPEG for the vision model, `thumbnail` the one of at most 160 px for the UI, `placeholder` a
    data URI.
    """

    decoded: Decoded
    facts: PixelFacts
    preview: bytes
    thumbnail: bytes
    placeholder: str


def prepare(content: bytes, rules: Rules) -> Prepared:
    """Decodes an original and reads off it what the assets need; raises what `decode` raises."""
    decoded = decode(content, rules)
    image = decoded.image
    return Prepared(
        decoded, measure(decoded), render_preview(image), render_preview(image, THUMBNAIL_PX), render_placeholder(image)
    )

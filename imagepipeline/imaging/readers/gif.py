"""GIF: its frames are drawn over one another as browsers do."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from imagepipeline.errors import (
    UnreadableImageError,
)
from imagepipeline.imaging import gif
from imagepipeline.imaging.drawing import draw, fill
from imagepipeline.imaging.limits import Rules, check_frames, check_size
from imagepipeline.imaging.readers.source import Picture, Source, miss_start, open_image


def read_gif(content: bytes, rules: Rules) -> Source:
    """Reads a GIF; pixels that its frames do not cover are transparent, as in browsers."""
    found = gif.read_gif(content)
    first = next(found[1], None) if found else None
    if found is None or first is None:
        raise miss_start("GIF")
    canvas = found[0]
    width, height = (
        max(canvas.width, first.left + first.width),
        max(canvas.height, first.top + first.height),
    )
    if (canvas.width, canvas.height) != (0, 0) and (
        first.left >= canvas.width or first.top >= canvas.height
    ):
        width, height = canvas.width, canvas.height
    if not width or not height:
        raise UnreadableImageError(f"the GIF data is damaged: its picture is {width} x {height} px")
    check_size(width, height, rules)
    if rules.is_animation_kept:
        walk = gif.read_gif(content)
        for index, _ in enumerate(walk[1] if walk else ()):
            check_frames(width, height, index + 1, rules)

    def load(_: bool) -> Iterator[Picture]:
        shown = Image.new("RGBA", (width, height))
        walk = gif.read_gif(content)
        for frame in walk[1] if walk else ():
            below = shown.copy() if frame.disposal in gif.RESTORE else None
            flaw = _draw_gif(frame, shown, rules)
            yield Picture(shown.copy(), frame.duration_ms, flaw)
            if not rules.is_animation_kept:
                return
            if frame.disposal == 2:
                box = frame.left, frame.top, frame.left + frame.width, frame.top + frame.height
                shown.paste((0, 0, 0, 0), box)
            elif below:
                shown = below

    # A GIF states the number of repetitions after the first play: browsers, libvips and gif2webp
    # agree.
    return Source(
        width,
        height,
        load,
        count_plays=lambda: 1 if canvas.loop is None else canvas.loop and canvas.loop + 1,
    )


def _draw_gif(frame: gif.GifFrame, shown: Image.Image, rules: Rules) -> str | None:
    """Draws a frame onto the canvas; returns its flaw, or None."""
    if not frame.width or not frame.height:
        return None
    check_size(frame.width, frame.height, rules)
    is_part_kept = rules.is_truncated_accepted
    drawn = draw(
        lambda: open_image(frame.content, "GIF"),
        "GIF",
        frame.is_cut,
        frame.is_interlaced,
        is_part_kept,
    )
    image = drawn.image.convert("RGBA")
    if frame.clear_index is not None:
        image.putalpha(
            Image.fromarray(
                np.where(np.asarray(drawn.image) == frame.clear_index, 0, 255).astype(np.uint8)
            )
        )
    if drawn.missing is not None:
        image = fill(image, drawn.missing)
    shown.paste(image, (frame.left, frame.top), image.getchannel("A"))
    return drawn.flaw

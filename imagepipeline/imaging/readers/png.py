"""PNG, with its 16-bit samples, transparent colours and animations."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from imagepipeline.errors import (
    LimitError,
    TruncatedImageError,
    UnreadableImageError,
)
from imagepipeline.imaging import exif, png
from imagepipeline.imaging.color import Reduction, plan_reduction, read_png_space
from imagepipeline.imaging.drawing import Drawn, draw
from imagepipeline.imaging.limits import Rules, check_frames, check_profile, check_size
from imagepipeline.imaging.readers.source import (
    Picture,
    Source,
    join_bytes,
    miss_start,
    open_image,
    to_eight_bits,
    to_picture,
)

# By colour type: the mode in which Pillow reads the lower bytes of 16 bits as if they were the
# upper ones.
LOWER_BYTES = {png.RGB: "RGB;16L", png.RGBA: "RGBA;16L"}


def read_png(content: bytes, rules: Rules) -> Source:
    """Reads a PNG, and if animations are kept, the frames of an APNG."""
    found = png.read_png(content)
    if found is None:
        raise miss_start("PNG")
    check_size(found.width, found.height, rules)
    try:
        open_image(found.content, "PNG")
    except UnidentifiedImageError:
        if b"IDAT" in found.content:
            raise UnreadableImageError(
                "the PNG data is damaged: its header cannot be read"
            ) from None
        raise (
            miss_start("PNG")
            if found.is_cut
            else UnreadableImageError("the PNG data is damaged: it has no pixels")
        ) from None
    except ValueError as error:
        if "MAX_TEXT" in str(error):
            raise LimitError(
                f"a text in the original unpacks to more than {rules.max_text_bytes:,} bytes, "
                "or all of them do (IMAGEPIPELINE_MAX_TEXT_BYTES)"
            ) from None
        raise
    profile = check_profile(
        png.unpack_profile(found.chunks.get(b"iCCP", b""), rules.max_icc_bytes), rules
    )
    frame_count = 0
    if rules.is_animation_kept:
        for frame_count, _ in enumerate(png.list_frames(found), 1):
            check_frames(found.width, found.height, frame_count, rules)
    space = read_png_space(found.chunks, profile)
    reduction = None
    # Of grey with alpha, Pillow reads the upper bytes alone.
    if found.bits == 16 and found.color_type in (png.GREY, *LOWER_BYTES):
        reduction = plan_reduction(space, is_grey=found.color_type == png.GREY)

    def load(_: bool) -> Iterator[Picture]:
        if frame_count > 1 or (frame_count and found.has_fallback):
            yield from _compose(found, frame_count, rules, reduction)
        else:
            yield _draw_png(found, rules, reduction)

    plays = int.from_bytes(found.chunks.get(b"acTL", b"")[4:8], "big")
    tags = found.chunks.get(b"eXIf", b"")
    return Source(
        found.width,
        found.height,
        load,
        reduction.space if reduction else space,
        exif.parse(tags),
        exif.find_orientation(tags),
        count_plays=lambda: plays,
    )


def _compose(
    found: png.Png, frame_count: int, rules: Rules, reduction: Reduction | None
) -> Iterator[Picture]:
    """Draws the frames of an APNG over one another, as browsers do; Pillow does so with no alpha.

    Raises:
        TruncatedImageError: frames are missing, and the rules do not accept truncated files.
    """
    declared = int.from_bytes(found.chunks.get(b"acTL", b"")[:4], "big")
    flaw = None
    if found.is_cut and frame_count < declared:
        flaw = f"{frame_count} of {declared} frames could be read"
        if not rules.is_truncated_accepted:
            raise TruncatedImageError(
                f"{flaw}; the end of the PNG file is missing: upload it again"
            )
    shown = Image.new("RGBA", (found.width, found.height))
    for index, frame in enumerate(png.list_frames(found)):
        alone = replace(found, content=frame.content, width=frame.width, height=frame.height)
        picture = _draw_png(alone, rules, reduction)
        image = picture.image.convert("RGBA")
        box = frame.left, frame.top, frame.left + frame.width, frame.top + frame.height
        below = shown.crop(box)
        shown.paste(Image.alpha_composite(below, image) if frame.is_blended else image, box)
        yield Picture(shown.copy(), frame.duration_ms, picture.flaw or flaw)
        if frame.disposal == 1 or (frame.disposal == 2 and index == 0):
            shown.paste((0, 0, 0, 0), box)
        elif frame.disposal == 2:
            shown.paste(below, box)


def _draw_png(found: png.Png, rules: Rules, reduction: Reduction | None) -> Picture:
    def reopen(raw_mode: str | None = None) -> ImageFile.ImageFile:
        image = open_image(found.content, "PNG")
        if raw_mode:
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return image

    options = "PNG", found.is_cut, found.is_interlaced, rules.is_truncated_accepted
    drawn = draw(reopen, *options)
    lower = None
    raw_mode = LOWER_BYTES.get(found.color_type) if found.bits == 16 else None
    if raw_mode and (reduction or b"tRNS" in found.chunks):
        lower = draw(lambda: reopen(raw_mode), *options).image
    image = _with_clear_color(drawn.image, found, lower)
    if reduction and found.color_type == png.GREY:
        image = _reduce_grey(image, drawn.image, reduction)
    elif reduction and lower:
        image = join_bytes(image, lower, reduction.table)
    return to_picture(Drawn(image, drawn.missing, drawn.flaw))


def _reduce_grey(image: Image.Image, stored: Image.Image, reduction: Reduction) -> Image.Image:
    """Replaces the grey of an image by that of the stored 16 bits, reduced."""
    grey = Image.fromarray(reduction.table[np.asarray(stored)])
    return Image.merge("LA", (grey, image.getchannel("A"))) if image.mode == "LA" else grey


def _with_clear_color(image: Image.Image, found: png.Png, lower: Image.Image | None) -> Image.Image:
    """Adds an alpha channel if a colour of grey or RGB is transparent (W3C PNG, 11.3.1.1).

    Args:
        image: as drawn.
        found: the PNG.
        lower: the lower bytes of an RGB image of 16 bits.
    """
    clear = found.chunks.get(b"tRNS", b"")
    if found.color_type in (png.GREY, png.RGB):
        image.info.pop("transparency", None)  # Pillow compares it at the wrong bit depth
    # As in browsers, the upper byte counts only if samples have one.
    used = 0xFFFF if found.bits == 16 else 0xFF
    values = [
        int.from_bytes(clear[at : at + 2], "big") & used for at in range(0, len(clear) - 1, 2)
    ]
    if found.color_type == png.GREY and len(values) == 1 and image.mode in ("1", "L", "I;16", "I"):
        stored = np.asarray(image.convert("L") if image.mode == "1" else image)
        value = values[0] if found.bits == 16 else values[0] * 255 // (2**found.bits - 1)
        grey = to_eight_bits(stored) if found.bits == 16 else stored
        alpha = np.where(stored == value, 0, 255).astype(np.uint8)
        return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    if found.color_type == png.RGB and len(values) == 3 and image.mode == "RGB":
        stored = np.asarray(image).astype(np.uint16)
        if found.bits == 16:
            if lower is None:
                return image
            stored = stored << 8 | np.asarray(lower)
        alpha = np.where((stored == values).all(axis=2), 0, 255).astype(np.uint8)
        image = image.copy()
        image.putalpha(Image.fromarray(alpha))
    return image

"""JPEG, decoded at the size that is needed; a damaged one is told from a sound one."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from imagepipeline.errors import (
    LimitError,
    TruncatedImageError,
    UnreadableImageError,
)
from imagepipeline.imaging import exif, jpeg
from imagepipeline.imaging.color import read_icc
from imagepipeline.imaging.drawing import Drawn, draw
from imagepipeline.imaging.limits import (
    MAX_JPEG_REDUCTION,
    Rules,
    check_profile,
    find_scale,
    max_original_pixels,
)
from imagepipeline.imaging.readers.source import Picture, Source, miss_start, open_image, to_picture

EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


def read_jpeg(content: bytes, rules: Rules) -> Source:
    """Reads a JPEG, or the first picture of an MPO from a phone."""
    found = jpeg.read_jpeg(content)
    if found is None:
        raise miss_start("JPEG")
    profile = check_profile(found.profile, rules)
    width, height = found.width, found.height
    most = max_original_pixels("JPEG", rules)
    if width * height > most:
        limit = f"{most / 1e6:g} megapixels"
        setting = f"{MAX_JPEG_REDUCTION} x IMAGEPIPELINE_MAX_PIXELS"
        raise LimitError(
            f"the original is {width} x {height} px, the limit for a JPEG is {limit} ({setting})"
        )

    def load(is_on_its_side: bool) -> Iterator[Picture]:
        size = _choose_size(width, height, is_on_its_side, rules)
        picture = _decode_jpeg(found, size, rules)
        yield replace(picture, extent=_find_extent(width, height, picture.image.size))

    orientation = exif.find_orientation(found.exif)
    return Source(width, height, load, read_icc(profile), exif.parse(found.exif), orientation)


def _choose_size(width: int, height: int, is_on_its_side: bool, rules: Rules) -> tuple[int, int]:
    """Returns the size at which to decode a JPEG: one to eight eighths of its own.

    It is a half, a quarter or an eighth if this leaves twice the width needed, which takes a third
    of the time and has no visible effect. It is smaller if the JPEG would have too many pixels, but
    not smaller than the width needed.

    Raises:
        LimitError: the JPEG has too many pixels even so.
    """
    across = height if is_on_its_side else width
    down = width if is_on_its_side else height
    needed_px = round(across * find_scale(across, down, rules))
    eighths = next((part for part in (1, 2, 4) if across * part // 8 >= 2 * needed_px), 8)
    size = _scale_by_eighths(width, height, eighths)
    while size[0] * size[1] > rules.max_pixels and across * (eighths - 1) / 8 >= needed_px:
        eighths -= 1
        size = _scale_by_eighths(width, height, eighths)
    if size[0] * size[1] > rules.max_pixels:
        raise LimitError(
            f"the original is {width} x {height} px and must be decoded at "
            f"{size[0]} x {size[1]} px, the limit is {rules.max_pixels / 1e6:g} megapixels "
            "(IMAGEPIPELINE_MAX_PIXELS)"
        )
    return size


def _scale_by_eighths(width: int, height: int, eighths: int) -> tuple[int, int]:
    return math.ceil(width * eighths / 8), math.ceil(height * eighths / 8)


def _find_extent(width: int, height: int, size: tuple[int, int]) -> tuple[float, float] | None:
    """How much of a JPEG decoded at that size shows the picture.

    Its last column and row reach beyond the picture if its sides are no multiples of the reduction.
    """
    for eighths in range(8, 0, -1):
        if _scale_by_eighths(width, height, eighths) == size:
            return width * eighths / 8, height * eighths / 8
    return None


def _decode_jpeg(found: jpeg.Jpeg, size: tuple[int, int], rules: Rules) -> Picture:
    """Decodes a JPEG with simplejpeg, because Pillow drops the decoder's warnings of damage."""
    if found.is_cut and not found.is_covered:
        return _salvage_jpeg(found, size, rules)
    mode, layout = {1: ("L", "GRAY"), 3: ("RGB", "RGB"), 4: ("CMYK", "CMYK")}[found.component_count]
    try:
        pixels = simplejpeg.decode_jpeg(
            found.content, layout, min_width=size[0], min_height=size[1]
        )
    except ValueError as error:
        return _explain_jpeg(found, size, str(error), rules)
    return Picture(_from_pixels(pixels, mode))


def _from_pixels(
    pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", mode: str
) -> Image.Image:
    height, width = pixels.shape[:2]
    if mode == "CMYK":  # stored inverted, by Adobe and so by everyone
        pixels = 255 - pixels
    return Image.frombytes(mode, (width, height), pixels)


def _explain_jpeg(found: jpeg.Jpeg, size: tuple[int, int], error: str, rules: Rules) -> Picture:
    """Returns the picture despite a decoder's error, if it is harmless or the rules accept damage.

    Raises:
        MemoryError: the decoder needed too much memory.
        TruncatedImageError: the end of the file is missing.
        UnreadableImageError: the data is damaged.
    """
    if "subsampling" in error:  # a subsampling that only Pillow supports
        drawn = draw(
            lambda: _draft(found.content, size),
            "JPEG",
            found.is_cut,
            False,
            rules.is_truncated_accepted,
        )
        return to_picture(drawn)
    if "memory" in error.lower():
        raise MemoryError(error)
    if found.is_cut:
        return _salvage_jpeg(found, size, rules)
    padding = EXTRANEOUS.search(error)
    if padding and jpeg.strip_padding(found.content, int(padding[1])) != found.content:
        clean_content = jpeg.strip_padding(found.content, int(padding[1]))
        return _decode_jpeg(replace(found, content=clean_content), size, rules)
    flaw = jpeg.explain_flaw(error)
    if rules.is_truncated_accepted and "Corrupt JPEG data" in error:
        image = to_picture(Drawn(_load_leniently(found.content, size))).image
        return Picture(image, flaw=f"some of the picture is wrong: {flaw}")
    raise UnreadableImageError(f"{jpeg.DAMAGED}: {flaw}")


def _draft(content: bytes, size: tuple[int, int]) -> ImageFile.ImageFile:
    image = open_image(content, "JPEG")
    image.draft(None, size)
    return image


def _load_leniently(content: bytes, size: tuple[int, int]) -> Image.Image:
    image = _draft(content, size)
    image.load()
    return image


def _salvage_jpeg(found: jpeg.Jpeg, size: tuple[int, int], rules: Rules) -> Picture:
    """Decodes what is left of a truncated JPEG.

    These are the first rows, or if it has several scans, the whole picture with less detail.

    Raises:
        TruncatedImageError: nothing could be read, or the rules do not accept truncated files.
    """
    advice = "the end of the JPEG file is missing: upload it again"
    if found.has_several_scans:
        if not found.scan_count:
            raise TruncatedImageError(f"not even a coarse picture could be read; {advice}")
        scans = "1 scan" if found.scan_count == 1 else f"{found.scan_count} scans"
        flaw = f"only a coarse picture could be read, from {scans}"
        if not rules.is_truncated_accepted:
            raise TruncatedImageError(f"{flaw}; {advice}")
        return Picture(to_picture(Drawn(_load_leniently(found.content, size))).image, flaw=flaw)

    def reopen() -> ImageFile.ImageFile:
        # Without an end, so that what is missing is not drawn.
        image = open_image(found.content[:-2].rstrip(b"\0"), "JPEG")
        image.draft(None, size)
        image.load_read = image.fp.read  # type: ignore[attr-defined, union-attr]
        return image

    return to_picture(draw(reopen, "JPEG", True, False, rules.is_truncated_accepted))

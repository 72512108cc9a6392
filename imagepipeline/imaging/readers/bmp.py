"""BMP, with the kinds that Pillow does not read."""

from collections.abc import Iterator

import numpy as np

from imagepipeline.errors import (
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging import bmp
from imagepipeline.imaging.color import read_icc
from imagepipeline.imaging.drawing import draw, fill, percent
from imagepipeline.imaging.limits import Rules, check_profile, check_size
from imagepipeline.imaging.readers.source import (
    EXPORT_ADVICE,
    Picture,
    Source,
    miss_start,
    open_image,
    to_picture,
)


def read_bmp(content: bytes, rules: Rules) -> Source:
    """Reads a BMP."""
    found = bmp.read_bmp(content)
    if found is None:
        raise miss_start("BMP")
    header, header_bytes = found
    if not header.is_plausible:
        raise UnreadableImageError("the BMP data is damaged: its header cannot be read")
    refusal = header.find_refusal(header_bytes)
    if refusal:
        raise UnsupportedFormatError(f"the original is {refusal}: {EXPORT_ADVICE}")
    if not header.width or not header.height:
        raise UnreadableImageError(
            f"the BMP data is damaged: its picture is {header.width} x {header.height} px"
        )
    check_size(header.width, header.height, rules)
    end = header.start + header.row_bytes * header.height
    profile = check_profile(bmp.read_profile(content, header_bytes), rules)

    def load(_: bool) -> Iterator[Picture]:
        if header.compression in (bmp.BITFIELDS, bmp.ALPHA_BITFIELDS):
            yield _read_fields(content, header, rules)
            return
        if header.compression in (bmp.RLE4, bmp.RLE8):
            yield _read_runs(content, header, header_bytes, rules)
            return
        drawn = draw(
            lambda: open_image(content, "BMP"),
            "BMP",
            end > len(content),
            False,
            rules.is_truncated_accepted,
        )
        yield to_picture(drawn)

    return Source(header.width, header.height, load, read_icc(profile))


def _read_fields(content: bytes, header: bmp.Bmp, rules: Rules) -> Picture:
    rows = max(0, len(content) - header.start) // max(header.row_bytes, 1)
    size = header.start + header.row_bytes * header.height
    image = bmp.read_fields(content.ljust(size, b"\0"), header)
    if image is None:
        raise UnsupportedFormatError(
            f"the original is a BMP with bit fields that make no sense: {EXPORT_ADVICE}"
        )
    if rows >= header.height:
        return Picture(image)
    flaw = f"{percent(rows / header.height)} of the rows could be read"
    if not rules.is_truncated_accepted or not rows:
        raise TruncatedImageError(f"{flaw}; the end of the BMP file is missing: upload it again")
    missing = np.zeros((header.height, header.width), dtype=bool)
    missing[rows:] = True
    return Picture(fill(image, missing if header.is_top_down else missing[::-1]), flaw=flaw)


def _read_runs(content: bytes, header: bmp.Bmp, header_bytes: int, rules: Rules) -> Picture:
    image, free, has_end = bmp.read_runs(content, header, header_bytes)
    if has_end or not free.any():
        return Picture(image)
    flaw = f"{percent(1 - free.any(axis=1).mean())} of the rows could be read"
    if not rules.is_truncated_accepted or free.all():
        raise TruncatedImageError(f"{flaw}; the end of the BMP file is missing: upload it again")
    return Picture(fill(image, free), flaw=flaw)

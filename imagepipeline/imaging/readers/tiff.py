"""TIFF: the first page, with the samples that Pillow reads but does not convert."""

import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from imagepipeline.errors import (
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging import jpeg, tiff
from imagepipeline.imaging.color import Reduction, plan_reduction, read_icc
from imagepipeline.imaging.drawing import Drawn, draw
from imagepipeline.imaging.formats import RAW_ADVICE
from imagepipeline.imaging.limits import Rules, check_profile, check_size
from imagepipeline.imaging.readers.source import (
    EXPORT_ADVICE,
    Picture,
    Source,
    join_bytes,
    miss_start,
    open_image,
    to_eight_bits,
    to_picture,
)

# Pillow's names of RGB of 16 bits, and of the same read as if its lower bytes were its upper ones.
NATIVE = "L" if sys.byteorder == "little" else "B"
LOWER_BYTES = {
    f"{mode};16{order}": f"{mode};16{'B' if (NATIVE if order == 'N' else order) == 'L' else 'L'}"
    for mode in ("RGB", "RGBA")
    for order in "LBN"
}
# Pillow's names of big-endian signed and floating-point samples, and of the same in native order.
IN_NATIVE_ORDER = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


def read_tiff(content: bytes, rules: Rules) -> Source:
    """Reads the first page of a TIFF."""
    page = tiff.read_tiff(content)
    if page is None:
        raise miss_start("TIFF")
    if page.is_preview:
        raise UnsupportedFormatError(f"the original is {RAW_ADVICE}")
    check_size(*page.size, rules)
    refusal = page.find_refusal()
    is_cut = page.end > len(content)
    if refusal:
        raise UnsupportedFormatError(f"the original is {refusal}: {EXPORT_ADVICE}")
    try:
        header = open_image(content, "TIFF")
    except UnidentifiedImageError:
        if _is_known(page) or not page.is_plausible:
            raise UnreadableImageError("the TIFF data is damaged: its tags make no sense") from None
        raise UnsupportedFormatError(
            f"the original is {page.describe()}: {EXPORT_ADVICE}"
        ) from None
    if not isinstance(header, TiffImagePlugin.TiffImageFile):
        raise UnreadableImageError("the TIFF data is damaged: its header cannot be read")
    check_size(*header.size, rules)
    profile = check_profile(header.info.get("icc_profile"), rules)

    space, reduction = read_icc(profile), None
    is_grey = header.mode.startswith("I;16") and page.first(tiff.BITS, 1) == 16
    if is_grey or all(_get_raw_mode(tile) in LOWER_BYTES for tile in header.tile):
        reduction = plan_reduction(space, is_grey)

    def load(_: bool) -> Iterator[Picture]:
        if (
            page.first(tiff.COMPRESSION, tiff.RAW) == tiff.JPEG
            and not is_cut
            and not rules.is_truncated_accepted
        ):
            _check_jpeg_pieces(content, page)
        try:
            drawn = draw(
                lambda: _open_page(content),
                "TIFF",
                is_cut,
                False,
                rules.is_truncated_accepted,
            )
        except UnreadableImageError as error:
            if "raw mode" in str(error.__cause__) or "not configured" in str(error.__cause__):
                raise UnsupportedFormatError(
                    f"the original is {page.describe()}: {EXPORT_ADVICE}"
                ) from error
            raise
        image = drawn.image
        if image.mode.startswith(("I", "F")):
            image = _reduce_depth(image, page, reduction)
        elif reduction:
            lower = draw(
                lambda: _open_page(content, LOWER_BYTES),
                "TIFF",
                is_cut,
                False,
                rules.is_truncated_accepted,
            ).image
            image = join_bytes(image, lower, reduction.table)
        elif image.mode == "La":
            image = _unmultiply(image)
        elif page.has_bytes_as_colors:
            image.putpalette(bytes(page.tags[tiff.COLORS]), "RGB;L")
        yield to_picture(Drawn(image, drawn.missing, drawn.flaw))

    # Pillow applies the orientation of a TIFF itself.
    return Source(*header.size, load, reduction.space if reduction else space, header.getexif())


def _open_page(
    content: bytes, raw_modes: Mapping[str, str] = MappingProxyType({})
) -> ImageFile.ImageFile:
    """Opens a TIFF whose samples are then read in the byte order in which they come, or in others.

    libtiff, which unpacks compressed ones, gives them in that of the machine. Pillow knows this of
    only some kinds.
    """
    image = open_image(content, "TIFF")
    for index, tile in enumerate(image.tile):
        raw_mode = _get_raw_mode(tile)
        known = raw_modes or (IN_NATIVE_ORDER if tile.codec_name == "libtiff" else {})
        if raw_mode in known and isinstance(tile.args, tuple):
            image.tile[index] = tile._replace(args=(known[raw_mode], *tile.args[1:]))
    return image


def _get_raw_mode(tile: Any) -> str:
    """Pillow's name of how the samples of a strip or tile are stored."""
    return str(tile.args[0]) if isinstance(tile.args, tuple) else ""


def _is_known(page: tiff.Tiff) -> bool:
    """Returns whether Pillow supports this kind of pixels, so that the file must be damaged."""
    bits, extra = page.tags.get(tiff.BITS) or (1,), page.tags.get(tiff.EXTRA_SAMPLES, ())
    photometric, kind = (
        page.first(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO),
        page.first(tiff.SAMPLE_FORMAT, tiff.UNSIGNED),
    )
    order = b"II" if page.order == "little" else b"MM"
    return any(
        key[:2] == (order, photometric) and key[2][0] == kind and key[4:] == (bits, extra)
        for key in TiffImagePlugin.OPEN_INFO
    )


def _check_jpeg_pieces(content: bytes, page: tiff.Tiff) -> None:
    """Raises UnreadableImageError if a JPEG in a TIFF is damaged, which libtiff does not report."""
    tables = bytes(page.tags.get(tiff.JPEG_TABLES, ()))
    for offset, size in page.pieces:
        found = jpeg.read_jpeg(tables[:-2] + content[offset + 2 * bool(tables) : offset + size])
        if found is None:
            raise UnreadableImageError("the TIFF data is damaged: a JPEG in it has no picture")
        try:
            simplejpeg.decode_jpeg(found.content, "GRAY", min_width=1, min_height=1)
        except ValueError as error:
            if "Corrupt JPEG data" in str(error):
                flaw = jpeg.explain_flaw(str(error))
                raise UnreadableImageError(
                    f"the TIFF data is damaged: in a JPEG in it, {flaw}"
                ) from error


def _unmultiply(image: Image.Image) -> Image.Image:
    """Converts grey with premultiplied alpha to LA."""
    pixels = np.asarray(image).astype(np.uint16)
    alpha = np.maximum(pixels[:, :, 1], 1)
    grey = np.minimum((pixels[:, :, 0] * 255 + alpha // 2) // alpha, 255).astype(np.uint8)
    return Image.merge(
        "LA", (Image.fromarray(grey), Image.fromarray(pixels[:, :, 1].astype(np.uint8)))
    )


def _reduce_depth(image: Image.Image, page: tiff.Tiff, reduction: Reduction | None) -> Image.Image:
    """Reduces grey of 12 or 16 bits to eight.

    Grey of 32 bits or floats has no agreed white, so its range is stretched from black to white.
    """
    values = np.asarray(image)
    is_inverted = page.first(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO) == tiff.WHITE_IS_ZERO
    if reduction:
        return Image.fromarray(reduction.table[~values if is_inverted else values])
    if image.mode.startswith("I;16"):
        grey = to_eight_bits(values, page.first(tiff.BITS, 16))
    else:
        if (
            image.mode == "I"
            and page.first(tiff.BITS, 32) == 32
            and page.first(tiff.SAMPLE_FORMAT, 1) == tiff.UNSIGNED
        ):
            values = values.view(np.uint32)
        light = np.nan_to_num(values.astype(np.float32), copy=False, posinf=0, neginf=0)
        light -= light.min()
        light *= 255 / max(light.max(), np.finfo(np.float32).tiny)
        grey = light.round(out=light).astype(np.uint8)
    return Image.fromarray(255 - grey if is_inverted else grey)

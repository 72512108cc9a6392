"""AVIF and HEIC, which share their container."""

import io
from collections.abc import Iterator

import pi_heif
import pillow_avif.AvifImagePlugin
from PIL import ExifTags, UnidentifiedImageError

from imagepipeline.errors import UnreadableImageError
from imagepipeline.imaging import exif
from imagepipeline.imaging.boxes import Item, find_end, read_primary_item
from imagepipeline.imaging.color import ColorSpace, read_icc, read_nclx
from imagepipeline.imaging.drawing import Drawn
from imagepipeline.imaging.formats import AVIF_BRANDS, HEIF_BRANDS
from imagepipeline.imaging.limits import Rules, check_frames, check_profile, check_size
from imagepipeline.imaging.readers.source import (
    Picture,
    Source,
    explain,
    load_frames,
    miss_end,
    open_image,
    to_picture,
)

pillow_avif.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # five runs share the machine
pi_heif.register_heif_opener(
    thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
)

ZEROS = {b"av01": bytes(64), b"hvc1": bytes(16)}  # encoders do not write so many zeros


def read_avif(content: bytes, rules: Rules) -> Source:
    """Reads an AVIF; properties rotate and crop it, not EXIF (ISO/IEC 23000-22, 7.3.6.7)."""
    item, is_cut = _check_boxes(content, "AVIF")
    try:
        header = open_image(_with_brand(content, AVIF_BRANDS), "AVIF")
    except UnidentifiedImageError:
        raise (
            miss_end("AVIF", len(content), find_end(content))
            if is_cut
            else UnreadableImageError("the AVIF data is damaged: its header cannot be read")
        ) from None
    check_size(*header.size, rules)
    frame_count = getattr(header, "n_frames", 1) if rules.is_animation_kept else 1
    if rules.is_animation_kept:
        check_frames(*header.size, frame_count, rules)
    space = _read_space(item, header.info.get("icc_profile"), rules)
    crop = _read_crop(item, *header.size)

    def load(_: bool) -> Iterator[Picture]:
        try:
            for picture in load_frames(header, frame_count):
                image = picture.image.crop(crop) if crop else picture.image
                yield Picture(image, picture.duration_ms)
        except Exception as error:
            if is_cut:
                raise miss_end("AVIF", len(content), find_end(content)) from error
            raise

    width, height = (crop[2] - crop[0], crop[3] - crop[1]) if crop else header.size
    # The plugin puts what the properties say into EXIF, unless Pillow reads the same there.
    tags = exif.parse(header.info.get("exif", b""))
    orientation = tags.get(ExifTags.Base.Orientation, 1)
    return Source(width, height, load, space, tags, orientation)


def read_heif(content: bytes, rules: Rules) -> Source:
    """Reads a HEIC; libheif rotates and crops it, so EXIF must not be applied."""
    item, is_cut = _check_boxes(content, "HEIF")
    try:
        header = open_image(_with_brand(content, HEIF_BRANDS), "HEIF")
    except UnidentifiedImageError as error:
        if is_cut:
            raise miss_end("HEIF", len(content), find_end(content)) from None
        raise _explain_heif(content, error) from None
    check_size(*header.size, rules)
    space = _read_space(item, header.info.get("icc_profile"), rules)

    def load(_: bool) -> Iterator[Picture]:
        try:
            header.load()
        except Exception as error:
            if is_cut:
                raise miss_end("HEIF", len(content), find_end(content)) from error
            raise
        yield to_picture(Drawn(header))

    return Source(*header.size, load, space, exif.parse(header.info.get("exif") or b""))


def _explain_heif(content: bytes, error: Exception) -> Exception:
    """Returns the reason why a header cannot be read, which Pillow does not report."""
    try:
        pi_heif.open_heif(io.BytesIO(_with_brand(content, HEIF_BRANDS)))
    except Exception as one:
        return explain("HEIF", one)
    return UnreadableImageError("the HEIF data is damaged: its header cannot be read")


def _check_boxes(content: bytes, format_: str) -> tuple[Item, bool]:
    """Returns the primary item, and whether the file is cut off.

    Raises:
        UnreadableImageError: the coded data has a long run of zeros. No encoder writes such runs,
            but decoders do not report them.
    """
    item = read_primary_item(content)
    is_cut = find_end(content) > len(content) or any(
        offset + size > len(content) for offset, size in item.extents
    )
    zeros = ZEROS.get(item.coding)
    if zeros and not is_cut:
        for offset, size in item.extents:
            if zeros in content[offset : offset + size]:
                raise UnreadableImageError(
                    f"the {format_} data is damaged: a part of its pixels was replaced by zeros"
                )
    return item, is_cut


def _with_brand(content: bytes, known: tuple[bytes, ...]) -> bytes:
    """Replaces a major brand that the decoder does not accept; `identify` has checked the codec."""
    return content if content[8:12] in known else content[:8] + known[0] + content[12:]


def _read_space(item: Item, profile: bytes | None, rules: Rules) -> ColorSpace:
    profile = check_profile(profile, rules)
    if profile:
        return read_icc(profile)
    nclx = next(
        (box for kind, box in item.properties if kind == b"colr" and box.startswith(b"nclx")), None
    )
    return (
        read_nclx(nclx, item.find(b"clli"), item.find(b"mdcv"))
        if nclx and len(nclx) >= 10
        else ColorSpace()
    )


def _read_crop(item: Item, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Returns left, top, right and bottom of the property `clap` (ISO/IEC 14496-12, 12.1.4).

    Returns None if the picture is not cropped.
    """
    box = item.find(b"clap")
    if box is None or len(box) < 32:
        return None
    numbers = [
        int.from_bytes(box[at : at + 4], "big", signed=at >= 16 and at % 8 == 0)
        for at in range(0, 32, 4)
    ]
    if not all(numbers[1::2]):
        return None
    wide, high, right, down = (numbers[at] / numbers[at + 1] for at in range(0, 8, 2))
    left, top = round((width - wide) / 2 + right), round((height - high) / 2 + down)
    crop = left, top, left + round(wide), top + round(high)
    is_inside = 0 <= crop[0] < crop[2] <= width and 0 <= crop[1] < crop[3] <= height
    return crop if is_inside and crop != (0, 0, width, height) else None

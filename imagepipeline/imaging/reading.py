"""Each accepted format: what its header says, the limits on it, and how its pixels are decoded."""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pi_heif
import pillow_avif.AvifImagePlugin
import simplejpeg

# Named one by one, or Pillow would import all its 43 readers, some of which start other programs.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from imagepipeline.errors import (
    LimitError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging import bmp, gif, jpeg, png, tiff
from imagepipeline.imaging.boxes import Item, find_end, read_primary_item
from imagepipeline.imaging.color import ColorSpace, read_nclx, read_png_space
from imagepipeline.imaging.drawing import Drawn, clean, draw, fill, percent
from imagepipeline.imaging.formats import RAW_ADVICE, measure_webp
from imagepipeline.imaging.limits import Rules, check_frames, check_profile, check_size

pillow_avif.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # five runs share the machine
pi_heif.register_heif_opener(
    thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
)

EXPORT_ADVICE = "export it as PNG"
# The brands by which the decoders know their files; `formats` knows more.
PILLOW_AVIF_BRANDS = (b"avif", b"avis")
PILLOW_HEIF_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
# A JPEG is decoded at an eighth to all of its size. Even at an eighth its coded data is read in full, so that it may be
# no larger than this many times what is decoded.
MAX_JPEG_REDUCTION = 5
# What libjpeg-turbo says, in words for an uploader.
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
JPEG_FLAWS = {
    "premature end": "the data of its pixels ends too early",
    "extraneous": "there is more data than its pixels need",
    "bad Huffman code": "the data of its pixels makes no sense",
    "instead of RST": "a piece of its pixels is missing",
    "Huffman table": "a table that its pixels need is missing or broken",
    "quantization table": "a table that its pixels need is missing",
    "progressive": "the parts of its picture do not fit together",
}
ZEROS = {b"av01": bytes(64), b"hvc1": bytes(16)}  # longer runs of zeros no encoder writes


@dataclass(frozen=True)
class Picture:
    """A decoded picture in mode L, LA, RGB, RGBA, CMYK or LAB of 8 bits a channel, as stored; its colours as well."""

    image: Image.Image
    duration_ms: int = 0
    flaw: str | None = None


@dataclass(frozen=True)
class Source:
    """An original whose header was found to be in order; nothing is decoded yet.

    `width` and `height` are as stored. `load` gives its picture, or the frames of an animation; it is told whether
    the picture lies on its side. `count_plays`: how often an animation is shown, 0 for ever; known once it is loaded.
    """

    width: int
    height: int
    load: Callable[[bool], Iterator[Picture]]
    space: ColorSpace = field(default_factory=ColorSpace)
    exif: Image.Exif = field(default_factory=Image.Exif)
    is_turned_by_exif: bool = True
    count_plays: Callable[[], int] = lambda: 0


# ---- what all have in common


def _miss_start(format_: str) -> TruncatedImageError:
    return TruncatedImageError(
        f"no row could be read; the end of the {format_} file is missing: upload it again"
    )


def _miss_end(format_: str, arrived: int, declared: int) -> TruncatedImageError:
    share = percent(arrived / declared)
    return TruncatedImageError(
        f"{share} of the bytes arrived, no row could be read; the end of the {format_} file is missing: upload it again"
    )


def explain(format_: str, error: Exception) -> Exception:
    """What a decoder's own error means."""
    text = clean(str(error), 200) or type(error).__name__
    if "security limit" in text.lower():  # libheif's, which are about a bad header or a giant
        return LimitError(f"the {format_} file exceeds a limit of its decoder: {text}")
    if "memory" in text.lower():  # how codecs put it
        return MemoryError(text)
    if "not implemented" in text.lower() or "unsupported" in text.lower():
        kind = f"of a kind of {format_} that cannot be read here"
        return UnsupportedFormatError(
            f"the original is {kind} ({text[:120]}): export it as JPEG or PNG"
        )
    return UnreadableImageError(f"the {format_} data is damaged: {text[:120]}")


def _parse_exif(content: bytes) -> Image.Exif:
    exif = Image.Exif()
    with contextlib.suppress(
        Exception
    ):  # EXIF is decoration: however broken it is, the picture is not
        exif.load(content)
    return exif


def _open(content: bytes, format_: str) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(content), formats=[format_])


def _to_picture(drawn: Drawn, duration_ms: int = 0) -> Picture:
    """Of what was drawn in a mode for colours of 8 bits."""
    image = drawn.image
    if image.has_transparency_data and image.mode not in ("RGBA", "LA"):
        image = image.convert("RGBA")
    elif image.mode not in ("RGB", "RGBA", "L", "LA", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if drawn.missing is not None:
        image = fill(image.copy(), drawn.missing)
    return Picture(image, duration_ms, drawn.flaw)


# ---- JPEG


def read_jpeg(content: bytes, rules: Rules) -> Source:
    """JPEG, and of a phone's MPO the first picture."""
    found = jpeg.read_jpeg(content)
    if found is None:
        raise _miss_start("JPEG")
    profile = check_profile(found.profile, rules)
    width, height = found.width, found.height
    if width * height > MAX_JPEG_REDUCTION * rules.max_pixels:
        limit = f"{MAX_JPEG_REDUCTION * rules.max_pixels / 1e6:g} megapixels"
        setting = f"{MAX_JPEG_REDUCTION} x IMAGEPIPELINE_MAX_PIXELS"
        raise LimitError(
            f"the original is {width} x {height} px, the limit for a JPEG is {limit} ({setting})"
        )

    def load(is_on_its_side: bool) -> Iterator[Picture]:
        size = _choose_size(width, height, is_on_its_side, rules)
        yield _decode_jpeg(found, size, rules)

    return Source(width, height, load, ColorSpace(profile), _parse_exif(found.exif))


def _choose_size(width: int, height: int, is_on_its_side: bool, rules: Rules) -> tuple[int, int]:
    """The size at which a JPEG is decoded, one to eight eighths of its own.

    At half, a quarter or an eighth where that leaves twice what is needed: a third of the time, no visible loss.
    Smaller if it has too many pixels otherwise, as long as it leaves what is needed.
    """
    across = height if is_on_its_side else width
    eighths = next((part for part in (1, 2, 4) if across * part // 8 >= 2 * rules.max_width_px), 8)
    size = _scale_by_eighths(width, height, eighths)
    while size[0] * size[1] > rules.max_pixels and across * (eighths - 1) / 8 >= min(
        across, rules.max_width_px
    ):
        eighths -= 1
        size = _scale_by_eighths(width, height, eighths)
    if size[0] * size[1] > rules.max_pixels:
        raise LimitError(
            f"the original is {width} x {height} px and must be decoded at {size[0]} x {size[1]} px, "
            f"the limit is {rules.max_pixels / 1e6:g} megapixels (IMAGEPIPELINE_MAX_PIXELS)"
        )
    return size


def _scale_by_eighths(width: int, height: int, eighths: int) -> tuple[int, int]:
    return math.ceil(width * eighths / 8), math.ceil(height * eighths / 8)


def _decode_jpeg(found: jpeg.Jpeg, size: tuple[int, int], rules: Rules) -> Picture:
    """By simplejpeg, which passes on what the decoder warns of; Pillow does not."""
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
    if mode == "CMYK":  # Adobe writes it turned over, and so does everybody
        pixels = 255 - pixels
    return Image.frombytes(mode, (width, height), pixels)


def _explain_jpeg(found: jpeg.Jpeg, size: tuple[int, int], error: str, rules: Rules) -> Picture:
    """The picture if the decoder's complaint is none of the picture, or if parts are wanted; raises otherwise."""
    if "subsampling" in error:  # a kind that only Pillow decodes
        drawn = draw(
            lambda: _draft(found.content, size),
            "JPEG",
            found.is_cut,
            False,
            rules.is_truncated_accepted,
        )
        return _to_picture(drawn)
    if "memory" in error.lower():
        raise MemoryError(error)
    if found.is_cut:
        return _salvage_jpeg(found, size, rules)
    padding = EXTRANEOUS.search(error)
    if padding and jpeg.strip_padding(found.content, int(padding[1])) != found.content:
        clean_content = jpeg.strip_padding(found.content, int(padding[1]))
        return _decode_jpeg(replace(found, content=clean_content), size, rules)
    flaw = _explain_flaw(error)
    if rules.is_truncated_accepted and "Corrupt JPEG data" in error:
        image = _to_picture(Drawn(_load_leniently(found.content, size))).image
        return Picture(image, flaw=f"some of the picture is wrong: {flaw}")
    raise UnreadableImageError(f"{jpeg.DAMAGED}: {flaw}")


def _explain_flaw(error: str) -> str:
    return next(
        (words for text, words in JPEG_FLAWS.items() if text in error), "its decoder gave up"
    )


def _draft(content: bytes, size: tuple[int, int]) -> ImageFile.ImageFile:
    image = _open(content, "JPEG")
    image.draft(None, size)
    return image


def _load_leniently(content: bytes, size: tuple[int, int]) -> Image.Image:
    image = _draft(content, size)
    image.load()
    return image


def _salvage_jpeg(found: jpeg.Jpeg, size: tuple[int, int], rules: Rules) -> Picture:
    """What there is of a JPEG without an end: its first rows, or if it comes in scans, the whole but coarse."""
    advice = "the end of the JPEG file is missing: upload it again"
    if found.has_several_scans:
        if not found.scan_count:
            raise TruncatedImageError(f"not even a coarse picture could be read; {advice}")
        scans = "1 scan" if found.scan_count == 1 else f"{found.scan_count} scans"
        flaw = f"only a coarse picture could be read, from {scans}"
        if not rules.is_truncated_accepted:
            raise TruncatedImageError(f"{flaw}; {advice}")
        return Picture(_to_picture(Drawn(_load_leniently(found.content, size))).image, flaw=flaw)

    def open_image() -> ImageFile.ImageFile:
        image = _open(
            found.content[:-2].rstrip(b"\0"), "JPEG"
        )  # without an end, so that what is missing is not drawn
        image.draft(None, size)
        image.load_read = image.fp.read  # type: ignore[attr-defined, union-attr]
        return image

    return _to_picture(draw(open_image, "JPEG", True, False, rules.is_truncated_accepted))


# ---- PNG


def read_png(content: bytes, rules: Rules) -> Source:
    """PNG; of an animated one the still picture, or if asked for, the frames."""
    found = png.read_png(content)
    if found is None:
        raise _miss_start("PNG")
    check_size(found.width, found.height, rules)
    is_animation = rules.is_animation_kept and found.still is not found.content
    whole = found.content if is_animation else found.still
    try:
        header = _open(whole, "PNG")
    except UnidentifiedImageError:
        if b"IDAT" in whole:
            raise UnreadableImageError(
                "the PNG data is damaged: its header cannot be read"
            ) from None
        raise (
            _miss_start("PNG")
            if found.is_cut
            else UnreadableImageError("the PNG data is damaged: it has no pixels")
        ) from None
    except ValueError as error:
        if "MAX_TEXT" in str(error):
            raise LimitError(
                f"a text in the original unpacks to more than {rules.max_text_bytes:,} bytes, or all of them do "
                "(IMAGEPIPELINE_MAX_TEXT_BYTES)"
            ) from None
        raise
    profile = check_profile(
        png.unpack_profile(found.chunks.get(b"iCCP", b""), rules.max_icc_bytes), rules
    )
    first = (
        1 if is_animation and header.info.get("default_image") else 0
    )  # which is for those that show one picture
    frame_count = getattr(header, "n_frames", 1) - first if is_animation else 1
    if is_animation:
        check_frames(found.width, found.height, frame_count, rules)

    def load(_: bool) -> Iterator[Picture]:
        if frame_count <= 1:
            yield _draw_png(found, rules)
            return
        image = _open(whole, "PNG")
        for index in range(first, first + frame_count):
            image.seek(index)
            image.load()
            duration_ms = int(image.info.get("duration") or 0)
            frame = _to_bytes(_with_clear_color(image.copy(), found, None))
            yield _to_picture(Drawn(frame), duration_ms)

    space = read_png_space(found.chunks, profile)
    plays = int(header.info.get("loop") or 0)
    return Source(
        found.width,
        found.height,
        load,
        space,
        _parse_exif(found.chunks.get(b"eXIf", b"")),
        count_plays=lambda: plays,
    )


def _draw_png(found: png.Png, rules: Rules) -> Picture:
    def open_image(raw_mode: str | None = None) -> ImageFile.ImageFile:
        image = _open(found.still, "PNG")
        if raw_mode:
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return image

    options = "PNG", found.is_cut, found.is_interlaced, rules.is_truncated_accepted
    drawn = draw(open_image, *options)
    lower = None
    if found.bits == 16 and found.color_type == png.RGB and b"tRNS" in found.chunks:
        lower = draw(
            lambda: open_image("RGB;16L"), *options
        ).image  # the lower bytes: as if they were the upper ones
    image = _to_bytes(_with_clear_color(drawn.image, found, lower))
    return _to_picture(Drawn(image, drawn.missing, drawn.flaw))


def _to_bytes(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper eight."""
    return (
        Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode.startswith("I")
        else image
    )


def _with_clear_color(image: Image.Image, found: png.Png, lower: Image.Image | None) -> Image.Image:
    """With an alpha channel where grey or RGB has a colour that is transparent (W3C PNG, 11.3.1.1).

    `lower` holds the lower bytes of an RGB image of 16 bits.
    """
    clear = found.chunks.get(b"tRNS", b"")
    if found.color_type in (png.GREY, png.RGB):
        image.info.pop("transparency", None)  # which Pillow compares with numbers of another depth
    values = [int.from_bytes(clear[at : at + 2], "big") for at in range(0, len(clear) - 1, 2)]
    if found.color_type == png.GREY and len(values) == 1 and image.mode in ("1", "L", "I;16", "I"):
        stored = np.asarray(image.convert("L") if image.mode == "1" else image)
        value = values[0] if found.bits == 16 else values[0] * 255 // (2**found.bits - 1)
        grey = (stored >> 8).astype(np.uint8) if found.bits == 16 else stored
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


# ---- GIF


def read_gif(content: bytes, rules: Rules) -> Source:
    """GIF; what its frames do not cover is transparent, as in browsers."""
    found = gif.read_gif(content)
    first = next(found[1], None) if found else None
    if found is None or first is None:
        raise _miss_start("GIF")
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
            below = shown.copy() if frame.disposal == 3 else None
            flaw = _draw_gif(frame, shown, rules)
            yield Picture(shown.copy(), frame.duration_ms, flaw)
            if not rules.is_animation_kept:
                return
            if frame.disposal == 2:
                box = frame.left, frame.top, frame.left + frame.width, frame.top + frame.height
                shown.paste((0, 0, 0, 0), box)
            elif below:
                shown = below

    # What is written is how often it is shown again; browsers, libvips and gif2webp agree on that.
    return Source(
        width,
        height,
        load,
        count_plays=lambda: 1 if canvas.loop is None else canvas.loop and canvas.loop + 1,
    )


def _draw_gif(frame: gif.GifFrame, shown: Image.Image, rules: Rules) -> str | None:
    """Draws a frame over what is shown; the flaw it has."""
    if not frame.width or not frame.height:
        return None
    check_size(frame.width, frame.height, rules)
    is_part_kept = rules.is_truncated_accepted
    drawn = draw(
        lambda: _open(frame.content, "GIF"), "GIF", frame.is_cut, frame.is_interlaced, is_part_kept
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


# ---- WebP


def read_webp(content: bytes, rules: Rules) -> Source:
    """WebP."""
    declared = int.from_bytes(content[4:8], "little") + 8
    is_cut = declared > len(content)
    check_size(*measure_webp(content), rules)
    try:
        header = _open(content, "WEBP")
    except MemoryError:
        raise
    except Exception as error:
        if is_cut:
            raise _miss_end("WEBP", len(content), declared) from error
        raise UnreadableImageError("the WEBP data is damaged: its header cannot be read") from error
    check_size(*header.size, rules)
    profile = check_profile(header.info.get("icc_profile"), rules)
    frame_count = getattr(header, "n_frames", 1) if rules.is_animation_kept else 1
    if rules.is_animation_kept:
        check_frames(*header.size, frame_count, rules)

    def load(_: bool) -> Iterator[Picture]:
        try:
            yield from _load_frames(header, frame_count)
        except Exception as error:
            if is_cut:
                raise _miss_end("WEBP", len(content), declared) from error
            raise

    plays = int(header.info.get("loop") or 0)
    exif = _parse_exif(header.info.get("exif", b""))
    return Source(*header.size, load, ColorSpace(profile), exif, count_plays=lambda: plays)


def _load_frames(image: ImageFile.ImageFile, frame_count: int) -> Iterator[Picture]:
    for index in range(frame_count):
        if index:
            image.seek(index)
        image.load()
        yield _to_picture(
            Drawn(image.copy() if frame_count > 1 else image), int(image.info.get("duration") or 0)
        )


# ---- AVIF and HEIF


def read_avif(content: bytes, rules: Rules) -> Source:
    """AVIF; it is turned and cropped by its own properties, not by EXIF (ISO/IEC 23000-22, 7.3.6.7)."""
    item, is_cut = _check_boxes(content, "AVIF")
    try:
        header = _open(_with_brand(content, PILLOW_AVIF_BRANDS), "AVIF")
    except UnidentifiedImageError:
        raise (
            _miss_end("AVIF", len(content), find_end(content))
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
            for picture in _load_frames(header, frame_count):
                image = picture.image.crop(crop) if crop else picture.image
                yield Picture(image, picture.duration_ms)
        except Exception as error:
            if is_cut:
                raise _miss_end("AVIF", len(content), find_end(content)) from error
            raise

    width, height = (crop[2] - crop[0], crop[3] - crop[1]) if crop else header.size
    return Source(width, height, load, space, _parse_exif(header.info.get("exif", b"")))


def read_heif(content: bytes, rules: Rules) -> Source:
    """HEIC; libheif turns and crops it, so that EXIF must not."""
    item, is_cut = _check_boxes(content, "HEIF")
    try:
        header = _open(_with_brand(content, PILLOW_HEIF_BRANDS), "HEIF")
    except UnidentifiedImageError as error:
        if is_cut:
            raise _miss_end("HEIF", len(content), find_end(content)) from None
        raise _explain_heif(content, error) from None
    check_size(*header.size, rules)
    space = _read_space(item, header.info.get("icc_profile"), rules)

    def load(_: bool) -> Iterator[Picture]:
        try:
            header.load()
        except Exception as error:
            if is_cut:
                raise _miss_end("HEIF", len(content), find_end(content)) from error
            raise
        yield _to_picture(Drawn(header))

    return Source(
        *header.size,
        load,
        space,
        _parse_exif(header.info.get("exif") or b""),
        is_turned_by_exif=False,
    )


def _explain_heif(content: bytes, error: Exception) -> Exception:
    """Why a header cannot be opened; Pillow keeps that to itself."""
    try:
        pi_heif.open_heif(io.BytesIO(_with_brand(content, PILLOW_HEIF_BRANDS)))
    except Exception as one:
        return explain("HEIF", one)
    return UnreadableImageError("the HEIF data is damaged: its header cannot be read")


def _check_boxes(content: bytes, format_: str) -> tuple[Item, bool]:
    """The primary item, and whether the file ends early.

    What is coded is checked for runs of zeros: no encoder writes them, and decoders draw something for them.
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
    """The file with a major brand that its reader knows: what is in it was told by its coding, which says more."""
    return content if content[8:12] in known else content[:8] + known[0] + content[12:]


def _read_space(item: Item, profile: bytes | None, rules: Rules) -> ColorSpace:
    profile = check_profile(profile, rules)
    if profile:
        return ColorSpace(profile)
    nclx = next(
        (box for kind, box in item.properties if kind == b"colr" and box.startswith(b"nclx")), None
    )
    return (
        read_nclx(nclx, item.find(b"clli"), item.find(b"mdcv"))
        if nclx and len(nclx) >= 10
        else ColorSpace()
    )


def _read_crop(item: Item, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is shown, by the property `clap` (ISO/IEC 14496-12, 12.1.4)."""
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


# ---- TIFF


def read_tiff(content: bytes, rules: Rules) -> Source:
    """The first page of a TIFF."""
    page = tiff.read_tiff(content)
    if page is None:
        raise _miss_start("TIFF")
    if page.is_preview:
        raise UnsupportedFormatError(f"the original is {RAW_ADVICE}")
    check_size(*page.size, rules)
    refusal = page.find_refusal()
    is_cut = page.end > len(content)
    if refusal:
        raise UnsupportedFormatError(f"the original is {refusal}: {EXPORT_ADVICE}")
    try:
        header = _open(content, "TIFF")
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

    def load(_: bool) -> Iterator[Picture]:
        if (
            page.first(tiff.COMPRESSION, tiff.RAW) == tiff.JPEG
            and not is_cut
            and not rules.is_truncated_accepted
        ):
            _check_jpeg_pieces(content, page)
        try:
            drawn = draw(
                lambda: _open(content, "TIFF"), "TIFF", is_cut, False, rules.is_truncated_accepted
            )
        except UnreadableImageError as error:
            if "raw mode" in str(error.__cause__) or "not configured" in str(error.__cause__):
                raise UnsupportedFormatError(
                    f"the original is {page.describe()}: {EXPORT_ADVICE}"
                ) from error
            raise
        image = drawn.image
        if image.mode.startswith(("I", "F")):
            image = _to_eight_bits(image, page)
        elif image.mode == "La":
            image = _unmultiply(image)
        yield _to_picture(Drawn(image, drawn.missing, drawn.flaw))

    exif = header.getexif()
    return Source(
        *header.size, load, ColorSpace(profile), exif, is_turned_by_exif=False
    )  # Pillow turns it itself


def _is_known(page: tiff.Tiff) -> bool:
    """Whether Pillow reads pixels of that kind, so that it must be something else that it stumbles over."""
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
    """Raises UnreadableImageError if a JPEG in a TIFF is damaged: libtiff does not tell."""
    tables = bytes(page.tags.get(tiff.JPEG_TABLES, ()))
    for offset, size in page.pieces:
        found = jpeg.read_jpeg(tables[:-2] + content[offset + 2 * bool(tables) : offset + size])
        if found is None:
            raise UnreadableImageError("the TIFF data is damaged: a JPEG in it has no picture")
        try:
            simplejpeg.decode_jpeg(found.content, "GRAY", min_width=1, min_height=1)
        except ValueError as error:
            if "Corrupt JPEG data" in str(error):
                flaw = _explain_flaw(str(error))
                raise UnreadableImageError(
                    f"the TIFF data is damaged: in a JPEG in it, {flaw}"
                ) from error


def _unmultiply(image: Image.Image) -> Image.Image:
    """LA of grey multiplied by its alpha."""
    pixels = np.asarray(image).astype(np.uint16)
    alpha = np.maximum(pixels[:, :, 1], 1)
    grey = np.minimum((pixels[:, :, 0] * 255 + alpha // 2) // alpha, 255).astype(np.uint8)
    return Image.merge(
        "LA", (Image.fromarray(grey), Image.fromarray(pixels[:, :, 1].astype(np.uint8)))
    )


def _to_eight_bits(image: Image.Image, page: tiff.Tiff) -> Image.Image:
    """Grey of 12 or 16 bits by its upper eight; of 32, which has no agreed white, from its darkest to its lightest."""
    values = np.asarray(image)
    is_inverted = page.first(tiff.PHOTOMETRIC, tiff.BLACK_IS_ZERO) == tiff.WHITE_IS_ZERO
    if image.mode.startswith("I;16"):
        bits = page.first(tiff.BITS, 16)
        grey = (values >> (bits - 8)).astype(np.uint8)
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


# ---- BMP


def read_bmp(content: bytes, rules: Rules) -> Source:
    """BMP."""
    found = bmp.read_bmp(content)
    if found is None:
        raise _miss_start("BMP")
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
            lambda: _open(content, "BMP"),
            "BMP",
            end > len(content),
            False,
            rules.is_truncated_accepted,
        )
        yield _to_picture(drawn)

    return Source(header.width, header.height, load, ColorSpace(profile))


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


READERS: dict[str, Callable[[bytes, Rules], Source]] = {
    "JPEG": read_jpeg,
    "PNG": read_png,
    "WEBP": read_webp,
    "GIF": read_gif,
    "AVIF": read_avif,
    "TIFF": read_tiff,
    "BMP": read_bmp,
    "HEIF": read_heif,
}

"""From untrusted bytes to an upright sRGB image without metadata, or an error that says why not.

Call it in a `Sandbox`: a decoder fed with hostile bytes may crash, or ask for more memory than there is.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import pi_heif
import pillow_avif.AvifImagePlugin

# Named one by one, or Pillow would import all its 43 readers, some of which start other programs.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from imagepipeline.errors import (
    EmptyOriginalError,
    LimitError,
    TooLargeError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging.formats import RAW_ADVICE, declare_bytes, identify, measure_webp

pillow_avif.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # five runs share the machine
pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)

SRGB = ImageCms.createProfile("sRGB")
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE = 254, 258  # TIFF 6.0, section 8
UNREAD = 128  # what libjpeg draws where data is missing; we draw the same in other formats
# How to turn what the camera stored, by EXIF orientation (CIPA DC-008, 4.6.4).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where further pictures make an animation or pages; in JPEG (MPO) and HEIF they are previews, depth maps and the like.
FORMATS_WITH_FRAMES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")


@dataclass(frozen=True)
class Rules:
    """What an original may be, and how it is taken.

    `max_pixels` is over all frames. `max_text_bytes` bounds the texts of a PNG, unpacked. An image wider than
    `max_width_px` is scaled down to it. `is_animation_kept`: all frames instead of the first.
    `is_truncated_accepted`: a cut-off file gives a picture with grey where nothing could be read.
    """

    max_bytes: int = 25_000_000
    max_pixels: int = 50_000_000
    max_side_px: int = 16_383  # WebP can encode no more
    max_frames: int = 60
    max_icc_bytes: int = 1_000_000
    max_text_bytes: int = 1_000_000
    max_width_px: int = 1920
    is_animation_kept: bool = False
    is_truncated_accepted: bool = False


@dataclass(frozen=True)
class Decoded:
    """An image ready to be drawn from: upright, sRGB, mode RGB or RGBA, nothing attached.

    `frames` holds one image, or those of an animation with a duration each; they are at most `Rules.max_width_px`
    wide, while `width` and `height` are the upright original's. `camera`, `taken_on` (YYYY-MM-DD), `artist` and
    `copyright` are what EXIF said, in printable characters. `flaw` says what is missing of a cut-off file.
    """

    frames: tuple[Image.Image, ...]
    format: str
    width: int
    height: int
    durations_ms: tuple[int, ...] = ()
    camera: str | None = None
    taken_on: str | None = None
    artist: str | None = None
    copyright: str | None = None
    flaw: str | None = None

    @property
    def image(self) -> Image.Image:
        """The image, or the first frame."""
        return self.frames[0]


def decode(content: bytes, rules: Rules = Rules()) -> Decoded:
    """Decodes an original in full.

    Raises:
        EmptyOriginalError: of 0 bytes.
        TooLargeError: of more bytes than allowed.
        UnsupportedFormatError: of no accepted format, whatever the file name says.
        LimitError: its header exceeds a limit; told before pixels are decoded.
        TruncatedImageError: the end is missing.
        UnreadableImageError: damaged.
    """
    if not content:
        raise EmptyOriginalError("the original is empty (0 bytes): the upload was cut off or never written")
    if len(content) > rules.max_bytes:
        raise TooLargeError(f"the original has more than {rules.max_bytes:,} bytes (IMAGEPIPELINE_MAX_BYTES)")
    format_ = identify(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what decoders say of odd tags
        _bound_texts(rules)
        try:
            return _decode(content, format_, rules)
        except (LimitError, UnsupportedFormatError, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            return _explain(content, format_, rules, error)


def _decode(content: bytes, format_: str, rules: Rules) -> Decoded:
    frame_count = _check_header(content, format_, rules)
    decoded = _finish(Image.open(io.BytesIO(content), formats=[format_]), format_, rules, frame_count)
    if format_ == "PNG":  # its checksums are not looked at when it is decoded
        Image.open(io.BytesIO(content), formats=[format_]).verify()
    return decoded


def _finish(
    image: ImageFile.ImageFile, format_: str, rules: Rules, frame_count: int, flaw: str | None = None
) -> Decoded:
    orientation, texts = _read_exif(image)
    turn = None if format_ == "TIFF" else TURNS.get(orientation)  # Pillow turns a TIFF when it loads it
    is_on_its_side = turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    width, height = image.size[::-1] if is_on_its_side else image.size
    if format_ == "JPEG" and image.tile:  # not loaded yet
        # At half or a quarter of the size where that leaves twice what is needed: a third of the time, no visible loss.
        needed_px = 2 * rules.max_width_px
        image.draft(None, (1, needed_px) if is_on_its_side else (needed_px, 1))
    frames, durations_ms = [], []
    for index in range(frame_count if rules.is_animation_kept else 1):
        if index:
            image.seek(index)
        image.load()
        scale = min(1.0, rules.max_width_px / (image.height if is_on_its_side else image.width))
        upright = _to_srgb(_scale(image, scale), image.info.get("icc_profile"))
        frames.append(_without_attachments(upright if turn is None else upright.transpose(turn)))
        durations_ms.append(int(image.info.get("duration") or 0))
    return Decoded(
        frames=tuple(frames),
        format=format_,
        width=width,
        height=height,
        durations_ms=tuple(durations_ms) if len(frames) > 1 else (),
        flaw=flaw,
        **texts,
    )


# ---- limits, told from the header


def _bound_texts(rules: Rules) -> None:
    # Pillow's own bounds on what it unpacks of a PNG; the ICC profile of one is bounded by the first, too.
    PngImagePlugin.MAX_TEXT_CHUNK = max(rules.max_text_bytes, rules.max_icc_bytes)
    PngImagePlugin.MAX_TEXT_MEMORY = rules.max_text_bytes
    Image.MAX_IMAGE_PIXELS = None  # the limits below count instead


def _check_header(content: bytes, format_: str, rules: Rules) -> int:
    """The number of frames, if nothing in the header exceeds a limit."""
    if format_ == "WEBP":
        _check_size(*measure_webp(content), 1, rules)
    try:
        image = Image.open(io.BytesIO(content), formats=[format_])
    except ValueError as error:
        if "MAX_TEXT" in str(error):
            raise LimitError(
                f"a text or colour profile in the original unpacks to more than {rules.max_text_bytes:,} bytes "
                "(IMAGEPIPELINE_MAX_TEXT_BYTES, IMAGEPIPELINE_MAX_ICC_BYTES)"
            ) from None
        raise
    _check_size(*image.size, 1, rules)
    icc_bytes = len(image.info.get("icc_profile") or b"")
    if icc_bytes > rules.max_icc_bytes:
        raise LimitError(
            f"the colour profile has {icc_bytes:,} bytes, the limit is {rules.max_icc_bytes:,} "
            "(IMAGEPIPELINE_MAX_ICC_BYTES)"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(NEW_SUBFILE_TYPE) == 1:
        raise UnsupportedFormatError(f"the original is {RAW_ADVICE}")  # its first page is but a preview
    return _count_frames(image, rules) if format_ in FORMATS_WITH_FRAMES else 1


def _check_size(width: int, height: int, frame_count: int, rules: Rules) -> None:
    size = f"the original is {width} x {height} px"
    if max(width, height) > rules.max_side_px:
        raise LimitError(f"{size}, a side may have {rules.max_side_px:,} (IMAGEPIPELINE_MAX_SIDE_PX)")
    if width * height * frame_count > rules.max_pixels:
        frames = f" in {frame_count} frames or more" if frame_count > 1 else ""
        megapixels = f"{rules.max_pixels / 1e6:g} megapixels"
        raise LimitError(f"{size}{frames}, the limit is {megapixels} in all (IMAGEPIPELINE_MAX_PIXELS)")


def _count_frames(image: Image.Image, rules: Rules) -> int:
    """The number of frames; of GIF and TIFF, which must be walked through, no further than the limits allow."""
    if image.format in ("GIF", "TIFF"):
        frame_count = 1
        while frame_count <= rules.max_frames and _has_frame(image, frame_count):
            frame_count += 1
            _check_size(*image.size, frame_count, rules)
    else:
        frame_count = getattr(image, "n_frames", 1)
    if frame_count > rules.max_frames:
        raise LimitError(f"the original has more than {rules.max_frames} frames (IMAGEPIPELINE_MAX_FRAMES)")
    _check_size(*image.size, frame_count, rules)
    return int(frame_count)


def _has_frame(image: Image.Image, index: int) -> bool:
    try:
        image.seek(index)
    except Exception:  # the end, or damage there: what lies before it counts
        return False
    return True


# ---- what is wrong with a file that cannot be decoded


def _explain(content: bytes, format_: str, rules: Rules, error: Exception) -> Decoded:
    """Raises what tells a cut-off file from a damaged one; gives the picture if all, or enough, of it is there."""
    if "memory" in str(error).lower():  # how codecs put it
        raise MemoryError from error
    declared_bytes = declare_bytes(content, format_)
    if "truncated" not in str(error).lower() and (declared_bytes or 0) <= len(content):
        is_header = isinstance(error, UnidentifiedImageError)  # whose text is of no use to anybody
        description = "its header cannot be read" if is_header else _clean(str(error), 120) or type(error).__name__
        raise UnreadableImageError(f"the {format_} data is damaged: {description}") from error
    partial = _read_partly(content, format_, rules)
    if partial and (partial.flaw is None or rules.is_truncated_accepted):
        return partial
    if partial:
        flaw = partial.flaw
    elif declared_bytes:
        flaw = f"{_percent(len(content) / declared_bytes)} of the bytes arrived, no row could be read"
    else:
        flaw = "0 % of the rows could be read"
    raise TruncatedImageError(f"{flaw}; the end of the {format_} file is missing: upload it again") from error


def _read_partly(content: bytes, format_: str, rules: Rules) -> Decoded | None:
    """What can be read of a cut-off file, or None if that is nothing."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        image = Image.open(io.BytesIO(content), formats=[format_])
        is_interlaced = bool(image.info.get("interlace")) or _is_interlaced_gif(image)
        is_coarse = is_interlaced or "progressive" in image.info
        size = getattr(image, "_tile_size", image.size)  # of a TIFF, before it is turned
        image.im = Image.new(image.mode, size, (UNREAD,) * len(image.getbands())).im
        image.load()
        rows_read = _count_rows_read(image, is_interlaced) / image.height
        if rows_read == 0:
            return None
        flaw = f"{_percent(rows_read)} of the rows could be read"
        if is_coarse:
            flaw += ", and those only coarsely"
        return _finish(image, format_, rules, 1, None if rows_read == 1 and not is_coarse else flaw)
    except Exception:  # not even that
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _is_interlaced_gif(image: ImageFile.ImageFile) -> bool:
    arguments = image.tile[0].args  # of the decoder: bits, whether interlaced, the clear colour
    return image.format == "GIF" and isinstance(arguments, tuple) and bool(arguments[1])


def _count_rows_read(image: Image.Image, is_interlaced: bool) -> int:
    """The number of rows whose right end was drawn, from the top on, or from the bottom as in BMP."""
    right_end = np.asarray(image.crop((max(0, image.width - 8), 0, image.width, image.height)))
    pixels = right_end.reshape(image.height, -1).astype(int)
    drawn = np.flatnonzero((abs(pixels - UNREAD) > 1).any(axis=1))  # 127 where libjpeg's CMYK is turned over
    if len(drawn) == 0 or is_interlaced:
        return len(drawn)
    return int(drawn[-1]) + 1 if drawn[0] == 0 else image.height - int(drawn[0])


def _percent(share: float) -> str:
    return f"{int(share * 100)} %"  # rounded down: what is cut off is never "100 %"


# ---- from decoded pixels to an upright sRGB image


def _read_exif(image: Image.Image) -> tuple[int, dict[str, str | None]]:
    """The orientation (1..8), and the texts kept."""
    try:
        exif = image.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        texts = {
            "camera": _clean(exif.get(ExifTags.Base.Model), 40),
            "artist": _clean(exif.get(ExifTags.Base.Artist), 200),
            "copyright": _clean(exif.get(ExifTags.Base.Copyright), 200),
        }
        taken = _clean(details.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime), 40)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF is decoration: however broken it is, the picture is not
        return 1, {}
    digits = (taken or "")[:10].replace(":", "-")
    texts["taken_on"] = digits if digits[:4].isdigit() and digits.strip("0-") else None
    return orientation if orientation in TURNS else 1, texts


def _clean(value: object, max_characters: int) -> str | None:
    text = "".join(c for c in value if c.isprintable()).strip()[:max_characters] if isinstance(value, str) else ""
    return text or None


def _scale(image: Image.Image, scale: float) -> Image.Image:
    """The image in a mode that can be filtered, no larger than it was.

    Colours are converted after this, on fewer pixels.
    """
    image = _to_filterable(image)
    if scale == 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _to_filterable(image: Image.Image) -> Image.Image:
    """RGB, RGBA, L, LA, CMYK or LAB of 8 bits a channel; transparency given as a colour becomes a channel."""
    if image.mode.startswith(("I", "F")):
        return _to_eight_bits(image)
    if image.has_transparency_data and image.mode not in ("RGBA", "LA"):
        return image.convert("RGBA")
    if image.mode in ("RGB", "RGBA", "L", "LA", "CMYK", "LAB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits by its upper eight; of 32, which has no agreed white, from its darkest to its lightest."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if isinstance(image, TiffImagePlugin.TiffImageFile) else 16
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    grey = np.nan_to_num(values.astype(np.float32), copy=False, posinf=0, neginf=0)
    grey -= grey.min()
    grey *= 255 / max(grey.max(), np.finfo(np.float32).tiny)
    return Image.fromarray(grey.round(out=grey).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB or RGBA, the colours converted from the profile the image carries, if any."""
    alpha = image.getchannel("A") if "A" in image.getbands() and image.mode != "LAB" else None
    if image.mode in ("RGBA", "LA"):
        image = image.convert(image.mode[:-1])
    if image.mode == "LAB":
        image = _convert_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    elif profile:
        image = _convert_profile(image, profile)
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        image.putalpha(alpha)
    return image


def _convert_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken or unfitting profile: take the numbers as sRGB, as browsers do
        return image
    return converted if converted is not None else image


def _without_attachments(image: Image.Image) -> Image.Image:
    # Encoders write EXIF, XMP, ICC and comments found here into the variant: GPS would leak.
    image.info = {}
    image.getexif().clear()
    return image

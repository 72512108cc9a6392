"""From untrusted bytes to an upright sRGB image without metadata, or an error that says why not."""

import io
import warnings
from dataclasses import dataclass

import pillow_avif  # noqa: F401  (registers the AVIF codec)
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from imagepipeline.errors import TooLargeError, UnreadableImageError, UnsupportedFormatError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
MAX_BYTES = 25_000_000
MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 16_383  # WebP can encode no more
SRGB = ImageCms.createProfile("sRGB")

# Pillow raises only at twice this number; between once and twice it warns, so the warning becomes an error below.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


@dataclass(frozen=True)
class Decoded:
    """An image ready to be drawn from: upright, sRGB, mode RGB or RGBA, nothing attached.

    `camera` and `taken_on` (YYYY-MM-DD) are what EXIF said, cut to 40 printable characters.
    """

    image: Image.Image
    format: str
    camera: str | None
    taken_on: str | None


def decode(content: bytes) -> Decoded:
    """Decodes an original in full; of an animation, the first frame.

    Raises:
        TooLargeError: more than MAX_BYTES, MAX_PIXELS or MAX_SIDE_PX; told from the header, before decoding.
        UnsupportedFormatError: of no format in FORMATS, whatever the file name says.
        UnreadableImageError: empty, cut off or damaged.
    """
    if not content:
        raise UnreadableImageError("the original is empty (0 bytes)")
    if len(content) > MAX_BYTES:
        raise TooLargeError(f"the original has {len(content):,} bytes, the limit is {MAX_BYTES:,}")
    image = _open(content)
    if max(image.size) > MAX_SIDE_PX:
        raise TooLargeError(f"the original is {image.width} x {image.height} px, the longest side may be {MAX_SIDE_PX}")
    format_ = image.format or "unknown"
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UnreadableImageError(f"the {format_} data is cut off or damaged: {error}") from error
    camera, taken_on = _read_exif(image)
    upright = ImageOps.exif_transpose(image)
    return Decoded(_without_attachments(_to_srgb(upright)), format_, camera, taken_on)


def _open(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise TooLargeError(f"the original has more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        accepted = ", ".join(FORMATS)
        raise UnsupportedFormatError(f"the original is no image of an accepted format ({accepted})") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UnreadableImageError(f"the header of the original is damaged: {error}") from error


def _read_exif(image: Image.Image) -> tuple[str | None, str | None]:
    try:
        exif = image.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        camera = _clean(exif.get(ExifTags.Base.Model))
        taken = _clean(details.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime))
    except Exception:  # EXIF is decoration: however broken it is, the picture is not
        return None, None
    digits = (taken or "")[:10].replace(":", "-")
    return camera, digits if digits[:4].isdigit() and digits.strip("0-") else None


def _clean(value: object) -> str | None:
    text = "".join(c for c in value if c.isprintable()).strip()[:40] if isinstance(value, str) else ""
    return text or None


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image in RGB or RGBA, its colours converted from the profile it carries, if any."""
    has_alpha = image.has_transparency_data
    profile = image.info.get("icc_profile")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        image = image.point(lambda value: value / 256, "F").convert("L")  # Pillow would clip at 255 instead
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _convert_profile(image, profile)
    image = image.convert("RGB")
    if alpha is not None:
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

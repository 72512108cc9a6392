"""Finds the pixels that a decoder has not written, and so the missing parts of a picture.

Pillow decodes the picture onto a background of one colour, and if that may show through, again onto
a background of another. A pixel that shows both backgrounds was not written. This works for
pictures of any colours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from imagepipeline.errors import TruncatedImageError, UnreadableImageError
from imagepipeline.imaging.complaints import capture

# The two backgrounds, by mode.
BACKGROUNDS: dict[str, tuple[float, float]] = {
    "1": (0, 255),
    "I;16": (42_405, 23_130),
    "F": (-1.2345e30, 5.4321e30),
}
BYTE_BACKGROUNDS = (165, 90)  # for all other modes
GREY = 128  # replaces missing pixels
ABOUT_TAGS = re.compile(r"warning|Field|Directory|Tag\b", re.IGNORECASE)  # not about pixels
EDGE_PX = 8  # width of the right edge, which decoders write last and which is checked first


@dataclass(frozen=True)
class Drawn:
    """A decoded image.

    Attributes:
        image: in its stored mode.
        missing: mask of the pixels that were not drawn; None if none are missing.
        flaw: what is wrong with the picture, in words; None if nothing is.
    """

    image: Image.Image
    missing: NDArray[np.bool_] | None = None
    flaw: str | None = None


def draw(
    open_image: Callable[[], ImageFile.ImageFile],
    format_: str,
    is_cut: bool,
    is_interlaced: bool,
    is_part_kept: bool,
) -> Drawn:
    """Decodes an image with Pillow, and finds the pixels that are missing.

    Args:
        open_image: opens the image anew; called up to three times.
        format_: name of the format, for messages.
        is_cut: the file ends early, according to its structure.
        is_interlaced: missing pixels are spread over the picture.
        is_part_kept: return a picture with missing pixels, instead of raising.

    Raises:
        MemoryError: a codec needed too much memory.
        TruncatedImageError: pixels are missing and the file ends early.
        UnreadableImageError: pixels are missing and the file does not end early, or no pixel could
            be read, or libtiff reported damage.
    """
    error: Exception | None = None
    wrong: str | None = None
    try:
        with capture() as lines:
            image = _load(open_image(), 0)
        texts = (clean(line, 100) for line in lines if not ABOUT_TAGS.search(line))
        complaints = [text for text in texts if text]
        if complaints and not is_part_kept:
            raise UnreadableImageError(f"the {format_} data is damaged: {complaints[0]}")
        wrong = f"some of the picture is wrong: {complaints[0]}" if complaints else None
        if not _may_be_missing(image):
            return Drawn(image, flaw=wrong)
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as one:  # decoders raise errors of any type
        error = one
        if "memory" in str(one).lower():  # as codecs report it
            raise MemoryError from one
    first, second = _load_partly(open_image, 0), _load_partly(open_image, 1)
    if first is None or second is None:
        raise _explain(format_, is_cut, "no row could be read") from error
    missing = _is_background(first, 0) & _is_background(second, 1)
    if not missing.any():
        return Drawn(first, flaw=wrong)
    if missing.all():
        raise _explain(format_, is_cut, "no row could be read") from error
    if is_interlaced:
        flaw = f"{percent(1 - missing.mean())} of the pixels could be read, all over the picture"
    else:
        flaw = f"{percent(1 - missing.any(axis=1).mean())} of the rows could be read"
    if not is_part_kept:
        raise _explain(format_, is_cut, flaw) from error
    return Drawn(first, missing, flaw)


def percent(share: float) -> str:
    """Formats a share, rounded down, so that an incomplete picture never has "100 %"."""
    return f"{int(share * 100)} %"


def _explain(format_: str, is_cut: bool, flaw: str) -> Exception:
    if is_cut:
        return TruncatedImageError(
            f"{flaw}; the end of the {format_} file is missing: upload it again"
        )
    return UnreadableImageError(f"the {format_} data is damaged: {flaw}")


def clean(value: object, max_characters: int) -> str | None:
    """Returns the printable characters of a text; None if there are none or it is not a text."""
    if not isinstance(value, str):
        return None
    return "".join(c for c in value if c.isprintable()).strip()[:max_characters] or None


def fill(image: Image.Image, missing: NDArray[np.bool_]) -> Image.Image:
    """Replaces the missing pixels of an image by grey; its mode must have 8 bits a channel."""
    color: tuple[int, ...] = (GREY,) * len(image.getbands())
    if image.mode in ("RGBA", "LA"):
        color = (*color[:-1], 255)
    elif image.mode == "CMYK":
        color = (0, 0, 0, 255 - GREY)
    elif image.mode == "LAB":
        color = (GREY, 0, 0)
    image.paste(color, mask=Image.fromarray((missing * 255).astype(np.uint8)))
    return image


def _load(image: ImageFile.ImageFile, background: int) -> ImageFile.ImageFile:
    size = getattr(image, "_tile_size", image.size)  # of a TIFF, before its orientation is applied
    value = BACKGROUNDS.get(image.mode, BYTE_BACKGROUNDS)[background]
    count = len(image.getbands())
    image.im = Image.new(image.mode, size, value if count == 1 else (int(value),) * count).im
    image.load()
    return image


def _load_partly(
    open_image: Callable[[], ImageFile.ImageFile], background: int
) -> Image.Image | None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return _load(open_image(), background)
    except MemoryError:
        raise
    except Exception:  # decoders raise errors of any type
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _may_be_missing(image: Image.Image) -> bool:
    edge = image.crop((max(0, image.width - EDGE_PX), 0, image.width, image.height))
    return bool(_is_background(edge, 0).all(axis=1).any())


def _is_background(image: Image.Image, background: int) -> NDArray[np.bool_]:
    value = BACKGROUNDS.get(image.mode, BYTE_BACKGROUNDS)[background]
    pixels = np.asarray(image)
    if image.mode == "1":
        return np.asarray(pixels == bool(value))
    is_equal = pixels == pixels.dtype.type(value)
    return np.asarray(is_equal if is_equal.ndim == 2 else is_equal.all(axis=2))

"""Which pixels a decoder has drawn: the one thing that tells a whole picture from a part, whatever its colours are."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from imagepipeline.errors import TruncatedImageError, UnreadableImageError

# Two grounds to draw on, by mode: a pixel that shows the first on the first and the second on the second was not drawn.
GROUNDS: dict[str, tuple[float, float]] = {
    "1": (0, 255),
    "I;16": (42_405, 23_130),
    "F": (-1.2345e30, 5.4321e30),
}
BYTE_GROUNDS = (165, 90)
GREY = 128  # where nothing could be read
ABOUT_TAGS = re.compile(
    r"warning|Field|Directory|Tag\b", re.IGNORECASE
)  # what libtiff says of anything but pixels
EDGE_PX = 8  # what is looked at first: the right end of each row, which a decoder draws last


@dataclass(frozen=True)
class Drawn:
    """An image in its stored mode. `missing` says, pixel by pixel, what was not drawn; None if nothing is missing."""

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
    """Has Pillow decode an image in full.

    `is_cut` says that the file ends early, as its structure tells; `is_part_kept` that an image of which a part is
    missing is wanted all the same.

    Raises:
        MemoryError: a codec asked for too much.
        TruncatedImageError: the file ends early and pixels are missing.
        UnreadableImageError: pixels are missing and the file does not end early.
    """
    error: Exception | None = None
    try:
        with hear_libtiff() as complaints:
            image = _load(open_image(), 0)
        if complaints and not is_part_kept:
            raise UnreadableImageError(f"the {format_} data is damaged: {complaints[0]}")
        if not _may_be_missing(image):
            return Drawn(
                image, flaw=f"some of the picture is wrong: {complaints[0]}" if complaints else None
            )
    except UnreadableImageError:
        raise
    except Exception as one:  # decoders raise whatever they stumble over
        error = one
        if "memory" in str(one).lower():  # how codecs put it
            raise MemoryError from one
    first, second = _load_partly(open_image, 0), _load_partly(open_image, 1)
    if first is None or second is None:
        raise _explain(format_, is_cut, "no row could be read") from error
    missing = _is_ground(first, 0) & _is_ground(second, 1)
    if not missing.any():
        return Drawn(first)
    if missing.all():
        raise _explain(format_, is_cut, "no row could be read") from error
    if is_interlaced:
        flaw = f"{percent(1 - missing.mean())} of the pixels could be read, all over the picture"
    else:
        flaw = f"{percent(1 - missing.any(axis=1).mean())} of the rows could be read"
    if not is_part_kept:
        raise _explain(format_, is_cut, flaw) from error
    return Drawn(first, missing, flaw)


@contextmanager
def hear_libtiff() -> Iterator[list[str]]:
    """What libtiff complains of meanwhile, known at the end: it tells standard error alone, and goes on."""
    complaints: list[str] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield complaints
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            heard.seek(0)
            lines = heard.read(4096).decode(errors="replace").splitlines()
            texts = (clean(line, 100) for line in lines if not ABOUT_TAGS.search(line))
            complaints += [text for text in texts if text]


def percent(share: float) -> str:
    """A share in words, rounded down: what is incomplete is never "100 %"."""
    return f"{int(share * 100)} %"


def _explain(format_: str, is_cut: bool, flaw: str) -> Exception:
    if is_cut:
        return TruncatedImageError(
            f"{flaw}; the end of the {format_} file is missing: upload it again"
        )
    return UnreadableImageError(f"the {format_} data is damaged: {flaw}")


def clean(value: object, max_characters: int) -> str | None:
    """The printable characters of a text; None if it is none or has none."""
    text = (
        "".join(c for c in value if c.isprintable()).strip()[:max_characters]
        if isinstance(value, str)
        else ""
    )
    return text or None


def fill(image: Image.Image, missing: NDArray[np.bool_]) -> Image.Image:
    """The image, in a mode of 8 bits a channel, with grey where it is missing."""
    color: tuple[int, ...] = (GREY,) * len(image.getbands())
    if image.mode in ("RGBA", "LA"):
        color = (*color[:-1], 255)
    elif image.mode == "CMYK":
        color = (0, 0, 0, 255 - GREY)
    elif image.mode == "LAB":
        color = (GREY, 0, 0)
    image.paste(color, mask=Image.fromarray((missing * 255).astype(np.uint8)))
    return image


def _load(image: ImageFile.ImageFile, ground: int) -> ImageFile.ImageFile:
    size = getattr(image, "_tile_size", image.size)  # of a TIFF, before it is turned
    value = GROUNDS.get(image.mode, BYTE_GROUNDS)[ground]
    count = len(image.getbands())
    image.im = Image.new(image.mode, size, value if count == 1 else (int(value),) * count).im
    image.load()
    return image


def _load_partly(open_image: Callable[[], ImageFile.ImageFile], ground: int) -> Image.Image | None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return _load(open_image(), ground)
    except Exception:  # not even that
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _may_be_missing(image: Image.Image) -> bool:
    edge = image.crop((max(0, image.width - EDGE_PX), 0, image.width, image.height))
    return bool(_is_ground(edge, 0).all(axis=1).any())


def _is_ground(image: Image.Image, ground: int) -> NDArray[np.bool_]:
    value = GROUNDS.get(image.mode, BYTE_GROUNDS)[ground]
    pixels = np.asarray(image)
    if image.mode == "1":
        return np.asarray(pixels == bool(value))
    is_equal = pixels == pixels.dtype.type(value)
    return np.asarray(is_equal if is_equal.ndim == 2 else is_equal.all(axis=2))

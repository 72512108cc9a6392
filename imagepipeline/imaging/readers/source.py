"""What all readers share: an original whose header is in order, and its errors in words."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Imported one by one. Otherwise Pillow imports all its 43 readers, some of which run programs.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from imagepipeline.errors import (
    LimitError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedFormatError,
)
from imagepipeline.imaging.color import STRIP_ROWS, ColorSpace
from imagepipeline.imaging.drawing import Drawn, clean, fill, percent

EXPORT_ADVICE = "export it as PNG"


@dataclass(frozen=True)
class Picture:
    """A decoded picture, in the orientation and the colours in which it is stored.

    Attributes:
        image: in mode L, LA, RGB, RGBA, CMYK or LAB, with 8 bits a channel.
        duration_ms: how long it is shown, if it is a frame of an animation.
        flaw: what is missing or wrong, in words; None if nothing is.
        extent: how many columns and rows show the picture, if of the last ones only a part does.
    """

    image: Image.Image
    duration_ms: int = 0
    flaw: str | None = None
    extent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Source:
    """An original whose header is valid and within the limits, but not decoded yet.

    Attributes:
        width: pixels, before the orientation is applied.
        height: pixels, before the orientation is applied.
        load: decodes the picture, or the frames of a kept animation. Its argument says whether
            the picture must be rotated by 90 or 270 degrees.
        space: colour space.
        exif: EXIF, empty if there is none.
        orientation: how the caller must turn the picture, as in EXIF (1..8).
        count_plays: returns how often an animation is shown, 0 for ever; call it after `load`.
    """

    width: int
    height: int
    load: Callable[[bool], Iterator[Picture]]
    space: ColorSpace = field(default_factory=ColorSpace)
    exif: Image.Exif = field(default_factory=Image.Exif)
    orientation: int = 1
    count_plays: Callable[[], int] = lambda: 0


def miss_start(format_: str) -> TruncatedImageError:
    """The error of a file that ends before its first row."""
    return TruncatedImageError(
        f"no row could be read; the end of the {format_} file is missing: upload it again"
    )


def miss_end(format_: str, arrived: int, declared: int) -> TruncatedImageError:
    """The error of a file of which fewer bytes arrived than it declares, and no row was read."""
    share = percent(arrived / declared)
    return TruncatedImageError(
        f"{share} of the bytes arrived, no row could be read; "
        f"the end of the {format_} file is missing: upload it again"
    )


def explain(format_: str, error: Exception) -> Exception:
    """Translates an error of a decoder into one of ours, or a MemoryError."""
    text = clean(str(error), 200) or type(error).__name__
    if "security limit" in text.lower():  # of libheif: a broken header, or a huge picture
        return LimitError(f"the {format_} file exceeds a limit of its decoder: {text}")
    if "memory" in text.lower():  # as codecs report it
        return MemoryError(text)
    if "not implemented" in text.lower() or "unsupported" in text.lower():
        kind = f"of a kind of {format_} that cannot be read here"
        return UnsupportedFormatError(
            f"the original is {kind} ({text[:120]}): export it as JPEG or PNG"
        )
    return UnreadableImageError(f"the {format_} data is damaged: {text[:120]}")


def open_image(content: bytes, format_: str) -> ImageFile.ImageFile:
    """Has Pillow read the header; raises what its plugin for the format raises."""
    return Image.open(io.BytesIO(content), formats=[format_])


def to_eight_bits(values: NDArray[np.uint16], bits: int = 16) -> NDArray[np.uint8]:
    """Reduces samples of that many bits, at most 16, to eight, rounded."""
    steps = 2**bits - 1
    table = (np.arange(steps + 1, dtype=np.uint32) * 255 + steps // 2) // steps
    reduced: NDArray[np.uint8] = table.astype(np.uint8)[values]
    return reduced


def join_bytes(upper: Image.Image, lower: Image.Image, table: NDArray[np.uint8]) -> Image.Image:
    """Reduces RGB or RGBA of 16 bits, given as two images of bytes, by a table; alpha is not.

    It works in strips, and in the first image, because a third one would be as large as they are.
    """
    for top in range(0, upper.height, STRIP_ROWS):
        box = 0, top, upper.width, min(top + STRIP_ROWS, upper.height)
        pixels = np.array(upper.crop(box))
        values = pixels[..., :3].astype(np.uint16) << 8 | np.asarray(lower.crop(box))[..., :3]
        pixels[..., :3] = table[values]
        upper.paste(Image.fromarray(pixels), box)
    return upper


def to_picture(drawn: Drawn, duration_ms: int = 0) -> Picture:
    """Converts a drawn image to one of the modes of `Picture`.

    Raises:
        UnsupportedFormatError: it is grey of 32 bits or floats, whose white only its reader knows.
    """
    image = drawn.image
    if image.mode.startswith("I;16"):  # Pillow would clip it: all above 255 would be white
        image = Image.fromarray(to_eight_bits(np.asarray(image)))
    elif image.mode in ("I", "F"):
        raise UnsupportedFormatError(
            f"the original is grey of 32 bits, which cannot be read here: {EXPORT_ADVICE}"
        )
    if image.has_transparency_data and image.mode not in ("RGBA", "LA"):
        image = image.convert("RGBA")
    elif image.mode not in ("RGB", "RGBA", "L", "LA", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if drawn.missing is not None:
        image = fill(image.copy(), drawn.missing)
    return Picture(image, duration_ms, drawn.flaw)


def load_frames(image: ImageFile.ImageFile, frame_count: int) -> Iterator[Picture]:
    """Decodes the first frames of an animation, or the one picture of a still file."""
    for index in range(frame_count):
        if index:
            image.seek(index)
        image.load()
        yield to_picture(
            Drawn(image.copy() if frame_count > 1 else image), int(image.info.get("duration") or 0)
        )

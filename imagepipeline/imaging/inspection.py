"""Inspects finished variants: do they decode, are they free of metadata, do they look right?"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.formats import identify

BLOCK_PX = 8
# Width at which larger variants are compared. Encoder damage still shows at this size.
COMPARED_PX = 640
ALLOWED_TAGS = {ExifTags.Base.Artist, ExifTags.Base.Copyright}


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting one stored variant.

    Attributes:
        fault: why it cannot be decoded; the other attributes are then empty.
        format: format in lower case.
        width: pixels.
        height: pixels.
        attachments: kinds of metadata found beside the pixels.
        similarity: structural similarity to the scaled original (-1..1), 1 for equal pixels.
    """

    fault: str | None = None
    format: str = ""
    width: int = 0
    height: int = 0
    attachments: tuple[str, ...] = ()
    similarity: float = 0.0


def inspect(original: Decoded, contents: Sequence[bytes]) -> list[Inspection]:
    """Decodes stored variants and compares each with the original."""
    luma = _to_luma(original.image)
    references: dict[tuple[int, int], Image.Image] = {}
    return [_inspect(content, luma, references) for content in contents]


def _inspect(
    content: bytes, original: Image.Image, references: dict[tuple[int, int], Image.Image]
) -> Inspection:
    try:
        format_ = identify(content)
        image = Image.open(io.BytesIO(content), formats=[format_])
        image.load()
    except Exception as error:  # decoders raise errors of any type
        return Inspection(fault=" ".join(str(error).split())[:200] or type(error).__name__)
    size = image.size
    if image.width > COMPARED_PX:
        size = COMPARED_PX, max(1, round(image.height * COMPARED_PX / image.width))
    if size not in references:
        references[size] = original.resize(size, Image.Resampling.LANCZOS, reducing_gap=1.0)
    luma = _to_luma(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=1.0)
    return Inspection(
        None,
        format_.lower(),
        *image.size,
        _list_attachments(image),
        compare(references[size], luma),
    )


def _list_attachments(image: Image.Image) -> tuple[str, ...]:
    found = [name for name in ("icc_profile", "xmp", "comment") if image.info.get(name)]
    exif = image.getexif()
    is_allowed = set(exif) <= ALLOWED_TAGS
    return tuple(found if is_allowed else [*found, "exif"])


def compare(reference: Image.Image, image: Image.Image) -> float:
    """Returns the mean structural similarity (-1..1) of two greyscale images of the same size.

    See Wang et al., "Image quality assessment: from error visibility to structural similarity"
    (2004), equation 13. We use adjacent blocks of 8 x 8 px instead of a sliding window.
    """
    a, b = _blocks(reference), _blocks(image)
    mean_a, mean_b = a.mean(axis=1), b.mean(axis=1)
    covariance = (a * b).mean(axis=1) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (a.var(axis=1) + b.var(axis=1) + c2)
    return float((luminance * structure).mean())


def _to_luma(image: Image.Image) -> Image.Image:
    """Converts an image to greyscale, on a white background if it is transparent."""
    image = image.convert("RGBA") if image.has_transparency_data else image
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


def _blocks(image: Image.Image) -> NDArray[np.float32]:
    """Splits a greyscale image into blocks [n, 64], padded by repeating its last row and column."""
    luma = np.asarray(image, dtype=np.float32)
    luma = np.pad(luma, [(0, -length % BLOCK_PX) for length in luma.shape], mode="edge")
    rows, columns = (length // BLOCK_PX for length in luma.shape)
    return (
        luma.reshape(rows, BLOCK_PX, columns, BLOCK_PX)
        .swapaxes(1, 2)
        .reshape(rows * columns, BLOCK_PX**2)
    )

"""Inspects finished variants: does each one open, is it clean, does it look like its original?"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from imagepipeline.imaging.cropping import Box, find_region
from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.scaling import put_on_white, resize
from imagepipeline.models import VariantSpec
from imagepipeline.output_formats import OUTPUT_FORMATS

References = dict[tuple[Box, tuple[int, int]], Image.Image]  # by region and size
BLOCK_PX = 8
# Width at which larger variants are compared. Encoder damage still shows at this size.
COMPARED_PX = 640
NAMES = {one.encoder: one.name for one in OUTPUT_FORMATS.values()}
ALLOWED_TAGS = {ExifTags.Base.Artist, ExifTags.Base.Copyright}


@dataclass(frozen=True)
class Inspection:
    """What one stored variant is. `fault` says why it cannot be read; the rest is then empty.

    `attachments` names what it contains beside pixels. `similarity` to the scaled original is 1 for
    equal pixels, None if the pixels were not compared.
    """

    fault: str | None = None
    format: str = ""
    width: int = 0
    height: int = 0
    attachments: tuple[str, ...] = ()
    similarity: float | None = None


def choose_compared(specs: Sequence[VariantSpec | None]) -> list[int]:
    """The positions of the smallest variant of each format: the cheapest look that sees them all.

    Each width is scaled down from the next larger one, so wrong pixels of any width are in the
    smallest, too; and each format has its own encoder.
    """
    smallest: dict[str, tuple[int, int]] = {}  # width and position, by format
    for position, spec in enumerate(specs):
        if spec is not None:
            candidate = spec.width_px, position
            smallest[spec.format] = min(smallest.get(spec.format, candidate), candidate)
    return sorted(position for _, position in smallest.values())


def inspect(
    original: Decoded,
    contents: Sequence[bytes],
    specs: Sequence[VariantSpec | None],
    compared: Sequence[int] | None = None,
) -> list[Inspection]:
    """Reads the headers of stored variants, and compares the pixels of some with the original.

    `compared` holds the positions of those; None compares all that have a spec, which says what
    part of the original they show.
    """
    references: References = {}
    return [
        _inspect(
            content,
            original,
            references,
            spec if compared is None or position in compared else None,
        )
        for position, (content, spec) in enumerate(zip(contents, specs, strict=True))
    ]


def _inspect(
    content: bytes,
    original: Decoded,
    references: References,
    spec: VariantSpec | None,
) -> Inspection:
    try:
        image = Image.open(io.BytesIO(content), formats=list(NAMES))
        similarity = _measure_similarity(image, original, references, spec) if spec else None
    except Exception as error:  # decoders raise all kinds of errors
        return Inspection(fault=" ".join(str(error).split())[:200] or type(error).__name__)
    name = NAMES[str(image.format)]
    return Inspection(None, name, *image.size, _list_attachments(image), similarity)


def _measure_similarity(
    image: Image.Image, original: Decoded, references: References, spec: VariantSpec
) -> float:
    image.load()
    size = image.size
    if image.width > COMPARED_PX:
        size = COMPARED_PX, max(1, round(image.height * COMPARED_PX / image.width))
    region = find_region(original.image, spec)
    if (region, size) not in references:
        part = original.image.crop(region)
        references[region, size] = resize(_to_luma(part), size)
    return compare(references[region, size], resize(_to_luma(image), size))


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
    return put_on_white(image).convert("L")


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

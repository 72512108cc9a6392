"""The formats variants are written in: one record each, and nothing about them anywhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from imagepipeline.headers import measure_avif, measure_jpeg, measure_png, measure_webp

DEFAULT_QUALITY = 80


@dataclass(frozen=True)
class OutputFormat:
    """One format of variants.

    Attributes:
        name: the word in settings and catalogue, of at most 8 characters.
        suffix: of its files, without the dot; no other format has it.
        mime_type: the content type a browser is told.
        encoder: Pillow's name of it.
        encoder_options: what Pillow's encoder is given beside the quality; see
            docs/decisions/0003-encoder-settings.md for how they were chosen.
        default_quality: 1 to 100, on a scale of its own; None if it is lossless.
        measure: reads width and height from a file's header, to check what the confined encoder
            says; see `headers`.
        has_alpha: whether it can be transparent; if not, variants are put on white.
        is_animated: whether it can be animated; if not, variants show the first frame.
    """

    name: str
    suffix: str
    mime_type: str
    encoder: str
    encoder_options: Mapping[str, object] = field(hash=False)
    default_quality: int | None
    measure: Callable[[bytes], tuple[int, int]]
    has_alpha: bool = True
    is_animated: bool = False


WEBP = OutputFormat(
    "webp",
    "webp",
    "image/webp",
    "WEBP",
    {"method": 2},
    DEFAULT_QUALITY,
    measure_webp,
    is_animated=True,
)
AVIF = OutputFormat(
    "avif",
    "avif",
    "image/avif",
    "AVIF",
    {
        "speed": 9,
        "subsampling": "4:4:4",
        "max_threads": 1,
        "advanced": {"disable-trellis-quant": "1"},
    },
    DEFAULT_QUALITY,
    measure_avif,
    is_animated=True,
)
JPEG = OutputFormat(
    "jpeg",
    "jpg",
    "image/jpeg",
    "JPEG",
    {"optimize": True, "progressive": True},
    DEFAULT_QUALITY,
    measure_jpeg,
    has_alpha=False,
)
PNG = OutputFormat("png", "png", "image/png", "PNG", {}, None, measure_png)
OUTPUT_FORMATS = {format_.name: format_ for format_ in (WEBP, AVIF, JPEG, PNG)}

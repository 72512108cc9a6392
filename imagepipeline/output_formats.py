"""The formats variants are written in: one record each, and nothing about them anywhere else.

A further format needs a record here, a quality setting in `settings`, and a function in
`imaging.headers` that reads its width and height.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OutputFormat:
    """One format of variants.

    Attributes:
        name: the files' suffix without the dot, Pillow's name, and the word in the catalogue.
        mime_type: the content type a browser is told.
        default_quality: 1 to 100; the scales of two formats cannot be compared.
        encoder_options: what Pillow's encoder is given beside the quality; see
            docs/decisions/0003-encoder-settings.md for how they were chosen.
    """

    name: str
    mime_type: str
    default_quality: int
    encoder_options: Mapping[str, object] = field(hash=False)


WEBP = OutputFormat("webp", "image/webp", 80, {"method": 2})
AVIF = OutputFormat(
    "avif",
    "image/avif",
    80,
    {
        "speed": 9,
        "subsampling": "4:4:4",
        "max_threads": 1,
        "advanced": {"disable-trellis-quant": "1"},
    },
)
OUTPUT_FORMATS = {format_.name: format_ for format_ in (WEBP, AVIF)}

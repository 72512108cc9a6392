"""Measures pixels: dominant colours and their names, brightness, contrast, saturation, warmth."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.models import ImageMetadata, PixelFacts

SAMPLE_PX = 128
PALETTE_COLORS = 16
# CIE76 distance, twice that between two shades of one name. Models are loose about colours, but do
# not confuse red and blue, which are more than 100 apart.
MAX_COLOR_DISTANCE = 40
# Thirty names in common use. With the 148 of CSS, most photos would be "dimgray".
COLOR_NAMES = {
    "black": "#0b0b0b",
    "charcoal": "#36393d",
    "grey": "#808080",
    "silver": "#c0c0c0",
    "white": "#fafafa",
    "brown": "#6b4423",
    "sienna": "#a0522d",
    "tan": "#d2b48c",
    "beige": "#ece2c6",
    "maroon": "#7b1f24",
    "red": "#d62828",
    "coral": "#ff7f50",
    "orange": "#f28c28",
    "gold": "#e0b020",
    "yellow": "#ffe94a",
    "olive": "#6f7330",
    "lime": "#9bd62f",
    "green": "#2e8b3d",
    "dark green": "#1f4028",
    "mint": "#a8e0c0",
    "teal": "#1f8080",
    "turquoise": "#40d0c8",
    "sky blue": "#87b8e0",
    "blue": "#2f5fd0",
    "steel blue": "#557a9e",
    "navy": "#1b2a55",
    "lavender": "#c0b0e0",
    "purple": "#7a3fa0",
    "magenta": "#d040a8",
    "pink": "#f4b0c0",
}


def measure(decoded: Decoded, image: Image.Image) -> PixelFacts:
    """Measures a decoded image.

    Args:
        decoded: the original; the source of the size, the camera and the date.
        image: a copy of it in any size; the source of the colours. Transparent pixels are
            measured on a white background.
    """
    sample = image.copy()
    sample.thumbnail((SAMPLE_PX, SAMPLE_PX), Image.Resampling.BOX)
    if sample.mode == "RGBA":
        white = Image.new("RGBA", sample.size, "white")
        sample = Image.alpha_composite(white, sample).convert("RGB")
    lab = to_lab(np.asarray(sample).reshape(-1, 3))
    palette = sample.quantize(PALETTE_COLORS, Image.Quantize.MEDIANCUT).getpalette() or []
    return PixelFacts(
        width=decoded.width,
        height=decoded.height,
        colors=_dominant_colors(sample),
        brightness=float(lab[:, 0].mean()),
        contrast=float(lab[:, 0].std()),
        saturation=float(np.hypot(lab[:, 1], lab[:, 2]).mean()),
        warmth=float(lab[:, 2].mean()),
        palette=tuple(
            dict.fromkeys(
                "#" + bytes(palette[at : at + 3]).hex() for at in range(0, len(palette), 3)
            )
        ),
        camera=decoded.camera,
        taken_on=decoded.taken_on,
    )


def with_visible_colors(metadata: ImageMetadata, facts: PixelFacts) -> ImageMetadata:
    """Returns metadata without the dominant colours that do not occur in the image."""
    colors = choose_visible(metadata.dominant_colors, facts)
    return metadata.model_copy(update={"dominant_colors": colors})


def choose_visible(colors: Iterable[str], facts: PixelFacts) -> list[str]:
    """Returns those of the given `#rrggbb` colours that occur in the image, or nearly so.

    Returns the image's dominant colours if none does.
    """
    seen = to_lab(_to_rgb(facts.palette))
    visible = [
        color
        for color in colors
        if np.linalg.norm(seen - to_lab(_to_rgb([color])), axis=1).min() <= MAX_COLOR_DISTANCE
    ]
    return visible or [value for _, value, _ in facts.colors]


def _to_rgb(colors: Iterable[str]) -> NDArray[np.uint8]:
    return np.array([list(bytes.fromhex(color[1:])) for color in colors], dtype=np.uint8)


def to_lab(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Converts sRGB bytes [n, 3] to CIE L*a*b* with white point D65 [n, 3].

    The transfer curve and the matrix are from IEC 61966-2-1, L*a*b* from CIE 15.
    """
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array(
        [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    )
    ratio = xyz / np.array([0.9505, 1.0, 1.089])
    curve = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve[:, 0], curve[:, 1], curve[:, 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _dominant_colors(sample: Image.Image) -> tuple[tuple[str, str, float], ...]:
    """Returns the name, `#rrggbb` and share (0..1) of up to four colours, the most common first.

    Median cut finds eight colours; those with the same name are merged.
    """
    quantized = sample.quantize(8, Image.Quantize.MEDIANCUT)
    palette = np.array(quantized.getpalette(), dtype=np.uint8).reshape(-1, 3)
    counts = np.bincount(np.asarray(quantized).ravel(), minlength=len(palette))[: len(palette)]
    shares: dict[str, float] = {}
    sums: dict[str, NDArray[np.float64]] = {}
    for name, rgb, count in zip(_names(palette), palette, counts, strict=True):
        share = float(count / counts.sum())
        shares[name] = shares.get(name, 0.0) + share
        sums[name] = sums.get(name, np.zeros(3)) + rgb * share
    largest = sorted(
        (name for name in shares if shares[name] >= 0.05), key=lambda name: -shares[name]
    )[:4]
    return tuple(
        (name, _hex(sums[name] / shares[name]), round(shares[name], 3)) for name in largest
    )


def _names(palette: NDArray[np.uint8]) -> list[str]:
    named = _to_rgb(COLOR_NAMES.values())
    distance = np.linalg.norm(to_lab(palette)[:, None, :] - to_lab(named)[None, :, :], axis=2)
    return [list(COLOR_NAMES)[index] for index in distance.argmin(axis=1)]


def _hex(rgb: NDArray[np.float64]) -> str:
    return "#" + bytes(round(float(channel)) for channel in rgb).hex()

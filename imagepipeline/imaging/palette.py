"""Facts read off the pixels: dominant colours with names, brightness, contrast, saturation, warmth."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.models import PixelFacts

SAMPLE_PX = 128
PALETTE_COLORS = 16
# In CIE76: twice what parts two shades of one name; models name colours loosely, but not blue for red (over 100).
MAX_COLOR_DISTANCE = 40
# Thirty names people use. The 148 of CSS would call most photos "dimgray".
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
    """The facts of a decoded image, whose colours are read off `image`, a copy of any size; alpha counts as white."""
    sample = image.copy()
    sample.thumbnail((SAMPLE_PX, SAMPLE_PX), Image.Resampling.BOX)
    if sample.mode == "RGBA":
        sample = Image.alpha_composite(Image.new("RGBA", sample.size, "white"), sample).convert(
            "RGB"
        )
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


def choose_visible(colors: Iterable[str], facts: PixelFacts) -> list[str]:
    """Of some `#rrggbb`, those that are near enough to a colour of the image; its own dominant ones if none is."""
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
    """SRGB bytes [n, 3] as CIE L*a*b* (D65) [n, 3]: IEC 61966-2-1 for the transfer curve and matrix, CIE 15 for Lab."""
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
    """Up to 4 colours by share: median cut to 8 boxes, boxes of the same name merged."""
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

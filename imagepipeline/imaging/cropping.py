"""Chooses the part of an image that a variant shows."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagepipeline.imaging.scaling import resize
from imagepipeline.models import VariantSpec

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
ATTENTION_PX = 32  # attention is measured on a copy of this width and height
# sRGB's primaries and white in CIE XYZ (IEC 61966-2-1), from 0 to 100.
TO_XYZ = 100 * np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
WHITE = TO_XYZ.sum(axis=1)
SKIN = np.array([0.78, 0.57, 0.44])  # the direction of skin's colours in XYZ, from smartcrop.js
DARK = 5.0  # of 100: there, colours mean nothing


def find_region(image: Image.Image, spec: VariantSpec) -> Box:
    """The part of the image that the variant shows: all of it, unless its fit is `cover`."""
    if spec.fit != "cover" or spec.height_px is None:
        return 0, 0, image.width, image.height
    scale = min(image.width / spec.width_px, image.height / spec.height_px)
    width, height = (
        min(limit, max(1, round(side * scale)))
        for side, limit in zip((spec.width_px, spec.height_px), image.size, strict=True)
    )
    if spec.focus == "attention":
        x, y = find_attention(image, (width, height))
    else:
        x, y = (0.5, 0.5) if isinstance(spec.focus, str) else spec.focus
    left = min(max(0, round(x * image.width - width / 2)), image.width - width)
    top = min(max(0, round(y * image.height - height / 2)), image.height - height)
    return left, top, left + width, top + height


def find_attention(image: Image.Image, size: tuple[int, int]) -> tuple[float, float]:
    """The point that draws the most attention, as fractions of width and height.

    Edges, skin and red tones are added up on a small copy and blurred by the size of the part to
    be shown: the method of libvips' `smartcrop` with `attention`, which goes back to smartcrop.js.
    https://github.com/libvips/libvips/blob/master/libvips/conversion/smartcrop.c
    """
    small = resize(image, (ATTENTION_PX, ATTENTION_PX))
    if small.mode == "RGBA":  # what is transparent is dark, and so draws no attention
        small = Image.alpha_composite(Image.new("RGBA", small.size, "black"), small)
    xyz = _to_xyz(np.asarray(small.convert("RGB"), dtype=float) / 255)
    bright = xyz[..., 1]
    padded = np.pad(bright, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    edges = 5 * abs(4 * bright - neighbours)
    direction = xyz / np.maximum(np.linalg.norm(xyz, axis=-1, keepdims=True), 1e-9)
    skin = 100 - 100 * np.linalg.norm(direction - SKIN, axis=-1)
    score = edges + np.where(bright > DARK, skin + _measure_red(xyz), 0)
    shares = (side / whole for side, whole in zip(size, image.size, strict=True))
    sigma = max(1.0, ATTENTION_PX * math.hypot(*shares) / 10)
    row, column = np.unravel_index(np.argmax(_blur(score, sigma)), score.shape)
    return float(column) / ATTENTION_PX, float(row) / ATTENTION_PX


def _to_xyz(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz: NDArray[np.float64] = linear @ TO_XYZ.T
    return xyz


def _measure_red(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """The a* of CIE Lab: how red a colour is, negative if it is green."""
    ratio = xyz / WHITE
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    red: NDArray[np.float64] = 500 * (root[..., 0] - root[..., 1])
    return red


def _blur(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """A Gaussian blur as libvips makes it; at its edges, the image goes on."""
    radius = math.floor(sigma * math.sqrt(2 * math.log(5)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.rint(20 * kernel)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(
            values, [(radius, radius) if axis == one else (0, 0) for one in (0, 1)], mode="edge"
        )
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values

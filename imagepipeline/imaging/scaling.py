"""Resizing with a Lanczos filter, and a background for what is transparent."""

from PIL import Image

try:
    from cykooz_resizer import CropBox, FilterType, ResizeAlg, ResizeOptions, Resizer
except ImportError:  # no wheel for Linux on ARM64
    SIMD_MODES: tuple[str, ...] = ()
else:
    # The same filter as Pillow's, with SIMD instructions: an eighth of the CPU time, and results
    # that differ by rounding (docs/decisions/0003-encoder-settings.md).
    SIMD_MODES = ("L", "RGB", "RGBA", "CMYK")
    LANCZOS = ResizeAlg.convolution(FilterType.lanczos3)
    _resizer = Resizer()


def resize(
    image: Image.Image, size: tuple[int, int], extent: tuple[float, float] | None = None
) -> Image.Image:
    """The image at `size`, width and height in pixels; transparent pixels lend others no colour.

    Args:
        image: in any mode with bytes.
        size: of the result.
        extent: how much of the image to show, from its upper left corner; None for all.
    """
    extent = extent or image.size
    if size == image.size == extent:
        return image
    if image.mode not in SIMD_MODES:
        return image.resize(size, Image.Resampling.LANCZOS, box=(0, 0, *extent))
    resized = Image.new(image.mode, size)
    _resizer.resize_pil(image, resized, ResizeOptions(LANCZOS, crop_box=CropBox(0, 0, *extent)))
    return resized


def put_on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, on white where it is transparent."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

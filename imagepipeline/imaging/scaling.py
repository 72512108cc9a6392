"""Resizing with a Lanczos filter, and what is behind and in transparent pixels."""

from collections.abc import Sequence

from PIL import Image, ImageStat

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

BLOCK_PX, EDGE_ALPHA = 8, 8  # a block of this size is at an edge if its mean alpha is in between


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


def fill_clear(frames: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """The frames, with one colour in all pixels that are wholly transparent.

    Nobody sees it, but an encoder that knows no transparency spends bytes on the edge to it, and
    blurs the edge that is seen. So it is the colour that is most common there in the first frame.
    """
    if frames[0].mode != "RGBA":
        return frames
    blocks = frames[0].reduce(BLOCK_PX)
    alpha = blocks.getchannel("A")
    edge = alpha.point([255 * (EDGE_ALPHA <= value <= 255 - EDGE_ALPHA) for value in range(256)])
    visible = edge if edge.getbbox() else alpha
    color = tuple(int(value) for value in ImageStat.Stat(blocks.convert("RGB"), visible).median)
    filled = []
    for frame in frames:
        clear = frame.getchannel("A").point([255] + [0] * 255)
        filled.append(frame.copy())
        filled[-1].paste((*color, 0), mask=clear)
    return filled

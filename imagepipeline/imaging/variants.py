"""Rendering: the variants of an image, and the small copy the vision model sees."""

import io
from collections.abc import Iterable

from PIL import Image

from imagepipeline.models import Recipe, Variant, VariantSpec

# Speed 9 with 4:4:4 instead of Pillow's default (6, 4:2:0): a sixth to a tenth of the CPU time at equal or
# better SSIMULACRA2 and about 5 % more bytes (docs/decisions/0003-encoder-settings.md).
ENCODER_OPTIONS: dict[str, dict[str, object]] = {
    "webp": {"method": 4},
    "avif": {"speed": 9, "subsampling": "4:4:4", "max_threads": 1},
}


def recipe(specs: Iterable[VariantSpec]) -> Recipe:
    """What makes the variants: Pillow and the specs."""
    return Recipe("local", "pillow", ",".join(f"{spec.width_px}-{spec.format}-{spec.quality}" for spec in specs))


def render(image: Image.Image, specs: Iterable[VariantSpec]) -> list[Variant]:
    """One variant per spec, in the order of `specs`: never enlarged, at least 1 px high, no metadata."""
    by_width: dict[int, Image.Image] = {}
    source = image
    specs = list(specs)
    # From the widest down, each made of the one before: far fewer pixels to filter, and no visible difference
    # as each step has more than enough pixels for the next.
    for width_px in sorted({spec.width_px for spec in specs}, reverse=True):
        source = by_width[width_px] = _scale_to_width(source, width_px)
    return [_encode(by_width[spec.width_px], spec) for spec in specs]


def render_preview(image: Image.Image, long_side_px: int = 1024) -> bytes:
    """A JPEG of at most `long_side_px` for the vision model: fewer tokens, no metadata, alpha over white."""
    preview = image.copy()
    preview.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    if preview.mode == "RGBA":
        preview = Image.alpha_composite(Image.new("RGBA", preview.size, "white"), preview)
    buffer = io.BytesIO()
    preview.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _scale_to_width(image: Image.Image, width_px: int) -> Image.Image:
    if image.width <= width_px:
        return image
    height_px = max(1, round(image.height * width_px / image.width))
    return image.resize((width_px, height_px), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode(image: Image.Image, spec: VariantSpec) -> Variant:
    buffer = io.BytesIO()
    image.save(buffer, spec.format, quality=spec.quality, **ENCODER_OPTIONS[spec.format])
    return Variant(spec, image.width, image.height, buffer.getvalue())

"""Limits on an original, checked against its header before any pixel is decoded."""

from dataclasses import dataclass

from imagepipeline.errors import LimitError
from imagepipeline.models import MAX_SIDE_PX, VariantSpec

MEMORY_BYTES, CPU_SECONDS = 2_000_000_000, 20  # of a process that decodes and encodes one image
# A JPEG is decoded at one to eight eighths of its size. All of its coded data is read even then, so
# it may have at most this many times the pixels that may be decoded.
MAX_JPEG_REDUCTION = 5


@dataclass(frozen=True)
class Rules:
    """Limits on an original, and options for decoding it.

    Attributes:
        max_bytes: size of the file.
        max_pixels: pixels decoded, summed over all frames of a kept animation. A JPEG may have
            more, because it can be decoded at a fraction of its size.
        max_side_px: the longer side of a variant.
        max_frames: frames of an animation; checked only if all of them are kept.
        max_icc_bytes: size of the colour profile.
        max_text_bytes: size of the decompressed text chunks of a PNG.
        max_width_px: wider images are scaled down to this width, or as far as `variants` allow.
        variants: what is to be made of the image.
        is_animation_kept: decode all frames instead of the first only.
        is_truncated_accepted: decode what is left of a truncated or damaged file, and fill the
            missing pixels with grey.
    """

    max_bytes: int = 25_000_000
    max_pixels: int = 50_000_000
    max_side_px: int = MAX_SIDE_PX
    max_frames: int = 60
    max_icc_bytes: int = 1_000_000
    max_text_bytes: int = 1_000_000
    max_width_px: int = 1920
    variants: tuple[VariantSpec, ...] = ()
    is_animation_kept: bool = False
    is_truncated_accepted: bool = False


def max_original_pixels(format_: str, rules: Rules) -> int:
    """The most pixels that an original of a format may have; fewer of a JPEG's are decoded."""
    return rules.max_pixels * (MAX_JPEG_REDUCTION if format_ == "JPEG" else 1)


def check_size(width: int, height: int, rules: Rules, frame_count: int = 1) -> None:
    """Raises LimitError if the image has more pixels than may be decoded."""
    if width * height * frame_count > rules.max_pixels:
        frames = f" in {frame_count} frames or more" if frame_count > 1 else ""
        megapixels = f"{rules.max_pixels / 1e6:g} megapixels"
        size = f"the original is {width} x {height} px{frames}"
        raise LimitError(f"{size}, the limit is {megapixels} in all (IMAGEPIPELINE_MAX_PIXELS)")


def check_frames(width: int, height: int, frame_count: int, rules: Rules) -> None:
    """Raises LimitError if an animation has too many frames, or too many pixels in them."""
    if frame_count > rules.max_frames:
        raise LimitError(
            f"the original has more than {rules.max_frames} frames (IMAGEPIPELINE_MAX_FRAMES)"
        )
    check_size(width, height, rules, frame_count)


def check_profile(profile: bytes | None, rules: Rules) -> bytes | None:
    """Returns the profile, or None if it is empty; raises LimitError if it is too large."""
    if profile and len(profile) > rules.max_icc_bytes:
        raise LimitError(
            f"the colour profile has {len(profile):,} bytes, the limit is {rules.max_icc_bytes:,} "
            "(IMAGEPIPELINE_MAX_ICC_BYTES)"
        )
    return profile or None


def find_scale(width: int, height: int, rules: Rules) -> float:
    """The scale (at most 1) to which an upright image is reduced before anything else."""
    needed = [spec.scale_for(width, height) for spec in rules.variants]
    return min(1.0, max([rules.max_width_px / width, *needed]))


def check_variants(width: int, height: int, rules: Rules) -> None:
    """Raises LimitError if a side of a variant would be longer than WebP or AVIF allow."""
    scale = find_scale(width, height, rules)
    sizes = [spec.size_for(width, height) for spec in rules.variants]
    largest = max(max(size) for size in sizes or [(round(width * scale), round(height * scale))])
    if largest > rules.max_side_px:
        raise LimitError(
            f"the original is {width} x {height} px, its variants would be up to {largest:,} px "
            f"long, {rules.max_side_px:,} are allowed (IMAGEPIPELINE_MAX_SIDE_PX)"
        )

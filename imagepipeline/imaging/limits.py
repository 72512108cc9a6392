"""The limits on an original, told from its header before pixels are decoded."""

from dataclasses import dataclass

from imagepipeline.errors import LimitError

MAX_SIDE_PX = 16_383  # WebP can encode no more
MEMORY_BYTES, CPU_SECONDS = 2_000_000_000, 20  # of a process that decodes and encodes one image


@dataclass(frozen=True)
class Rules:
    """What an original may be, and how it is taken.

    `max_pixels` is of what is decoded: a JPEG may be larger, as it is decoded at a part of its size; of an animation
    that is kept it is over all frames. `max_side_px` is of the variants. `max_frames` counts where all are kept.
    `max_text_bytes` bounds the texts of a PNG, unpacked. An image wider than `max_width_px` is scaled down to it.
    `is_animation_kept`: all frames instead of the first. `is_truncated_accepted`: a cut-off or damaged file gives a
    picture, with grey where nothing could be read.
    """

    max_bytes: int = 25_000_000
    max_pixels: int = 50_000_000
    max_side_px: int = MAX_SIDE_PX
    max_frames: int = 60
    max_icc_bytes: int = 1_000_000
    max_text_bytes: int = 1_000_000
    max_width_px: int = 1920
    is_animation_kept: bool = False
    is_truncated_accepted: bool = False


def check_size(width: int, height: int, rules: Rules, frame_count: int = 1) -> None:
    """Raises LimitError if so many pixels may not be decoded."""
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
    """The profile, None for an empty one; raises LimitError if it is too large."""
    if profile and len(profile) > rules.max_icc_bytes:
        raise LimitError(
            f"the colour profile has {len(profile):,} bytes, the limit is {rules.max_icc_bytes:,} "
            "(IMAGEPIPELINE_MAX_ICC_BYTES)"
        )
    return profile or None


def check_variants(width: int, height: int, rules: Rules) -> None:
    """Raises LimitError if a variant would be longer than the formats written allow."""
    scale = min(1.0, rules.max_width_px / width)
    largest = max(round(width * scale), round(height * scale))
    if largest > rules.max_side_px:
        raise LimitError(
            f"the original is {width} x {height} px, its variants would be up to {largest:,} px long, "
            f"{rules.max_side_px:,} are allowed (IMAGEPIPELINE_MAX_SIDE_PX)"
        )

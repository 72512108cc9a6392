"""WebP, still or animated."""

from collections.abc import Iterator

from imagepipeline.errors import (
    UnreadableImageError,
)
from imagepipeline.imaging import exif
from imagepipeline.imaging.color import read_icc
from imagepipeline.imaging.formats import measure_webp
from imagepipeline.imaging.limits import Rules, check_frames, check_profile, check_size
from imagepipeline.imaging.readers.source import Picture, Source, load_frames, miss_end, open_image


def read_webp(content: bytes, rules: Rules) -> Source:
    """Reads a WebP."""
    declared = int.from_bytes(content[4:8], "little") + 8
    is_cut = declared > len(content)
    check_size(*measure_webp(content), rules)
    try:
        header = open_image(content, "WEBP")
    except MemoryError:
        raise
    except Exception as error:
        if is_cut:
            raise miss_end("WEBP", len(content), declared) from error
        raise UnreadableImageError("the WEBP data is damaged: its header cannot be read") from error
    check_size(*header.size, rules)
    profile = check_profile(header.info.get("icc_profile"), rules)
    frame_count = getattr(header, "n_frames", 1) if rules.is_animation_kept else 1
    if rules.is_animation_kept:
        check_frames(*header.size, frame_count, rules)

    def load(_: bool) -> Iterator[Picture]:
        try:
            yield from load_frames(header, frame_count)
        except Exception as error:
            if is_cut:
                raise miss_end("WEBP", len(content), declared) from error
            raise

    plays = int(header.info.get("loop") or 0)
    tags = header.info.get("exif", b"")
    return Source(
        *header.size,
        load,
        read_icc(profile),
        exif.parse(tags),
        exif.find_orientation(tags),
        count_plays=lambda: plays,
    )

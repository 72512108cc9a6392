"""What a JPEG is made of, read marker by marker (ITU-T T.81, annex B), and what its decoder must get of it."""

import re
from dataclasses import dataclass

from imagepipeline.errors import UnreadableImageError, UnsupportedFormatError

EOI, SOS, DRI, DQT, DHT, APP0, APP1, APP2, APP14, PROGRESSIVE = (
    0xD9,
    0xDA,
    0xDD,
    0xDB,
    0xC4,
    0xE0,
    0xE1,
    0xE2,
    0xEE,
    0xC2,
)
FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, coded by Huffman
REFUSED_FRAMES = {
    0xC3: "a lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7), "a hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "a JPEG with arithmetic coding"),
}
EXPORT_ADVICE = "export it as an ordinary JPEG"
DAMAGED = "the JPEG data is damaged"
ALL = (1 << 64) - 1
MAX_STRAY_BYTES = 4
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# In coded data a marker is what follows 0xFF, unless that is a stuffed 0, a restart, or another 0xFF.
END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
# What libjpeg-turbo says, in words for an uploader.
FLAWS = {
    "premature end": "the data of its pixels ends too early",
    "extraneous": "there is more data than its pixels need",
    "bad Huffman code": "the data of its pixels makes no sense",
    "instead of RST": "a piece of its pixels is missing",
    "Huffman table": "a table that its pixels need is missing or broken",
    "quantization table": "a table that its pixels need is missing",
    "progressive": "the parts of its picture do not fit together",
}


@dataclass(frozen=True)
class Jpeg:
    """The first picture of a JPEG file.

    `content` is all that its pixels depend on, without attachments and without what lies between and behind; it ends
    with its end marker, whether the file has one or not. `scan_count` counts the scans that another marker follows.
    `is_cut`: its end is missing. `is_covered`: its scans, if they are whole, make the whole picture.
    """

    content: bytes
    width: int
    height: int
    component_count: int
    is_progressive: bool
    is_cut: bool
    scan_count: int
    is_covered: bool
    exif: bytes
    profile: bytes | None

    @property
    def has_several_scans(self) -> bool:
        """Whether the whole picture comes again and again, each time finer, or channel by channel."""
        return self.is_progressive or self.scan_count > 1


def read_jpeg(content: bytes) -> Jpeg | None:
    """What the markers say; None where the file ends before the size of its picture is told.

    Raises:
        UnsupportedFormatError: of a kind that is hardly ever seen, which the message names.
        UnreadableImageError: what stands where markers should is none.
    """
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    view = memoryview(content)
    frame: tuple[int, int, int, int] | None = None
    exif, profiles = b"", {}
    scan_count, position, has_end = 0, 2, False
    unsent: dict[
        int, int
    ] = {}  # by component: which of its 64 coefficients were not sent in full, as bits
    while True:
        position = content.find(b"\xff", position)  # past what does not belong there
        while 0 <= position < len(content) and content[position] == 0xFF:
            position += 1
        if position < 0 or position >= len(content):
            break
        marker = content[position]
        position += 1
        if marker == EOI:
            has_end = True
            break
        if marker == 0 or marker in WITHOUT_LENGTH:
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        segment = content[position + 2 : position + max(length, 2)]
        if length < 2:
            raise UnreadableImageError(f"{DAMAGED}: one of its segments has no length")
        if position + length > len(content):
            break
        if marker in REFUSED_FRAMES and frame is None:
            raise UnsupportedFormatError(
                f"the original is {REFUSED_FRAMES[marker]}: {EXPORT_ADVICE}"
            )
        if marker in FRAMES or marker in REFUSED_FRAMES:
            if frame:
                raise UnreadableImageError(f"{DAMAGED}: it describes its picture twice")
            frame = _read_frame(marker, segment)
        if marker == APP1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif marker == APP2 and segment.startswith(b"ICC_PROFILE\0") and len(segment) > 14:
            profiles[segment[12]] = segment[13:]  # its count, then its part
        elif marker in FRAMES or marker in (DQT, DHT, DRI) or _tells_colors(marker, segment):
            parts.append(b"\xff" + bytes([marker]))
            parts.append(view[position : position + length])
        if marker == SOS:
            found = END_OF_SCAN.search(content, position + length)
            end = found.start() if found else len(content)
            header = content[position : position + length]
            _note_scan(segment, frame is not None and frame[0] == PROGRESSIVE, unsent)
            if (
                frame and frame[0] != PROGRESSIVE
            ):  # some cameras write nonsense where only progressive ones need numbers
                header = header[:-3] + b"\0\x3f\0"
            parts += [b"\xff\xda", header, view[position + length : end]]
            scan_count += found is not None
            if not found:
                break
            position = end
            continue
        position += length
    is_cut = not has_end and not content.rstrip(b"\0").endswith(b"\xff\xd9")
    if not has_end and not is_cut:
        raise UnreadableImageError(f"{DAMAGED}: what lies between its parts is no JPEG")
    if frame is None:
        if has_end:
            raise UnreadableImageError(f"{DAMAGED}: it ends before its picture begins")
        return None
    marker, height, width, component_count = frame
    is_covered = len(unsent) >= component_count and not any(unsent.values())
    clean = b"".join([*parts, b"\xff\xd9"])
    return Jpeg(
        clean,
        width,
        height,
        component_count,
        marker == PROGRESSIVE,
        is_cut,
        scan_count,
        is_covered,
        exif,
        _join_profile(profiles),
    )


def _note_scan(header: bytes, is_progressive: bool, unsent: dict[int, int]) -> None:
    """Notes which coefficients of which components a scan sends to their last bit (ITU-T T.81, B.2.3)."""
    count = header[0] if header else 0
    if len(header) < 4 + 2 * count:
        return
    first, last, bits = header[-3:]
    sent = ((1 << last + 1) - 1) >> first << first if is_progressive else ALL
    for component in header[1 : 1 + 2 * count : 2]:
        before = unsent.get(component, ALL)
        unsent[component] = (
            before & ~sent if not is_progressive or bits & 15 == 0 else before | sent & ALL
        )


def _tells_colors(marker: int, segment: bytes) -> bool:
    is_jfif = marker == APP0 and segment.startswith(b"JFIF\0\x01") and len(segment) >= 14
    return is_jfif or (marker == APP14 and segment.startswith(b"Adobe") and len(segment) >= 12)


def _read_frame(marker: int, segment: bytes) -> tuple[int, int, int, int]:
    """Marker, height, width and number of components."""
    if len(segment) < 6:
        raise UnreadableImageError(f"{DAMAGED}: the description of its picture is too short")
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    if segment[0] != 8:
        raise UnsupportedFormatError(
            f"the original is a JPEG of {segment[0]} bits a sample: {EXPORT_ADVICE} of 8 bits"
        )
    if segment[5] not in (1, 3, 4):
        raise UnsupportedFormatError(
            f"the original is a JPEG of {segment[5]} components: {EXPORT_ADVICE}"
        )
    if height == 0:
        raise UnsupportedFormatError(
            f"the original is a JPEG that states no height where it should: {EXPORT_ADVICE}"
        )
    if width == 0:
        raise UnreadableImageError(f"{DAMAGED}: its picture is 0 px wide")
    return marker, height, width, segment[5]


def _join_profile(parts: dict[int, bytes]) -> bytes | None:
    """An ICC profile of its numbered parts, each behind the number of parts; None if one is missing (ICC.1, B.4)."""
    counts = {part[0] for part in parts.values()}
    if counts != {len(parts)} or set(parts) != set(range(1, len(parts) + 1)):
        return None
    return b"".join(parts[number][1:] for number in sorted(parts))


def strip_padding(content: bytes, size: int) -> bytes:
    """A `Jpeg.content` without so many bytes before its end, if they are but filler, as some cameras write it."""
    filler = content[-2 - size : -2]
    is_filler = size <= MAX_STRAY_BYTES or len(set(filler)) == 1
    return content[: -2 - size] + content[-2:] if is_filler else content


def explain_flaw(error: str) -> str:
    """What a complaint of libjpeg-turbo about damaged data means, in words for an uploader."""
    return next((words for text, words in FLAWS.items() if text in error), "its decoder gave up")

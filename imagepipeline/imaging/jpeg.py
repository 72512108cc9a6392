"""Reads a JPEG marker by marker (ITU-T T.81, annex B), and rebuilds a clean one to decode."""

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
ALL_COEFFICIENTS = (1 << 64) - 1  # one bit for each of the 64 in a block
MAX_STRAY_BYTES = 4
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# In coded data, 0xFF and another byte are a marker, unless that byte is a stuffed 0, a restart
# marker, or another 0xFF.
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

    Attributes:
        content: a JPEG of only those segments that the pixels depend on, and an end marker.
        width: pixels.
        height: pixels.
        component_count: 1 for grey, 3 for colours, 4 for CMYK.
        is_progressive: whether it uses progressive coding.
        is_cut: the end of the file is missing.
        scan_count: complete scans, that is, those followed by another marker.
        is_covered: the scans, if they are undamaged, contain all coefficients of the picture.
        exif: content of the EXIF segment, b"" if there is none.
        profile: ICC profile.
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
        """Whether the picture is sent in several passes, each finer, or channel by channel."""
        return self.is_progressive or self.scan_count > 1


def read_jpeg(content: bytes) -> Jpeg | None:
    """Parses the first picture of a JPEG; returns None if the file ends before its size is known.

    Raises:
        UnsupportedFormatError: the JPEG is of a rare kind, which the message names.
        UnreadableImageError: the sequence of markers is damaged.
    """
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    view = memoryview(content)
    frame: tuple[int, int, int, int] | None = None
    exif = b""
    profiles: dict[int, bytes] = {}  # by number: a part of the ICC profile
    scan_count, position, has_end = 0, 2, False
    unsent: dict[int, int] = {}  # by component: bit mask of coefficients not yet sent in full
    while True:
        position = content.find(b"\xff", position)  # skips junk between segments
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
            raise UnreadableImageError(f"{DAMAGED}: one of its segments has an invalid length")
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
            # The number of parts, then this part. As in browsers, the first profile counts.
            profiles.setdefault(segment[12], segment[13:])
        elif marker in FRAMES or marker in (DQT, DHT, DRI) or _describes_colors(marker, segment):
            parts.append(b"\xff" + bytes([marker]))
            parts.append(view[position : position + length])
        if marker == SOS:
            found = END_OF_SCAN.search(content, position + length)
            end = found.start() if found else len(content)
            header = content[position : position + length]
            _note_scan(segment, frame is not None and frame[0] == PROGRESSIVE, unsent)
            # Some cameras write nonsense in these bytes, which matter in progressive JPEGs only.
            if frame and frame[0] != PROGRESSIVE:
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
        raise UnreadableImageError(f"{DAMAGED}: there is other data between its segments")
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
    """Updates `unsent` with the coefficients that a scan sends (ITU-T T.81, B.2.3)."""
    count = header[0] if header else 0
    if len(header) < 4 + 2 * count:
        return
    first, last, bits = header[-3:]
    sent = ((1 << last + 1) - 1) >> first << first if is_progressive else ALL_COEFFICIENTS
    is_last_bit = not is_progressive or bits & 15 == 0
    for component in header[1 : 1 + 2 * count : 2]:
        before = unsent.get(component, ALL_COEFFICIENTS)
        unsent[component] = before & ~sent if is_last_bit else before | sent & ALL_COEFFICIENTS


def _describes_colors(marker: int, segment: bytes) -> bool:
    is_jfif = marker == APP0 and segment.startswith(b"JFIF\0\x01") and len(segment) >= 14
    return is_jfif or (marker == APP14 and segment.startswith(b"Adobe") and len(segment) >= 12)


def _read_frame(marker: int, segment: bytes) -> tuple[int, int, int, int]:
    """Returns the marker, height, width and number of components."""
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
            f"the original is a JPEG without a height in its header: {EXPORT_ADVICE}"
        )
    if width == 0:
        raise UnreadableImageError(f"{DAMAGED}: its picture is 0 px wide")
    return marker, height, width, segment[5]


def _join_profile(parts: dict[int, bytes]) -> bytes | None:
    """Joins the numbered parts of an ICC profile (ICC.1, B.4); returns None if one is missing.

    Each part begins with one byte, the number of parts.
    """
    counts = {part[0] for part in parts.values()}
    if counts != {len(parts)} or set(parts) != set(range(1, len(parts) + 1)):
        return None
    return b"".join(parts[number][1:] for number in sorted(parts))


def strip_padding(content: bytes, size: int) -> bytes:
    """Removes `size` bytes before the end marker of `Jpeg.content` if they are only padding.

    Some cameras write such padding. It is at most four bytes, or one byte value repeated.
    """
    padding = content[-2 - size : -2]
    is_padding = size <= MAX_STRAY_BYTES or len(set(padding)) == 1
    return content[: -2 - size] + content[-2:] if is_padding else content


def explain_flaw(error: str) -> str:
    """What a complaint of libjpeg-turbo about damaged data means, in words for an uploader."""
    return next((words for text, words in FLAWS.items() if text in error), "its decoder gave up")

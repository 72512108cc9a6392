"""The size of a finished variant, read from its bytes by code that a file can do nothing to."""

import struct
from collections.abc import Iterator

TURNING_BOXES = {b"irot", b"imir", b"clap"}  # with them an AVIF shows another size than it declares
CONTAINERS = {
    b"meta": 4,
    b"iprp": 0,
    b"ipco": 0,
}  # boxes on the way to the sizes, and what precedes their content


def measure_variant(content: bytes, format_: str) -> tuple[int, int]:
    """Width and height in pixels of a WebP or AVIF.

    Raises:
        ValueError: it is not of that format, or its header is not what our encoders write.
    """
    try:
        return {"webp": _measure_webp, "avif": _measure_avif}[format_](content)
    except (IndexError, KeyError, struct.error):
        raise ValueError(f"the header of a {format_} is cut off or unknown") from None


def measure_jpeg(content: bytes) -> tuple[int, int]:
    """Width and height in pixels of a JPEG (ITU-T T.81, annex B).

    Raises:
        ValueError: it is none, or its header is not what our encoder writes.
    """
    if not content.startswith(b"\xff\xd8") or not content.endswith(b"\xff\xd9"):
        raise ValueError("it is no JPEG")
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, at + 1)
        if marker in (0xC0, 0xC1, 0xC2):
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        at += 2 + max(length, 2)
    raise ValueError("a JPEG declares no size")


def _measure_webp(content: bytes) -> tuple[int, int]:
    """RFC 9649: the extended format says it at once, the others at the start of their data."""
    riff, length, webp, kind = struct.unpack_from("<4sI4s4s", content)
    if (riff, webp) != (b"RIFF", b"WEBP") or length + 8 != len(content):
        raise ValueError("it is no WebP, or not all of one")
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(
            content[27:30], "little"
        )
    if kind == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("a WebP has no picture at its start")


def _measure_avif(content: bytes) -> tuple[int, int]:
    """ISO/IEC 23008-12, 6.5.3: all its pictures declare one size."""
    if content[4:8] != b"ftyp" or not {b"avif", b"avis"} & {content[8:12]}:
        raise ValueError("it is no AVIF")
    boxes = list(_list_boxes(content, 0, len(content)))
    if any(kind in TURNING_BOXES for kind, _ in boxes):
        raise ValueError("an AVIF is turned or cut after its decoding")
    sizes = {
        struct.unpack_from(">II", content, start + 4) for kind, start in boxes if kind == b"ispe"
    }
    if len(sizes) != 1:
        raise ValueError(f"an AVIF declares {len(sizes)} sizes")
    ((width, height),) = sizes
    return width, height


def _list_boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Kind and start of the content of each box, and of those in the containers we look into."""
    while start < end:
        length, kind = struct.unpack_from(">I4s", content, start)
        if length < 8 or start + length > end:
            raise ValueError("a box of an AVIF is longer than what holds it")
        yield kind, start + 8
        if kind in CONTAINERS:
            yield from _list_boxes(content, start + 8 + CONTAINERS[kind], start + length)
        start += length

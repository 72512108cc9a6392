"""Reads a finished picture's width and height from its header, in pure Python safe on any bytes.

The run uses it to check what the sandboxed decoder claims. Each function returns pixels and raises
ValueError, IndexError or struct.error if the file has another format, is cut off, or has a header
that our encoders do not write.
"""

import struct
from collections.abc import Iterator

# Boxes that rotate, mirror or crop: the size shown then differs from the size declared.
TRANSFORM_BOXES = {b"irot", b"imir", b"clap"}
# Boxes that contain the size boxes, and the number of bytes before the first box they contain.
CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}


def measure_jpeg(content: bytes) -> tuple[int, int]:
    """Reads the size from the first frame header (ITU-T T.81, annex B)."""
    if not content.startswith(b"\xff\xd8") or not content.endswith(b"\xff\xd9"):
        raise ValueError("it is not a JPEG")
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, at + 1)
        if marker in (0xC0, 0xC1, 0xC2):
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        at += 2 + max(length, 2)
    raise ValueError("a JPEG declares no size")


def measure_png(content: bytes) -> tuple[int, int]:
    """Reads the size from the IHDR chunk (W3C PNG, 11.2.1)."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
        raise ValueError("it is not a PNG")
    if content[-8:-4] != b"IEND":
        raise ValueError("a PNG has no end")
    width, height = struct.unpack_from(">II", content, 16)
    return width, height


def measure_webp(content: bytes) -> tuple[int, int]:
    """Reads the size from the VP8X chunk, or else from the start of the pixel data (RFC 9649)."""
    riff, length, webp, kind = struct.unpack_from("<4sI4s4s", content)
    if (riff, webp) != (b"RIFF", b"WEBP") or length + 8 != len(content):
        raise ValueError("it is not a WebP, or is cut off")
    if kind == b"VP8X":
        width = 1 + int.from_bytes(content[24:27], "little")
        height = 1 + int.from_bytes(content[27:30], "little")
        return width, height
    if kind == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("a WebP has no picture at its start")


def measure_avif(content: bytes) -> tuple[int, int]:
    """Reads the one size that all `ispe` boxes declare (ISO/IEC 23008-12, 6.5.3)."""
    if content[4:8] != b"ftyp" or not {b"avif", b"avis"} & {content[8:12]}:
        raise ValueError("it is not an AVIF")
    boxes = list(_list_boxes(content, 0, len(content)))
    if any(kind in TRANSFORM_BOXES for kind, _ in boxes):
        raise ValueError("an AVIF asks to be rotated, mirrored or cropped after decoding")
    sizes = {
        struct.unpack_from(">II", content, start + 4) for kind, start in boxes if kind == b"ispe"
    }
    if len(sizes) != 1:
        raise ValueError(f"an AVIF declares {len(sizes)} sizes")
    ((width, height),) = sizes
    return width, height


def _list_boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yields the type and the content's offset of each box, descending into `CONTAINERS`."""
    while start < end:
        length, kind = struct.unpack_from(">I4s", content, start)
        if length < 8 or start + length > end:
            raise ValueError("a box of an AVIF is longer than the box around it")
        yield kind, start + 8
        if kind in CONTAINERS:
            yield from _list_boxes(content, start + 8 + CONTAINERS[kind], start + length)
        start += length

"""What a file is, told from its bytes: the accepted formats, and the names of those that are not."""

import re
from collections.abc import Callable
from typing import Literal

from imagepipeline.errors import UnsupportedFormatError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "HEIF")
AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
TIFF_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type; 1 for the others
TIFF_STRIP_TAGS = (273, 279, 324, 325)  # offsets and byte counts of strips and tiles
RAW_ADVICE = "a camera raw file: develop it and upload a JPEG"
VIDEO_ADVICE = "a video: upload a picture"
ARCHIVE_ADVICE = "an archive: unpack it and upload the pictures one by one"

# What people upload by mistake: a pattern at the start of the file, what it is and what to do. The first counts.
REFUSED: tuple[tuple[bytes, str], ...] = (
    (rb"\xef?\xbb?\xbf?\s*(<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>]*>|\s)*<svg\b", "an SVG drawing: export it as PNG"),
    (
        rb"\xef?\xbb?\xbf?\s*(<!--.*?-->|\s)*<(!doctype html|html|head|body|script)\b",
        "a web page, not the picture on it",
    ),
    (rb"\xef?\xbb?\xbf?\s*<\?xml", "an XML document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "an EPS or PostScript file: export it as PNG or TIFF"),
    (rb".{0,1019}%PDF-", "a PDF document: export its pages as pictures"),
    (rb"8BPS", "a Photoshop file: export it as PNG or TIFF"),
    (rb"....ftypcrx |II\*\x00....CR|IIU\x00|IIR[OS]|MMOR|FUJIFILMCCD-RAW|FOVb", RAW_ADVICE),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture: export it as JPEG or PNG"),
    (rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51", "a JPEG 2000 picture: export it as JPEG or PNG"),
    (rb"....ftyp|....(moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\x00\x00\x01[\xb3\xba]", VIDEO_ADVICE),
    (rb"OggS|ID3|RIFF....WAVE|fLaC", "a sound or a video: upload a picture"),
    (rb"PK\x03\x04|PK\x05\x06|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|.{257}ustar", ARCHIVE_ADVICE),
    (rb"\x00\x00[\x01\x02]\x00", "a Windows icon or cursor: export it as PNG"),
    (rb"\x7fELF|MZ|#!", "a program"),
)


def identify(content: bytes) -> str:
    """The member of FORMATS the bytes claim to be; a file's name plays no part.

    Raises:
        UnsupportedFormatError: they are of another kind, which the message names where it is a common one.
    """
    for format_, is_meant in SIGNATURES.items():
        if is_meant(content):
            return format_
    accepted = ", ".join(FORMATS)
    head = content[:1024]
    for pattern, kind in REFUSED:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise UnsupportedFormatError(f"the original is {kind} (accepted: {accepted})")
    raise UnsupportedFormatError(f"the original is no picture of a known format (accepted: {accepted})")


def declare_bytes(content: bytes, format_: str) -> int | None:
    """How long the file says it is, in bytes; None where the format does not say, or not at a place easily found."""
    if format_ == "WEBP":
        return int.from_bytes(content[4:8], "little") + 8
    if format_ == "BMP":
        return int.from_bytes(content[2:6], "little") or None
    if format_ in ("AVIF", "HEIF"):
        return _end_of_boxes(content)
    if format_ == "TIFF" and content[2:4] in (b"*\0", b"\0*"):
        return _end_of_first_page(content)
    return None


def measure_webp(content: bytes) -> tuple[int, int]:
    """Width and height in pixels by the header of a WebP file, (0, 0) if it is damaged (RFC 9649, sections 2.5 to 2.7).

    Read here because libwebp reserves its canvas, eight bytes a pixel, when it opens a file.
    """
    kind, header = content[12:16], content[20:30]
    if kind == b"VP8X":
        return int.from_bytes(header[4:7], "little") + 1, int.from_bytes(header[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF
    return 0, 0


def _is_tiff(content: bytes) -> bool:
    is_raw = content[8:10] == b"CR"  # Canon's; its first page is a preview
    return content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")) and not is_raw


def _brands(content: bytes) -> set[bytes]:
    """The major and compatible brands of an ISO base media file (ISO/IEC 14496-12, 4.3)."""
    if content[4:8] != b"ftyp":
        return set()
    box = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
    return {box[start : start + 4] for start in (0, *range(8, len(box), 4))}


def _end_of_boxes(content: bytes) -> int:
    """Where the last top-level box of an ISO base media file ends (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file; less: damaged
            return len(content)
        position += size
    return position if position >= len(content) else position + 8  # a part of a header is left


def _end_of_first_page(content: bytes) -> int:
    """Where the last byte named by the first directory of a TIFF file lies (TIFF 6.0, section 2)."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"

    def read(position: int, size: int = 4) -> int:
        return int.from_bytes(content[position : position + size], order)

    start = read(4)
    end = start + 6 + 12 * read(start, 2)
    values: dict[int, list[int]] = {}
    for entry in range(start + 2, min(end - 4, len(content) - 11), 12):
        tag, size, count = read(entry, 2), TIFF_VALUE_BYTES.get(read(entry + 2, 2), 1), read(entry + 4)
        position = entry + 8 if size * count <= 4 else read(entry + 8)
        end = max(end, position + size * count)
        if tag in TIFF_STRIP_TAGS and position + size * count <= len(content):
            values[tag] = [read(position + index * size, size) for index in range(count)]
    for offsets, counts in ((273, 279), (324, 325)):
        for offset, count in zip(values.get(offsets, ()), values.get(counts, ()), strict=False):
            end = max(end, offset + count)
    return end


BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}
SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda content: content.startswith(b"\xff\xd8\xff"),
    "PNG": lambda content: content.startswith(b"\x89PNG\r\n\x1a\n"),
    "WEBP": lambda content: content.startswith(b"RIFF") and content[8:12] == b"WEBP",
    "GIF": lambda content: content.startswith((b"GIF87a", b"GIF89a")),
    "AVIF": lambda content: bool(_brands(content) & AVIF_BRANDS),
    "TIFF": _is_tiff,
    "BMP": lambda content: content.startswith(b"BM") and content[14:18] in BMP_HEADERS,
    "HEIF": lambda content: bool(_brands(content) & HEIF_BRANDS),
}

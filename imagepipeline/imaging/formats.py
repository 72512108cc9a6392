"""Identifies a file's format by its bytes, and names common formats that are not accepted."""

import re
from collections.abc import Callable

from imagepipeline.errors import UnsupportedFormatError
from imagepipeline.imaging.boxes import DERIVED, read_brands, read_primary_item

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "HEIF")
# Major brands that the decoders accept. Files of the other brands are coded in the same way.
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
OTHER_HEIF_BRANDS = (b"mif2", b"miaf")

# Codecs inside a HEIF file that cannot be read here (MP4RA: codes of sample entries and items).
REFUSED_CODINGS = {
    b"unci": "of uncompressed pixels",
    b"jpeg": "that wraps a JPEG",
    b"j2k1": "that wraps a JPEG 2000",
    b"vvc1": "coded as VVC",
    b"avc1": "coded as AVC (H.264)",
    b"evc1": "coded as EVC",
    b"lhv1": "coded as layered HEVC",
    b"mski": "of a mask alone",
}
RAW_ADVICE = "a camera raw file: develop it and upload a JPEG"
VIDEO_ADVICE = "a video: upload a picture"
ARCHIVE_ADVICE = "an archive: unpack it and upload the pictures one by one"

# Files that people upload by mistake: a pattern at the start of the file, and what to tell the
# uploader. The first match counts.
REFUSED: tuple[tuple[bytes, str], ...] = (
    (
        rb"\xef?\xbb?\xbf?\s*(<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>]*>|\s)*<svg\b",
        "an SVG drawing: export it as PNG",
    ),
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
    (
        rb"....ftyp|....(moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01"
        rb"|\x00\x00\x01[\xb3\xba]",
        VIDEO_ADVICE,
    ),
    (rb"OggS|ID3|RIFF....WAVE|fLaC", "a sound or a video: upload a picture"),
    (
        rb"PK\x03\x04|PK\x05\x06|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"
        rb"|.{257}ustar",
        ARCHIVE_ADVICE,
    ),
    (rb"\x00\x00[\x01\x02]\x00", "a Windows icon or cursor: export it as PNG"),
    (rb"\x7fELF|MZ|#!", "a program"),
)


def identify(content: bytes) -> str:
    """Returns the member of `FORMATS` that the bytes claim to be; the file's name is ignored.

    Raises:
        UnsupportedFormatError: the format is not accepted. The message names it if it is common.
    """
    for format_, has_signature in SIGNATURES.items():
        if has_signature(content):
            return format_
    accepted = ", ".join(FORMATS)
    coding = _coding(content)
    if coding:
        name = REFUSED_CODINGS.get(coding, f"of pixels coded as {coding.decode('latin-1')!r}")
        raise UnsupportedFormatError(
            f"the original is a HEIF file {name}: export it as JPEG (accepted: {accepted})"
        )
    head = content[:1024]
    for pattern, kind in REFUSED:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise UnsupportedFormatError(f"the original is {kind} (accepted: {accepted})")
    raise UnsupportedFormatError(
        f"the original is not a picture of a known format (accepted: {accepted})"
    )


def measure_webp(content: bytes) -> tuple[int, int]:
    """Returns the width and height in pixels from a WebP's header, or (0, 0) if it is damaged.

    See RFC 9649, sections 2.5 to 2.7. The limits must be checked before libwebp opens the file,
    because it then allocates the whole canvas, at eight bytes a pixel.
    """
    kind, header = content[12:16], content[20:30]
    if kind == b"VP8X":
        return int.from_bytes(header[4:7], "little") + 1, int.from_bytes(header[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width = int.from_bytes(header[6:8], "little") & 0x3FFF
        height = int.from_bytes(header[8:10], "little") & 0x3FFF
        return width, height
    return 0, 0


def _is_tiff(content: bytes) -> bool:
    is_raw = content[8:10] == b"CR"  # Canon raw, whose first page is only a preview
    return content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")) and not is_raw


def _coding(content: bytes) -> bytes:
    """Returns the codec of an AVIF or HEIC file, from its primary item or else its brands."""
    brands = read_brands(content)
    if not brands:
        return b""
    coding = read_primary_item(content).coding
    if coding.isalnum() and coding not in DERIVED:
        return coding
    if brands.intersection(AVIF_BRANDS):
        return b"av01"
    return b"hvc1" if brands.intersection((*HEIF_BRANDS, *OTHER_HEIF_BRANDS)) else b""


BMP_HEADERS = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}
SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda content: content.startswith(b"\xff\xd8\xff"),
    "PNG": lambda content: content.startswith(b"\x89PNG\r\n\x1a\n"),
    "WEBP": lambda content: content.startswith(b"RIFF") and content[8:12] == b"WEBP",
    "GIF": lambda content: content.startswith((b"GIF87a", b"GIF89a")),
    "AVIF": lambda content: _coding(content) == b"av01",
    "TIFF": _is_tiff,
    "BMP": lambda content: content.startswith(b"BM") and content[14:18] in BMP_HEADERS,
    "HEIF": lambda content: _coding(content) == b"hvc1",
}

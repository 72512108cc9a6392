"""Reads a PNG chunk by chunk (W3C PNG, third edition, 5), and rebuilds a clean one to decode."""

import zlib
from dataclasses import dataclass, field

from imagepipeline.errors import UnreadableImageError, UnsupportedFormatError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6  # colour types
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
# Chunks that are valid only before the pixels (W3C PNG, 5.6).
BEFORE_PIXELS = tuple(b"PLTE tRNS cICP iCCP sRGB gAMA cHRM sBIT bKGD cLLI mDCV".split())
# Texts before the pixels reach Pillow, which limits them; later ones are dropped unread.
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Ancillary chunks that Pillow gets: those that change pixels, and texts, whose size it limits. The
# others are dropped, because Pillow fails if one of them is malformed.
FOR_DECODER = (b"tRNS", *TEXTS, *ANIMATION)
END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Png:
    """A parsed PNG.

    Attributes:
        width: pixels.
        height: pixels.
        bits: bits per sample.
        color_type: one of the colour types of the standard.
        is_interlaced: whether the pixels are stored in seven passes.
        is_cut: the file ends before its end chunk.
        content: a PNG of only those chunks that the decoder needs, and an end chunk.
        still: the same without the animation.
        chunks: the first chunk of each ancillary type that has a correct checksum.
    """

    width: int
    height: int
    bits: int
    color_type: int
    is_interlaced: bool
    is_cut: bool
    content: bytes
    still: bytes
    chunks: dict[bytes, bytes] = field(default_factory=dict)


def read_png(content: bytes) -> Png | None:
    """Parses a PNG; returns None if the file ends within its header.

    Raises:
        UnsupportedFormatError: the PNG is in Apple's own variation of the format.
        UnreadableImageError: a critical chunk has a wrong checksum, or a chunk is malformed.
    """
    header = b""
    chunks: dict[bytes, bytes] = {}
    before: list[tuple[bytes, bytes]] = []
    data: list[bytes] = []
    after: list[tuple[bytes, bytes]] = []
    position, is_cut = len(SIGNATURE), True
    while position + 8 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        if not kind.isalpha():
            raise UnreadableImageError(
                "the PNG data is damaged: one of its chunks has no valid name"
            )
        body = content[position + 8 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        position += 12 + length
        if kind == b"CgBI":
            raise UnsupportedFormatError(
                "the original is a PNG made for Apple's devices alone (CgBI): export it as PNG"
            )
        if len(checksum) < 4:  # the file is cut off here: keep what there is of the pixels
            if kind == b"IDAT" and header:
                data.append(body)
            break
        is_critical = not kind[0] & 0x20
        if int.from_bytes(checksum, "big") != zlib.crc32(body, zlib.crc32(kind)):
            if is_critical:
                raise UnreadableImageError(
                    f"the PNG data is damaged: the checksum of {kind.decode()} is wrong"
                )
            continue  # like browsers, ignore a damaged chunk that no pixel depends on
        if kind == b"IEND":
            is_cut = False
            break
        if kind == b"IHDR":
            header = header or body
        elif kind == b"IDAT":
            data.append(body)
        elif not (data and kind in BEFORE_PIXELS + TEXTS):
            if not is_critical:
                chunks.setdefault(kind, body)
            if is_critical or kind in FOR_DECODER:
                (after if data else before).append((kind, body))
    if not header:
        if is_cut:
            return None
        raise UnreadableImageError("the PNG data is damaged: it has no header")
    if len(header) != 13:
        raise UnreadableImageError("the PNG data is damaged: its header has the wrong length")
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    if not width or not height:
        raise UnreadableImageError(f"the PNG data is damaged: its picture is {width} x {height} px")
    start = SIGNATURE + _chunk(b"IHDR", header)
    pixels = _chunk(b"IDAT", b"".join(data)) if data else b""
    whole = start + _join(before) + pixels + _join(after) + END
    still = whole
    if b"acTL" in chunks:
        still = start + _join([one for one in before if one[0] not in ANIMATION]) + pixels + END
    return Png(width, height, header[8], header[9], bool(header[12]), is_cut, whole, still, chunks)


def _join(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return (
        len(body).to_bytes(4, "big")
        + kind
        + body
        + zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")
    )


def unpack_profile(chunk: bytes, max_bytes: int) -> bytes | None:
    """Returns the ICC profile of an `iCCP` chunk (W3C PNG, 11.3.2.3), or None if there is none.

    A profile larger than `max_bytes` is cut one byte above it, so that the caller notices.
    """
    _, _, packed = chunk.partition(b"\0")
    if packed[:1] != b"\0":  # 0, deflate, is the only compression method
        return None
    try:
        return zlib.decompressobj().decompress(packed[1:], max_bytes + 1) or None
    except zlib.error:
        return None

"""What a PNG is made of, read chunk by chunk (W3C PNG, third edition, 5), and made whole for its decoder."""

import zlib
from dataclasses import dataclass, field

from imagepipeline.errors import UnreadableImageError, UnsupportedFormatError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3  # colour types
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
# What counts only before the pixels (W3C PNG, 5.6).
BEFORE_PIXELS = (
    b"PLTE",
    b"tRNS",
    b"cICP",
    b"iCCP",
    b"sRGB",
    b"gAMA",
    b"cHRM",
    b"sBIT",
    b"bKGD",
    b"cLLI",
    b"mDCV",
)
TEXTS = (
    b"tEXt",
    b"zTXt",
    b"iTXt",
)  # bounded where they come first; behind the pixels they are not unpacked at all
# Ancillary chunks that change pixels, or that are bounded as Pillow unpacks them. Others, it stumbles over if they are
# malformed.
FOR_DECODER = (b"tRNS", *TEXTS, *ANIMATION)
END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Png:
    """The chunks of a PNG file.

    `content` is what the decoder must get, with an end; `still` is that without an animation. `chunks` holds the first
    one of each ancillary kind whose checksum is right. `is_cut`: the file ends before its end chunk.
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
    """What the chunks say; None where the file ends before the first.

    Raises:
        UnsupportedFormatError: Apple's own kind of PNG.
        UnreadableImageError: a checksum without which there is no picture is wrong, or what should be a chunk is none.
    """
    header = b""
    chunks: dict[bytes, bytes] = {}
    before: list[tuple[bytes, bytes]] = []
    data: list[bytes] = []
    after: list[tuple[bytes, bytes]] = []
    position, is_cut = len(SIGNATURE), True
    while position + 8 <= len(content):
        length, kind = (
            int.from_bytes(content[position : position + 4], "big"),
            content[position + 4 : position + 8],
        )
        if not kind.isalpha():
            raise UnreadableImageError(
                "the PNG data is damaged: what should be one of its chunks is none"
            )
        body = content[position + 8 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        position += 12 + length
        if kind == b"CgBI":
            raise UnsupportedFormatError(
                "the original is a PNG made for Apple's devices alone (CgBI): export it as PNG"
            )
        if len(checksum) < 4:  # cut off here; of the pixels what is there counts
            if kind == b"IDAT" and header:
                data.append(body)
            break
        is_critical = not kind[0] & 0x20
        if int.from_bytes(checksum, "big") != zlib.crc32(body, zlib.crc32(kind)):
            if is_critical:
                raise UnreadableImageError(
                    f"the PNG data is damaged: the checksum of {kind.decode()} is wrong"
                )
            continue  # decoration, as browsers take it
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
        raise UnreadableImageError("the PNG data is damaged: its header has not 13 bytes")
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
    """The ICC profile in an `iCCP` chunk, of one byte too many at most; None if there is none (W3C PNG, 11.3.2.3)."""
    _, _, packed = chunk.partition(b"\0")
    if packed[:1] != b"\0":  # the only way of packing there is
        return None
    try:
        return zlib.decompressobj().decompress(packed[1:], max_bytes + 1) or None
    except zlib.error:
        return None

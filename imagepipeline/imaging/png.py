"""Reads a PNG chunk by chunk (W3C PNG, third edition, 5), and rebuilds a clean one to decode."""

import struct
import zlib
from collections.abc import Iterator
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
FOR_DECODER = (b"tRNS", *TEXTS)
OUTSIDE = "the PNG data is damaged: one of its frames is not within its picture"
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
        content: a PNG of only those chunks that the decoder needs, and an end chunk; of an APNG, of
            the picture for viewers without animation.
        animation: the chunks of an APNG that make its frames, pixels among them; else none.
        chunks: the first chunk of each ancillary type that has a correct checksum.
    """

    width: int
    height: int
    bits: int
    color_type: int
    is_interlaced: bool
    is_cut: bool
    content: bytes
    animation: tuple[tuple[bytes, bytes], ...] = ()
    chunks: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def has_fallback(self) -> bool:
        """Whether the picture for viewers without animation is no frame of the animation."""
        kinds = [kind for kind, _ in self.animation if kind in (b"fcTL", b"IDAT")]
        return kinds[:1] == [b"IDAT"]


@dataclass(frozen=True)
class PngFrame:
    """One frame of an APNG (W3C PNG, third edition, 11.3.6).

    Attributes:
        content: a PNG of the frame's size that holds this frame alone.
        left: pixels from the left edge of the canvas.
        top: pixels from the top edge of the canvas.
        width: pixels.
        height: pixels.
        disposal: 1 to clear its area before the next frame, 2 to restore what was there before.
        is_blended: it is laid over what is there, instead of replacing it.
        duration_ms: how long it is shown.
    """

    content: bytes
    left: int
    top: int
    width: int
    height: int
    disposal: int
    is_blended: bool
    duration_ms: int


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
            if is_critical or kind in FOR_DECODER + ANIMATION:
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
    pixels = [(b"IDAT", b"".join(data))] if data else []
    parts = [(b"IHDR", header), *before, *pixels, *after]
    whole = SIGNATURE + _join([one for one in parts if one[0] not in ANIMATION]) + END
    is_animation = len(dict(before).get(b"acTL", b"")) == 8
    animation = tuple(parts) if is_animation else ()
    kind_of_pixels = header[8], header[9], bool(header[12])
    return Png(width, height, *kind_of_pixels, is_cut, whole, animation, chunks)


def list_frames(png: Png) -> Iterator[PngFrame]:
    """Yields the frames of an APNG; its picture for other viewers is one if it has a control chunk.

    Raises:
        UnreadableImageError: a frame is not within the canvas.
    """
    header = dict(png.animation).get(b"IHDR", b"")
    shared = [one for one in png.animation if one[0] in (b"PLTE", b"tRNS")]
    control, data = b"", list[bytes]()
    for kind, body in (*png.animation, (b"fcTL", b"")):
        if kind == b"fcTL":
            if control and data:
                yield _build_frame(png, control, header, shared, b"".join(data))
            control, data = body, []
        elif kind == b"IDAT" and control:
            if control[4:12] != header[:8]:
                raise UnreadableImageError(OUTSIDE)
            data.append(body)
        elif kind == b"fdAT":
            data.append(body[4:])


def _build_frame(
    png: Png, control: bytes, header: bytes, shared: list[tuple[bytes, bytes]], data: bytes
) -> PngFrame:
    if len(control) != 26:
        raise UnreadableImageError("the PNG data is damaged: a frame's header has the wrong length")
    width, height, left, top, count, per_second, disposal, blending = struct.unpack_from(
        ">4I2H2B", control, 4
    )
    if not width or not height or left + width > png.width or top + height > png.height:
        raise UnreadableImageError(OUTSIDE)
    parts = [(b"IHDR", control[4:12] + header[8:]), *shared, (b"IDAT", data)]
    return PngFrame(
        SIGNATURE + _join(parts) + END,
        left,
        top,
        width,
        height,
        disposal,
        blending == 1,
        round(1000 * count / (per_second or 100)),
    )


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

"""Reads a GIF block by block (GIF89a specification), and extracts each frame as a GIF."""

from collections.abc import Iterator
from dataclasses import dataclass

LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")
RESTORE = (3, 4)  # disposals; some old encoders write 4, and browsers take it as 3


@dataclass(frozen=True)
class GifFrame:
    """One frame of a GIF.

    Attributes:
        content: a GIF of the frame's size that holds this frame alone.
        left: pixels from the left edge of the canvas.
        top: pixels from the top edge of the canvas.
        width: pixels.
        height: pixels.
        is_interlaced: its rows are stored in four passes.
        clear_index: index of the transparent palette entry.
        disposal: 2 to clear its area before the next frame; one of RESTORE to restore what was
            there before.
        duration_ms: how long it is shown.
        is_cut: the file ends within it.
    """

    content: bytes
    left: int
    top: int
    width: int
    height: int
    is_interlaced: bool
    clear_index: int | None
    disposal: int
    duration_ms: int
    is_cut: bool


@dataclass
class Gif:
    """The canvas of a GIF.

    Attributes:
        width: pixels.
        height: pixels.
        loop: how often the animation is repeated: 0 for ever; None if the GIF does not say, which
            means that it is shown once.
    """

    width: int
    height: int
    loop: int | None = None


def read_gif(content: bytes) -> tuple[Gif, Iterator[GifFrame]] | None:
    """Returns the canvas and an iterator that parses the frames lazily.

    `Gif.loop` is set once the first frame has been parsed. Returns None if the file ends within the
    header.
    """
    if len(content) < 13:
        return None
    gif = Gif(int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little"))
    return gif, _walk(content, gif)


def _walk(content: bytes, gif: Gif) -> Iterator[GifFrame]:
    position = 13
    palette = b""
    if content[10] & 0x80:
        size = 3 << (content[10] & 7) + 1
        palette = content[position : position + size]
        position += size
    clear_index, disposal, duration_ms = None, 0, 0
    while position < len(content):
        kind = content[position]
        if kind == 0x21:  # an extension
            blocks, after = _read_blocks(content, position + 2)
            label = content[position + 1] if position + 1 < len(content) else 0
            if label == 0xF9 and len(blocks) >= 4:
                clear_index = blocks[3] if blocks[0] & 1 else None
                disposal = blocks[0] >> 2 & 7
                duration_ms = int.from_bytes(blocks[1:3], "little") * 10
            elif (
                label == 0xFF and blocks.startswith(LOOPS) and len(blocks) >= 14 and blocks[11] == 1
            ):
                gif.loop = int.from_bytes(blocks[12:14], "little")
            position = after
        elif kind == 0x2C:  # a frame
            if position + 10 > len(content):
                return
            left, top, width, height = (
                int.from_bytes(content[at : at + 2], "little")
                for at in range(position + 1, position + 9, 2)
            )
            packed = content[position + 9]
            position += 10
            own = palette
            if packed & 0x80:
                size = 3 << (packed & 7) + 1
                own = content[position : position + size]
                position += size
            end = _skip_blocks(content, position + 1)
            is_cut = end is None
            data = content[position : end or len(content)]
            own = own.ljust(6, b"\0")
            colors = max(1, (len(own) // 3 - 1).bit_length())
            start = b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little")
            start += bytes([0x80 | colors - 1, 0, 0]) + own.ljust(3 << colors, b"\0")
            start += (
                b",\0\0\0\0"
                + width.to_bytes(2, "little")
                + height.to_bytes(2, "little")
                + bytes([packed & 0x40])
            )
            yield GifFrame(
                start + data + (b"" if is_cut else b";"),
                left,
                top,
                width,
                height,
                bool(packed & 0x40),
                clear_index,
                disposal,
                duration_ms,
                is_cut,
            )
            clear_index, disposal, duration_ms = None, 0, 0
            if end is None:
                return
            position = end
        elif kind == 0x3B:  # the end
            return
        else:  # skip bytes that belong to no block, as browsers do
            position += 1


def _read_blocks(content: bytes, position: int) -> tuple[bytes, int]:
    """Returns the joined contents of data sub-blocks, and the offset after them."""
    found = []
    while position < len(content) and content[position]:
        found.append(content[position + 1 : position + 1 + content[position]])
        position += 1 + content[position]
    return b"".join(found), position + 1


def _skip_blocks(content: bytes, position: int) -> int | None:
    """Returns the offset after data sub-blocks, or None if the file ends within them."""
    while position < len(content):
        if not content[position]:
            return position + 1
        position += 1 + content[position]
    return None

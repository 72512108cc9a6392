"""Reads the headers of a BMP, and decodes the variations that Pillow gets wrong or rejects."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGB, RLE8, RLE4, BITFIELDS, JPEG, PNG, ALPHA_BITFIELDS = 0, 1, 2, 3, 4, 5, 6
CMYK = (11, 12, 13)
DEFAULT_MASKS = {16: (0x7C00, 0x03E0, 0x001F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}


@dataclass(frozen=True)
class Bmp:
    """The headers of a BMP.

    Attributes:
        width: pixels; 0 if the header has a negative one.
        height: pixels, always positive.
        is_top_down: the first row stored is the top one.
        bits: bits per pixel.
        compression: one of the constants above.
        start: offset of the pixels in the file.
        masks: bit masks of red, green, blue and alpha.
    """

    width: int
    height: int
    is_top_down: bool
    bits: int
    compression: int
    start: int
    masks: tuple[int, int, int, int]

    @property
    def row_bytes(self) -> int:
        """Bytes in an uncompressed row, which is padded to a multiple of four."""
        return (self.width * self.bits + 31) // 32 * 4

    @property
    def is_plausible(self) -> bool:
        """Whether the compression and the bits per pixel are known ones."""
        is_wrapper = self.compression in (JPEG, PNG)
        decoded_here = (RGB, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS)
        is_known = is_wrapper or self.compression in (*decoded_here, *CMYK)
        return is_known and (is_wrapper or self.bits in (1, 2, 4, 8, 16, 24, 32))

    def find_refusal(self, header_bytes: int) -> str | None:
        """Returns a description of the BMP if this kind is not supported, else None."""
        if header_bytes in (16, 64) and self.compression > RLE4:
            return "an OS/2 bitmap with its own compression"
        if self.compression in (JPEG, PNG):
            return f"a BMP that wraps a {'JPEG' if self.compression == JPEG else 'PNG'}"
        if self.compression > ALPHA_BITFIELDS:
            return "a BMP of CMYK colours"
        if self.bits not in (1, 4, 8, 16, 24, 32):
            return f"a BMP of {self.bits} bits a pixel"
        return "an OS/2 bitmap of version 2" if header_bytes == 16 else None


def read_bmp(content: bytes) -> tuple[Bmp, int] | None:
    """Returns the headers, and the size in bytes of the second one, the info header.

    Returns None if the file ends within the headers.
    """

    def read(position: int, size: int = 4, signed: bool = False) -> int:
        return int.from_bytes(content[position : position + size], "little", signed=signed)

    header_bytes = read(14)
    if len(content) < 14 + header_bytes:
        return None
    if header_bytes == 12:
        return Bmp(read(18, 2), read(20, 2), False, read(24, 2), RGB, read(10), (0, 0, 0, 0)), 12
    width, height, bits = read(18, signed=True), read(22, signed=True), read(28, 2)
    compression = read(30) if header_bytes > 16 else RGB
    masks = DEFAULT_MASKS.get(bits, (0, 0, 0, 0))
    if compression in (BITFIELDS, ALPHA_BITFIELDS) and header_bytes >= 40:
        has_alpha = header_bytes >= 56 or compression == ALPHA_BITFIELDS
        masks = (read(54), read(58), read(62), read(66) if has_alpha else 0)
    return Bmp(
        max(width, 0), abs(height), height < 0, bits, compression, read(10), masks
    ), header_bytes


def read_fields(content: bytes, bmp: Bmp) -> Image.Image | None:
    """Decodes a BMP with bit fields to RGB or RGBA; returns None if the masks are invalid."""
    if not any(bmp.masks[:3]) or max(mask.bit_length() for mask in bmp.masks) > bmp.bits:
        return None
    size = bmp.row_bytes * bmp.height
    rows = np.frombuffer(content, np.uint8, size, bmp.start).reshape(bmp.height, bmp.row_bytes)
    pixels = rows.view("<u2" if bmp.bits == 16 else "<u4")[:, : bmp.width]
    if not bmp.is_top_down:
        pixels = pixels[::-1]
    channels = []
    for mask in bmp.masks if bmp.masks[3] else bmp.masks[:3]:
        if not mask:
            channels.append(np.zeros(pixels.shape, np.uint8))
            continue
        shift = (mask & -mask).bit_length() - 1
        largest = mask >> shift
        values = (pixels & mask) >> shift
        channels.append(
            ((values.astype(np.uint64) * 255 + largest // 2) // largest).astype(np.uint8)
        )
    return Image.fromarray(np.stack(channels, axis=-1))


def read_runs(
    content: bytes, bmp: Bmp, header_bytes: int
) -> tuple[Image.Image, NDArray[np.bool_], bool]:
    """Decodes a run-length encoded BMP.

    As in Chromium, pixels that no run covers are black, and a run stops at the end of its row.

    Returns:
        The image in RGB, the mask of pixels that no run covers, and whether the runs end
        properly.
    """
    width, height, is_wide = bmp.width, bmp.height, bmp.compression == RLE8
    pixels, drawn = bytearray(width * height), bytearray(width * height)
    position, x, y, has_end = bmp.start, 0, 0, False
    while position + 2 <= len(content) and y < height:
        count, value = content[position], content[position + 1]
        position += 2
        if count == 0 and value == 0:
            x, y = 0, y + 1
            continue
        if count == 0 and value == 1:
            has_end = True
            break
        if count == 0 and value == 2:
            has_offsets = position + 2 <= len(content)
            x, y = (
                x + content[position],
                y + content[position + 1] if has_offsets else height,
            )
            position += 2
            continue
        if count:
            run = (
                bytes([value]) * count
                if is_wide
                else (bytes([value >> 4, value & 15]) * (count // 2 + 1))[:count]
            )
        else:
            size = value if is_wide else (value + 1) // 2
            run = content[position : position + size]
            if not is_wide:
                run = bytes(half for both in run for half in (both >> 4, both & 15))[:value]
            position += size + size % 2
        run = run[: max(0, width - x)]
        at = y * width + x
        pixels[at : at + len(run)] = run
        drawn[at : at + len(run)] = b"\1" * len(run)
        x += len(run)
    has_end = has_end or y >= height
    table = np.frombuffer(
        content, np.uint8, min(1024, len(content) - 14 - header_bytes), 14 + header_bytes
    )
    palette = np.zeros((256, 3), np.uint8)
    colors = table[: len(table) // 4 * 4].reshape(-1, 4)[
        : max(0, bmp.start - 14 - header_bytes) // 4, 2::-1
    ]
    palette[: len(colors)] = colors
    direction = 1 if bmp.is_top_down else -1
    rows = np.frombuffer(bytes(pixels), np.uint8).reshape(height, width)[::direction]
    free = np.frombuffer(bytes(drawn), np.uint8).reshape(height, width)[::direction] == 0
    shown = palette[rows]
    shown[free] = 0
    return Image.fromarray(shown), free, has_end


def read_profile(content: bytes, header_bytes: int) -> bytes | None:
    """Returns the ICC profile embedded in a BMP of version 5, or None."""
    if header_bytes != 124 or content[70:74] != b"DEBM":  # "MBED", least significant byte first
        return None
    offset = int.from_bytes(content[126:130], "little")
    size = int.from_bytes(content[130:134], "little")
    return content[14 + offset : 14 + offset + size] or None

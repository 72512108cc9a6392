"""Pictures that show their own number, and files that are no pictures, for the soak.

The number is in the colours of the two halves, so that whoever sees a picture, however small and
compressed, can say which one it is: the stand-in for the provider, and whoever checks a variant.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

LEVELS = 8  # of each channel, 32 apart: lossy formats change a large area by less than half of that
NUMBERS = LEVELS**6
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF", "bmp": "BMP"}
SIZES = ((320, 240), (240, 320), (48, 32), (700, 500), (1100, 620))


def draw(number: int, extension: str, size: tuple[int, int]) -> bytes:
    """Returns a file with the picture of that number, below `NUMBERS`."""
    digits = [number // LEVELS**place % LEVELS * 32 + 16 for place in range(6)]
    image = Image.new("RGB", size, tuple(digits[:3]))
    image.paste(tuple(digits[3:]), (size[0] // 2, 0, *size))
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[extension])
    return buffer.getvalue()


def read_number(image: Image.Image) -> int:
    """Returns the number that a picture shows."""
    halves = image.convert("RGB").resize((4, 1), Image.Resampling.BOX)
    digits = [*_pixel(halves, 0), *_pixel(halves, 3)]
    return sum(value // 32 * LEVELS**place for place, value in enumerate(digits))


def _pixel(image: Image.Image, x: int) -> tuple[int, int, int]:
    pixel = image.getpixel((x, 0))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


@dataclass(frozen=True)
class Bad:
    """How a file is spoilt, and the reason for which its image fails."""

    extension: str
    reason: str
    spoil: Callable[[int], bytes]


def _cut(number: int) -> bytes:
    content = draw(number, "jpg", (700, 500))
    return content[: len(content) * 2 // 3]


def _damage(number: int) -> bytes:
    content = draw(number, "png", (320, 240))
    middle = content.index(b"IDAT") + 12
    return content[:middle] + b"\xff" * 40 + content[middle + 40 :]


def _inflate(number: int) -> bytes:
    """A PNG of a few hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    data = zlib.compress(b"%d" % number + bytes(9000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


BAD = {
    "empty": Bad("jpg", "empty", lambda number: b""),
    "cut": Bad("jpg", "truncated", _cut),
    "damaged": Bad("png", "corrupt", _damage),
    "too large": Bad("png", "limits", _inflate),
    "document": Bad("jpg", "unsupported", lambda number: b"%%PDF-1.7\n%% %d\n" % number),
}

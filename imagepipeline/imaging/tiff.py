"""Reads the tags of a TIFF's first page (TIFF 6.0), and finds kinds that Pillow gets wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

NEW_SUBFILE_TYPE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 254, 258, 259, 262, 277
PLANES, EXTRA_SAMPLES, SAMPLE_FORMAT, STRIPS, TILES = 284, 338, 339, (273, 279), (324, 325)
WIDTH, HEIGHT, TILE_WIDTH = 256, 257, 322
# Bytes per value, by type; all other types take one.
VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
MAX_VALUES = 200_000  # per tag; further values are ignored
RAW, JPEG = 1, 7
COLORS, JPEG_TABLES, SUBSAMPLING = 320, 347, 530
KEPT_TAGS = (
    *(WIDTH, HEIGHT, NEW_SUBFILE_TYPE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES),
    *(EXTRA_SAMPLES, SAMPLE_FORMAT, COLORS, JPEG_TABLES, SUBSAMPLING, TILE_WIDTH, STRIPS[0]),
)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
POSSIBLE_BITS = {*range(1, 17), 24, 32, 64}
MAX_SAMPLES = 16
PHOTOMETRICS = {
    WHITE_IS_ZERO: "grey",
    BLACK_IS_ZERO: "grey",
    RGB: "RGB",
    PALETTE: "palette",
    4: "mask",
    CMYK: "CMYK",
    YCBCR: "YCbCr",
    8: "CIE Lab",
    9: "ICC Lab",
    10: "ITU Lab",
    32803: "camera raw",
    32844: "LogL",
    32845: "LogLuv",
    34892: "camera raw",
}
# Compressions that the libtiff in Pillow's wheels cannot read.
REFUSED_COMPRESSIONS = {
    32766: "NeXT",
    32809: "ThunderScan",
    34676: "SGI LogLuv",
    34677: "SGI LogLuv",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}


@dataclass(frozen=True)
class Tiff:
    """The first page of a TIFF file.

    Attributes:
        order: byte order.
        is_big: whether the file is a BigTIFF.
        end: the offset after the last byte of tags and pixels; beyond the file if it is cut off.
        tags: values of the tags listed in `KEPT_TAGS`.
        pieces: (offset, length) of the strips or tiles.
    """

    order: Literal["little", "big"]
    is_big: bool
    end: int
    tags: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pieces: tuple[tuple[int, int], ...] = ()

    def first(self, tag: int, default: int) -> int:
        """Returns the first value of a tag."""
        return (self.tags.get(tag) or (default,))[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.first(WIDTH, 0), self.first(HEIGHT, 0)

    @property
    def is_preview(self) -> bool:
        """Whether the page is a reduced copy of another, as in camera raw files."""
        return bool(self.first(NEW_SUBFILE_TYPE, 0) & 1)

    @property
    def has_bytes_as_colors(self) -> bool:
        """Whether its palette has values of 8 bits, as old writers left it, instead of 16."""
        colors = self.tags.get(COLORS, ())
        return (
            self.first(PHOTOMETRIC, BLACK_IS_ZERO) == PALETTE and 0 < max(colors, default=0) < 256
        )

    def find_refusal(self) -> str | None:
        """Returns a description of the page if it would be decoded wrongly or not at all."""
        if self.is_big and self.order == "big":
            return "a BigTIFF in big-endian byte order"
        bits = self.tags.get(BITS) or (1,)
        extra = self.tags.get(EXTRA_SAMPLES, ())
        compression = self.first(COMPRESSION, RAW)
        photometric = self.first(PHOTOMETRIC, BLACK_IS_ZERO)
        sample_format = self.first(SAMPLE_FORMAT, UNSIGNED)
        if compression in REFUSED_COMPRESSIONS:
            return f"a TIFF compressed as {REFUSED_COMPRESSIONS[compression]}"
        if sample_format == SIGNED and max(bits) <= 8:
            return self.describe()
        is_subsampled = (self.tags.get(SUBSAMPLING) or (2, 2)) != (1, 1)
        if photometric == YCBCR and compression == RAW and is_subsampled:
            return f"{self.describe()}, whose colours have fewer samples than its brightness"
        if compression == RAW and {TILE_WIDTH, STRIPS[0]} <= self.tags.keys():
            return f"{self.describe()}, whose tiles are listed as strips"
        if self.first(PLANES, 1) == 2 and self.first(SAMPLES, 1) > 1:
            # Pillow reads uncompressed planes as if they had 8 bits and no alpha, and never reads
            # planes of grey with alpha correctly.
            is_grey = photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
            if is_grey or (compression == RAW and (max(bits) > 8 or (extra and extra != (2,)))):
                return self.describe()
        return None

    @property
    def is_plausible(self) -> bool:
        """Whether the tags are consistent; if not, they are damaged."""
        bits, count = self.tags.get(BITS) or (1,), self.first(SAMPLES, 1)
        is_counted = len(bits) in (1, count) and 1 <= count <= MAX_SAMPLES
        return (
            is_counted
            and set(bits) <= POSSIBLE_BITS
            and self.first(PHOTOMETRIC, BLACK_IS_ZERO) in PHOTOMETRICS
        )

    def describe(self) -> str:
        """Describes the pixels in words, such as "a CMYK TIFF with 4 x 8-bit samples"."""
        bits, count = self.tags.get(BITS) or (1,), self.first(SAMPLES, 1)
        depth = str(bits[0]) if len(set(bits)) == 1 else "/".join(map(str, bits[:8]))
        kind = {SIGNED: " signed", FLOAT: " floating-point"}.get(
            self.first(SAMPLE_FORMAT, UNSIGNED), ""
        )
        photometric = self.first(PHOTOMETRIC, BLACK_IS_ZERO)
        color = PHOTOMETRICS.get(photometric, "TIFF")
        article = "an" if color[0] in "RI" else "a"
        planes = ", in separate planes" if self.first(PLANES, 1) == 2 and count > 1 else ""
        return f"{article} {color} TIFF with {count} x {depth}-bit{kind} samples{planes}"


def read_tiff(content: bytes) -> Tiff | None:
    """Parses the first page; returns None if the file ends within its tags."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"

    def read(position: int, size: int) -> int:
        return int.from_bytes(content[position : position + size], order)

    is_big = read(2, 2) == 43
    word, count_size, entry_size = (8, 8, 20) if is_big else (4, 2, 12)
    start = read(8 if is_big else 4, word)
    if start + count_size > len(content) or start < 8:
        return None
    entries = start + count_size
    end = entries + entry_size * read(start, count_size) + word
    if end - word > len(content):
        return None
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(entries, end - word, entry_size):
        tag, kind, count = read(entry, 2), read(entry + 2, 2), read(entry + 4, word)
        size = VALUE_BYTES.get(kind, 1)
        inline = entry + 4 + word
        position = inline if size * count <= word else read(inline, word)
        if tag in (*KEPT_TAGS, *STRIPS, *TILES):
            if position + size * count > len(content):
                return None
            tags[tag] = tuple(
                read(position + index * size, size) for index in range(min(count, MAX_VALUES))
            )
    pieces = tuple(
        piece
        for offsets, counts in (STRIPS, TILES)
        for piece in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)
    )
    end = max(end, *(offset + count for offset, count in pieces), 0)
    kept = {tag: values for tag, values in tags.items() if tag in KEPT_TAGS}
    return Tiff(order, is_big, end, kept, pieces)

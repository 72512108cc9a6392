"""Reads the boxes of an AVIF or HEIC file (ISO/IEC 14496-12 and 23008-12)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_BOXES = 10_000  # a phone's grid has a few hundred
# Item types without pixels of their own (ISO/IEC 23008-12, 6.6.2).
DERIVED = (b"grid", b"iovl", b"iden")
MAX_DERIVATIONS = 4


@dataclass(frozen=True)
class Item:
    """The primary item of a file: the picture to show.

    Attributes:
        coding: four-letter type of the coded data (`av01`, `hvc1`, …); for a grid, the type of
            its tiles; b"" if unknown.
        properties: type and content of its property boxes, in the order in which they apply.
        extents: (offset, length) of the coded data in the file, its tiles' included; empty if the
            data is stored another way.
    """

    coding: bytes = b""
    properties: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[tuple[int, int], ...] = ()

    def find(self, kind: bytes) -> bytes | None:
        """Returns the content of the first property of a type, or None."""
        return next((content for name, content in self.properties if name == kind), None)


def read_brands(content: bytes) -> frozenset[bytes]:
    """Returns the major and compatible brands (ISO/IEC 14496-12, 4.3).

    The set is empty if the file does not begin with an `ftyp` box.
    """
    if content[4:8] != b"ftyp":
        return frozenset()
    box = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
    return frozenset(box[start : start + 4] for start in (0, *range(8, len(box), 4)))


def find_end(content: bytes) -> int:
    """Returns the offset at which the last top-level box should end.

    It lies beyond the end of the file if the file is cut off.
    """
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # 0 means "to the end of the file"; other sizes below 8 are damage
            return len(content)
        position += size
    return position if position >= len(content) else position + 8  # the last header is cut off


def read_primary_item(content: bytes) -> Item:
    """Returns the primary item of the file; an empty `Item` if the boxes cannot be parsed."""
    try:
        return _read_primary_item(content)
    except (ValueError, IndexError):  # a box is cut off: the decoder will report the damage
        return Item()


def _read_primary_item(content: bytes) -> Item:
    boxes = _Meta()
    for name, first, last in walk(content, 0, len(content)):
        if name == b"meta":
            for kind, start, stop in walk(content, first + 4, last):
                boxes.add(kind, content[start:stop])
            break
    coded = boxes.find_coded(boxes.primary)
    properties = boxes.find_properties(boxes.primary)
    if not any(kind == b"colr" for kind, _ in properties):  # a grid's tiles may have it instead
        properties += [one for one in boxes.find_properties(coded[0]) if one[0] == b"colr"]
    extents = (extent for item in coded for extent in boxes.extents.get(item, ()))
    return Item(boxes.types.get(coded[0], b""), tuple(properties), tuple(extents))


@dataclass
class _Meta:
    """Contents of the boxes inside `meta`, by item ID."""

    primary: int = 0
    types: dict[int, bytes] = field(default_factory=dict)
    tiles: dict[int, tuple[int, ...]] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    associations: dict[int, list[int]] = field(default_factory=dict)

    def find_coded(self, item: int) -> list[int]:
        """Returns the coded items that a grid or overlay is composed of.

        For an item that is itself coded, this is the item alone.
        """
        level = [item]
        for _ in range(MAX_DERIVATIONS):
            inputs = [tile for one in level for tile in self.tiles.get(one, ())]
            if not inputs or self.types.get(level[0]) not in DERIVED:
                break
            level = list(dict.fromkeys(inputs))
        return level

    def find_properties(self, item: int) -> list[tuple[bytes, bytes]]:
        return [self.properties[index - 1] for index in self.associations.get(item, ()) if index]

    def add(self, kind: bytes, box: bytes) -> None:
        if kind == b"pitm":
            self.primary = int.from_bytes(box[4:] if box[0] else box[4:6], "big")
        elif kind == b"iinf":
            self._add_types(box)
        elif kind == b"iref":
            self._add_references(box)
        elif kind == b"iloc":
            self._add_locations(_Reader(box))
        elif kind == b"iprp":
            for name, start, stop in walk(box, 0, len(box)):
                if name == b"ipco":
                    inner = box[start:stop]
                    self.properties = [
                        (what, inner[a:b]) for what, a, b in walk(inner, 0, len(inner))
                    ]
                elif name == b"ipma":
                    self._add_associations(_Reader(box[start:stop]))

    def _add_types(self, box: bytes) -> None:
        for kind, start, stop in walk(box, 8 if box[0] else 6, len(box)):
            if kind == b"infe" and box[start] in (2, 3):
                width = 2 if box[start] == 2 else 4
                item = int.from_bytes(box[start + 4 : start + 4 + width], "big")
                self.types[item] = box[start + 6 + width : min(start + 10 + width, stop)]

    def _add_references(self, box: bytes) -> None:
        width = 4 if box[0] else 2
        for kind, start, stop in walk(box, 4, len(box)):
            if kind == b"dimg":
                reader = _Reader(box[start:stop])
                item, count = reader.number(width), reader.number(2)
                self.tiles[item] = tuple(reader.number(width) for _ in range(count))

    def _add_associations(self, reader: "_Reader") -> None:
        version, flags = reader.number(1), reader.number(3)
        for _ in range(reader.number(4)):
            item = reader.number(4 if version else 2)
            for _ in range(reader.number(1)):
                index = reader.number(2) & 0x7FFF if flags & 1 else reader.number(1) & 0x7F
                self.associations.setdefault(item, []).append(index)

    def _add_locations(self, reader: "_Reader") -> None:
        version = reader.number(4) >> 24
        sizes = reader.number(2)
        offset_size, length_size, base_size, index_size = (
            sizes >> shift & 15 for shift in (12, 8, 4, 0)
        )
        for _ in range(reader.number(4 if version == 2 else 2)):
            item = reader.number(4 if version == 2 else 2)
            method = reader.number(2) & 15 if version else 0
            reader.number(2)  # the data reference; we assume this file
            base = reader.number(base_size)
            for _ in range(reader.number(2)):
                if version:
                    reader.number(index_size)
                offset, length = base + reader.number(offset_size), reader.number(length_size)
                if method == 0:
                    self.extents.setdefault(item, []).append((offset, length))


class _Reader:
    """Reads the numbers of a box one after the other; raises ValueError past its end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def number(self, size: int) -> int:
        if self._position + size > len(self._content):
            raise ValueError("the box ends too early")
        self._position += size
        return int.from_bytes(self._content[self._position - size : self._position], "big")


def walk(content: bytes | bytearray, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the type, and the content's start and end, of each box between two offsets."""
    for _ in range(MAX_BOXES):
        if position + 8 > end:
            return
        size, header = int.from_bytes(content[position : position + 4], "big"), 8
        kind = bytes(content[position + 4 : position + 8])
        if size == 1:
            size, header = int.from_bytes(content[position + 8 : position + 16], "big"), 16
        stop = end if size == 0 else position + size
        if (size and size < header) or stop > end:
            return
        yield kind, position + header, stop
        position = stop


def set_play_count(content: bytes, play_count: int) -> bytes:
    """Sets how often an animated AVIF written by libavif is played.

    The edit list holds the duration of one round and says that it repeats, until the duration of
    the track is over (ISO/IEC 14496-12, 8.6.6).

    Args:
        content: the AVIF.
        play_count: the number of rounds; 0 for endless, which is what libavif writes.

    Returns:
        The changed AVIF.
    """
    if not play_count:
        return content
    changed = bytearray(content)
    for kind, start, end in walk(content, 0, len(content)):
        if kind == b"moov":
            _set_durations(changed, start, end, play_count)
    return bytes(changed)


def _set_durations(content: bytearray, start: int, end: int, play_count: int) -> None:
    longest = 0
    boxes = [*walk(content, start, end)]
    for kind, first, last in boxes:
        if kind == b"trak":
            inner = {name: (one, other) for name, one, other in walk(content, first, last)}
            lists = {name: one for name, one, _ in walk(content, *inner.get(b"edts", (0, 0)))}
            # After version, flags and the number of entries.
            round_start = lists.get(b"elst", 0) + 8
            duration = play_count * int.from_bytes(content[round_start : round_start + 8], "big")
            # After version, flags, two dates, the track's ID and 4 reserved bytes.
            at = inner[b"tkhd"][0] + 28
            content[at : at + 8] = duration.to_bytes(8, "big")
            longest = max(longest, duration)
    for kind, first, _ in boxes:
        if kind == b"mvhd":
            # After version, flags, two dates and the time scale.
            content[first + 24 : first + 32] = longest.to_bytes(8, "big")

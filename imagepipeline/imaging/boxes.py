"""What the boxes of an AVIF or HEIC file say of its picture (ISO/IEC 14496-12 and 23008-12)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_BOXES = 10_000  # a grid of a phone has some hundreds
DERIVED = (
    b"grid",
    b"iovl",
    b"iden",
)  # item types without pixels of their own, ISO/IEC 23008-12, 6.6.2
MAX_DERIVATIONS = 4


@dataclass(frozen=True)
class Item:
    """The primary item: how it is coded and what it is decorated with.

    `coding` is its four-letter type (`av01`, `hvc1`, …), for a grid that of its tiles, b"" where there is none.
    `properties` are the contents of its property boxes by type, in the order in which they apply.
    `extents` are (offset, length) of its own and its tiles' bytes in the file; empty where they lie elsewhere.
    """

    coding: bytes = b""
    properties: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[tuple[int, int], ...] = ()

    def find(self, kind: bytes) -> bytes | None:
        """The content of its first property of that type."""
        return next((content for name, content in self.properties if name == kind), None)


def read_brands(content: bytes) -> frozenset[bytes]:
    """The major and compatible brands (ISO/IEC 14496-12, 4.3); none if it is no such file."""
    if content[4:8] != b"ftyp":
        return frozenset()
    box = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
    return frozenset(box[start : start + 4] for start in (0, *range(8, len(box), 4)))


def find_end(content: bytes) -> int:
    """Where the last top-level box ends, by what it says: beyond the file if that is cut off."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file; less: damaged
            return len(content)
        position += size
    return position if position >= len(content) else position + 8  # a part of a header is left


def read_primary_item(content: bytes) -> Item:
    """The primary item of the file; an empty one where its boxes cannot be followed."""
    try:
        return _read_primary_item(content)
    except (ValueError, IndexError):  # boxes that end too early: the decoder will say what is wrong
        return Item()


def _read_primary_item(content: bytes) -> Item:
    boxes = _Meta()
    for name, first, last in walk(content, 0, len(content)):
        if name == b"meta":
            for kind, start, stop in walk(content, first + 4, last):
                boxes.take(kind, content[start:stop])
            break
    coded = boxes.find_coded(boxes.primary)
    properties = boxes.find_properties(boxes.primary)
    if not any(
        kind == b"colr" for kind, _ in properties
    ):  # of a grid it may stand at its tiles alone
        properties += [one for one in boxes.find_properties(coded[0]) if one[0] == b"colr"]
    extents = (extent for item in coded for extent in boxes.extents.get(item, ()))
    return Item(boxes.types.get(coded[0], b""), tuple(properties), tuple(extents))


@dataclass
class _Meta:
    """What the boxes below `meta` tell, by item ID."""

    primary: int = 0
    types: dict[int, bytes] = field(default_factory=dict)
    tiles: dict[int, tuple[int, ...]] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    associations: dict[int, list[int]] = field(default_factory=dict)

    def find_coded(self, item: int) -> list[int]:
        """The items whose pictures an item is made of, through grids and overlays; itself if it is coded itself."""
        level = [item]
        for _ in range(MAX_DERIVATIONS):
            made_of = [part for one in level for part in self.tiles.get(one, ())]
            if not made_of or self.types.get(level[0]) not in DERIVED:
                break
            level = list(dict.fromkeys(made_of))
        return level

    def find_properties(self, item: int) -> list[tuple[bytes, bytes]]:
        return [self.properties[index - 1] for index in self.associations.get(item, ()) if index]

    def take(self, kind: bytes, box: bytes) -> None:
        if kind == b"pitm":
            self.primary = int.from_bytes(box[4:] if box[0] else box[4:6], "big")
        elif kind == b"iinf":
            self._take_types(box)
        elif kind == b"iref":
            self._take_references(box)
        elif kind == b"iloc":
            self._take_locations(_Reader(box))
        elif kind == b"iprp":
            for name, start, stop in walk(box, 0, len(box)):
                if name == b"ipco":
                    inner = box[start:stop]
                    self.properties = [
                        (what, inner[a:b]) for what, a, b in walk(inner, 0, len(inner))
                    ]
                elif name == b"ipma":
                    self._take_associations(_Reader(box[start:stop]))

    def _take_types(self, box: bytes) -> None:
        for kind, start, stop in walk(box, 8 if box[0] else 6, len(box)):
            if kind == b"infe" and box[start] in (2, 3):
                width = 2 if box[start] == 2 else 4
                item = int.from_bytes(box[start + 4 : start + 4 + width], "big")
                self.types[item] = box[start + 6 + width : min(start + 10 + width, stop)]

    def _take_references(self, box: bytes) -> None:
        width = 4 if box[0] else 2
        for kind, start, stop in walk(box, 4, len(box)):
            if kind == b"dimg":
                reader = _Reader(box[start:stop])
                item, count = reader.number(width), reader.number(2)
                self.tiles[item] = tuple(reader.number(width) for _ in range(count))

    def _take_associations(self, reader: "_Reader") -> None:
        version, flags = reader.number(1), reader.number(3)
        for _ in range(reader.number(4)):
            item = reader.number(4 if version else 2)
            for _ in range(reader.number(1)):
                index = reader.number(2) & 0x7FFF if flags & 1 else reader.number(1) & 0x7F
                self.associations.setdefault(item, []).append(index)

    def _take_locations(self, reader: "_Reader") -> None:
        version = reader.number(4) >> 24
        sizes = reader.number(2)
        offset_size, length_size, base_size, index_size = (
            sizes >> shift & 15 for shift in (12, 8, 4, 0)
        )
        for _ in range(reader.number(4 if version == 2 else 2)):
            item = reader.number(4 if version == 2 else 2)
            method = reader.number(2) & 15 if version else 0
            reader.number(2)  # in which file: always this one
            base = reader.number(base_size)
            for _ in range(reader.number(2)):
                if version:
                    reader.number(index_size)
                offset, length = base + reader.number(offset_size), reader.number(length_size)
                if method == 0:
                    self.extents.setdefault(item, []).append((offset, length))


class _Reader:
    """Numbers of a box, one after the other; past its end a ValueError."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def number(self, size: int) -> int:
        if self._position + size > len(self._content):
            raise ValueError("the box ends too early")
        self._position += size
        return int.from_bytes(self._content[self._position - size : self._position], "big")


def walk(content: bytes | bytearray, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of each box between two positions."""
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
    """An animated AVIF, as libavif writes it, that is shown so often; 0 for ever, which is what libavif writes.

    Its edit list names the duration of one round and says that it repeats; it does until the duration of its tracks
    is over (ISO/IEC 14496-12, 8.6.6).
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
            round_start = (
                lists.get(b"elst", 0) + 8
            )  # behind version, flags and the number of entries
            duration = play_count * int.from_bytes(content[round_start : round_start + 8], "big")
            at = (
                inner[b"tkhd"][0] + 28
            )  # behind version, flags, two dates, the track's ID and 4 bytes
            content[at : at + 8] = duration.to_bytes(8, "big")
            longest = max(longest, duration)
    for kind, first, _ in boxes:
        if kind == b"mvhd":
            content[first + 24 : first + 32] = longest.to_bytes(
                8, "big"
            )  # behind version, flags, dates, time scale

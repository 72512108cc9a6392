"""Reads an ICC profile's code points, and reads and replaces its curve (ICC.1:2022)."""

import struct

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES, ENTRY_BYTES, MAX_TAGS = 128, 12, 100
COLOR_CURVES, GREY_CURVES = (b"rTRC", b"gTRC", b"bTRC"), (b"kTRC",)
STEPS = 65_536


def read_curve(profile: bytes) -> NDArray[np.float64] | None:
    """The linear light (0..1) of each value of 16 bits, if one curve says it for all channels.

    None for profiles of other kinds, and for curves that are not needed here.
    """
    tags = _read_tags(profile)
    names = {b"RGB ": COLOR_CURVES, b"GRAY": GREY_CURVES}.get(profile[16:20])
    if names is None or b"A2B0" in tags or not all(name in tags for name in names):
        return None
    contents = {profile[start : start + size] for start, size in map(tags.__getitem__, names)}
    return _evaluate(contents.pop()) if len(contents) == 1 else None


def read_codes(profile: bytes) -> tuple[int, int] | None:
    """The code points of primaries and curve (ITU-T H.273) in a profile of RGB (9.2.17, 10.3).

    None if it has none, or none of full-range RGB.
    """
    start, size = _read_tags(profile).get(b"cicp", (0, 0))
    content = profile[start : start + size]
    is_rgb = profile[16:20] == b"RGB " and content[:4] == b"cicp" and content[10:12] == b"\0\1"
    return (content[8], content[9]) if is_rgb else None


def replace_curve(profile: bytes, linear: NDArray[np.floating]) -> bytes:
    """The profile of a picture in colours with another curve, given by steps of equal size."""
    curve = struct.pack(">4s4xI", b"curv", len(linear))
    curve += (linear * (STEPS - 1)).round().astype(">u2").tobytes()
    changed = bytearray(profile.ljust(-(-len(profile) // 4) * 4, b"\0"))
    place = struct.pack(">II", len(changed), len(curve))
    for at in _list_entries(profile):
        if profile[at : at + 4] in COLOR_CURVES:
            changed[at + 4 : at + 12] = place
    changed += curve
    changed[:4] = len(changed).to_bytes(4, "big")
    return bytes(changed)


def _list_entries(profile: bytes) -> range:
    count = min(int.from_bytes(profile[HEADER_BYTES : HEADER_BYTES + 4], "big"), MAX_TAGS)
    start = HEADER_BYTES + 4
    return range(start, min(start + count * ENTRY_BYTES, len(profile) - 11), ENTRY_BYTES)


def _read_tags(profile: bytes) -> dict[bytes, tuple[int, int]]:
    """The offset and length of each tag, by its name."""
    return {
        name: (start, size)
        for name, start, size in (
            struct.unpack_from(">4sII", profile, at) for at in _list_entries(profile)
        )
    }


def _evaluate(content: bytes) -> NDArray[np.float64] | None:
    """What a tag of type `curv`, or the simplest kind of `para`, says (10.6, 10.18)."""
    values = np.linspace(0, 1, STEPS)
    kind, count = content[:4], int.from_bytes(content[8:12], "big")
    if kind == b"para" and content[8:10] == b"\0\0" and len(content) >= 16:
        return np.asarray(values ** (int.from_bytes(content[12:16], "big") / 65_536))
    if kind != b"curv" or len(content) < 12 + 2 * count:
        return None
    if count == 0:
        return values
    if count == 1:
        return np.asarray(values ** (int.from_bytes(content[12:14], "big") / 256))
    entries = np.frombuffer(content, ">u2", count, 12) / (STEPS - 1)
    return np.interp(values, np.linspace(0, 1, count), entries)

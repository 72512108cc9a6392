"""EXIF: which way up a picture is, and the few texts that are kept.

EXIF is decoration: however broken it is, the picture is not.
"""

import contextlib
import re
from typing import Literal

from PIL import ExifTags, Image

from imagepipeline.imaging.drawing import clean

# By EXIF orientation: how to rotate or mirror the stored picture (CIPA DC-008, 4.6.4).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
START = re.compile(rb"\A(Exif\0\0){1,2}")
ORDERS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
INTEGER_BYTES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # by TIFF's types


def parse(content: bytes) -> Image.Exif:
    """The tags in raw EXIF data; none if they cannot be read."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):
        exif.load(content)
    return exif


def find_orientation(content: bytes) -> int:
    """The orientation (1..8) in raw EXIF data; 1 if there is none.

    It is read from the first directory as it is there (TIFF 6.0, section 2). Pillow gives up at the
    first tag that is broken, and orientation, the one that matters, comes after the camera's name.
    """
    tiff = START.sub(b"", content)
    order = ORDERS.get(tiff[:2])
    if order is None:
        return 1

    def read(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    orientation, directory = 1, read(4, 4)
    first = directory + 2
    for entry in range(first, min(first + 12 * read(directory, 2), len(tiff)), 12):
        size = INTEGER_BYTES.get(read(entry + 2, 2), 0)
        is_whole = entry + 8 + size <= len(tiff)
        if read(entry, 2) == ExifTags.Base.Orientation and read(entry + 4, 4) == 1 and is_whole:
            orientation = read(entry + 8, size)
    return orientation if orientation in TURNS else 1


def read_texts(exif: Image.Exif) -> dict[str, str | None]:
    """The texts that are kept, by their names in `Decoded`."""
    try:
        details = exif.get_ifd(ExifTags.IFD.Exif)
        texts = {
            "camera": clean(exif.get(ExifTags.Base.Model), 40),
            "artist": clean(exif.get(ExifTags.Base.Artist), 200),
            "copyright": clean(exif.get(ExifTags.Base.Copyright), 200),
        }
        taken = clean(
            details.get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime), 40
        )
    except Exception:
        return {}
    digits = (taken or "")[:10].replace(":", "-")
    texts["taken_on"] = digits if digits[:4].isdigit() and digits.strip("0-") else None
    return texts

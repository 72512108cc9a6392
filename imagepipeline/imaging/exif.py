"""EXIF: which way up a picture is, and the few texts that are kept.

EXIF is decoration: however broken it is, the picture is not.
"""

import contextlib

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


def parse(content: bytes) -> Image.Exif:
    """The tags in raw EXIF data; none if they cannot be read."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):
        exif.load(content)
    return exif


def read(exif: Image.Exif) -> tuple[int, dict[str, str | None]]:
    """The orientation (1..8), and the texts that are kept, by their names in `Decoded`."""
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
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1, {}
    digits = (taken or "")[:10].replace(":", "-")
    texts["taken_on"] = digits if digits[:4].isdigit() and digits.strip("0-") else None
    return orientation if orientation in TURNS else 1, texts

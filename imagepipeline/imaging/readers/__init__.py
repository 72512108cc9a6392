"""For each accepted format: reads the header, checks the limits, and decodes the pixels."""

from collections.abc import Callable

from imagepipeline.imaging.limits import Rules
from imagepipeline.imaging.readers.bmp import read_bmp
from imagepipeline.imaging.readers.gif import read_gif
from imagepipeline.imaging.readers.heif import read_avif, read_heif
from imagepipeline.imaging.readers.jpeg import read_jpeg
from imagepipeline.imaging.readers.png import read_png
from imagepipeline.imaging.readers.source import Source
from imagepipeline.imaging.readers.tiff import read_tiff
from imagepipeline.imaging.readers.webp import read_webp

READERS: dict[str, Callable[[bytes, Rules], Source]] = {
    "JPEG": read_jpeg,
    "PNG": read_png,
    "WEBP": read_webp,
    "GIF": read_gif,
    "AVIF": read_avif,
    "TIFF": read_tiff,
    "BMP": read_bmp,
    "HEIF": read_heif,
}

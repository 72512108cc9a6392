"""The operations that a run may call in its sandbox, and the zygote's warm-up.

After the warm-up, a decoder needs to open no file.
"""

import io
from collections.abc import Callable
from typing import Any

from PIL import ExifTags, Image, ImageCms

from imagepipeline.errors import PermanentError
from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.inspection import inspect
from imagepipeline.imaging.preparation import prepare
from imagepipeline.imaging.variants import render, render_and_inspect
from imagepipeline.models import VariantSpec, build_variant_specs
from imagepipeline.output_formats import OUTPUT_FORMATS

MAKERS: tuple[Callable[..., Any], ...] = (decode,)  # each makes the value that a child holds
# Each takes the held value as its first argument.
CALLS: tuple[Callable[..., Any], ...] = (prepare, render, render_and_inspect, inspect)
# MPO is a JPEG with more than one picture.
WARMED_SPECS = (
    *build_variant_specs(),
    *(
        VariantSpec("", 40, one.name, one.default_quality, 40, "cover", "attention")
        for one in OUTPUT_FORMATS.values()
    ),
)
WARMED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "MPO")


def warm_up() -> None:
    """Processes an image of each format, because libraries load much on their first use."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture, other = (Image.new("RGB", (64, 48), color) for color in ("#3060c0", "#c06030"))
    for format_ in WARMED_FORMATS:
        buffer = io.BytesIO()
        further = {"save_all": True, "append_images": [other]} if format_ == "MPO" else {}
        picture.save(buffer, format_, exif=exif, icc_profile=profile, **further)
        decoded = decode(buffer.getvalue())
        prepare(decoded)
        render_and_inspect(decoded, WARMED_SPECS, has_rights=True)
        for damaged in (
            buffer.getvalue()[:-40],
            buffer.getvalue()[:20],
            b"GIF89a" + buffer.getvalue(),
        ):
            try:
                decode(damaged)
            except PermanentError:
                continue

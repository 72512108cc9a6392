"""The odd and hostile files that people upload, generated in code, each with its expected result.

python -m imagepipeline_tests.imaging.odd_files           processes them and prints a table
python -m imagepipeline_tests.imaging.odd_files FOLDER    does the same with the files of a folder
… --sheet sheet.png                                       also draws a contact sheet
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, PngImagePlugin
from rich.console import Console
from rich.table import Table

from imagepipeline.errors import ImagePipelineError
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.inspection import choose_compared
from imagepipeline.imaging.preparation import prepare
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import render_and_inspect
from imagepipeline.imaging.verification import (
    ImpossibleAnswerError,
    verify_own_inspections,
    verify_prepared,
    verify_variants,
)
from imagepipeline.models import Variant, build_variant_specs

SAMPLES = Path(__file__).parent / "samples"
PHOTO = Path(__file__).parent.parent.parent / "imagepipeline" / "demo_photos" / "cat.jpg"
SIZE = (96, 64)
KEEP = Rules(is_animation_kept=True)
JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarting": {"restart_marker_rows": 1},
    "grey": {},
}
# Upper left, upper right, lower left, lower right. Any wrong rotation or swap of channels shows.
CORNERS = ((200, 40, 40), (40, 180, 60), (50, 60, 200), (230, 230, 220))
# Code points of ITU-T H.273, and the colours of the corners with them.
STATED_COLORS: tuple[tuple[str, tuple[int, int], tuple[tuple[int, ...], ...]], ...] = (
    ("Display P3", (12, 13), ((218, 0, 26), (0, 183, 30), (47, 60, 208), (230, 230, 219))),
    ("BT.2020", (9, 13), ((249, 0, 27), (0, 190, 14), (0, 58, 210), (231, 230, 219))),
    ("linear", (1, 8), ((229, 110, 110), (110, 219, 133), (122, 133, 229), (244, 244, 239))),
    ("PQ", (9, 16), ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 212))),
    ("HLG", (9, 18), ((230, 0, 13), (0, 170, 0), (0, 40, 177), (235, 234, 211))),
    ("BT.709", (1, 1), ((197, 28, 28), (28, 176, 49), (39, 49, 197), (229, 229, 218))),
)
# By EXIF orientation: the transformation from the picture to what a camera stores (CIPA DC-008,
# 4.6.4).
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Case:
    """A file and its expected result.

    Attributes:
        name: describes the file.
        content: the bytes of the file.
        outcome: `completed`, or the reason for the failure.
        colors: RGB or RGBA of the four corners; None for a different picture.
        sentence: a part of the error message.
        rules: the rules for decoding.
    """

    name: str
    content: bytes
    outcome: str = "completed"
    colors: tuple[tuple[int, ...], ...] | None = CORNERS
    sentence: str = ""
    rules: Rules = field(default_factory=Rules)


def list_groups() -> tuple[Callable[[], Iterator[Case]], ...]:
    """The functions that make them, a kind of file each."""
    return (
        modes,
        orientations,
        profiles,
        stated_colors,
        transparent_colors,
        partial_frames,
        kinds_of_tiff,
        kinds_of_bmp,
        kinds_of_jpeg,
        cropped,
        many_frames,
        kept_animations,
        heif_samples,
        large,
        bombs,
        truncated,
        harmless_flaws,
        damaged,
        found_by_fuzzing,
        refused,
    )


def cases() -> Iterator[Case]:
    """Yields all cases; a name begins with the name of the group."""
    for group in list_groups():
        for case in group():
            yield replace(case, name=f"{group.__name__}: {case.name}")


# ---- the picture


def picture(mode: str = "RGB") -> Image.Image:
    """Draws the four corners in a mode of Pillow."""
    image = Image.new("RGB", SIZE)
    for index, color in enumerate(CORNERS):
        x, y = index % 2 * SIZE[0] // 2, index // 2 * SIZE[1] // 2
        image.paste(color, (x, y, x + SIZE[0] // 2, y + SIZE[1] // 2))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert converted is not None
        return converted
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        alpha = Image.new("L", SIZE, 255)
        alpha.paste(0, (SIZE[0] // 2, SIZE[1] // 2, *SIZE))
        image.putalpha(alpha)
        return image
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(image.convert("L"))
        kinds = {
            "I;16": grey.astype(np.uint16) * 257,
            "I": grey.astype(np.int32) * 65_536,
            "F": grey / np.float32(255),
        }
        return Image.fromarray(kinds[mode])
    return image.quantize(4) if mode == "P" else image.convert(mode, dither=Image.Dither.NONE)


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    """Encodes the image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def photo_as(format_: str, **options: object) -> bytes:
    """Encodes a photo with detail in every row."""
    image = Image.open(PHOTO).convert("RGB")
    return encode(image.quantize() if format_ == "GIF" else image, format_, **options)


def _grey() -> tuple[tuple[int, ...], ...]:
    return tuple((round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in CORNERS)


def _with_transparent_corner(colors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return (*((*color, 255) for color in colors[:3]), (0, 0, 0, 0))


def _stretched(colors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Stretches values with no agreed white: the darkest become black, the lightest white."""
    values = [color[0] for color in colors]
    low, high = min(values), max(values)
    return tuple((round((value - low) * 255 / (high - low)),) * 3 for value in values)


# ---- pictures that must be decoded correctly


def modes() -> Iterator[Case]:
    """Yields every mode of every format."""
    colored = {
        "PNG": ("RGB", "P"),
        "JPEG": ("RGB", "CMYK"),
        "WEBP": ("RGB",),
        "GIF": ("P",),
        "AVIF": ("RGB",),
        "TIFF": ("RGB", "P", "CMYK", "LAB", "YCbCr"),
        "BMP": ("RGB", "P"),
    }
    for format_, names in colored.items():
        for mode in names:
            yield Case(f"{format_} {mode}", encode(picture(mode), format_))
    for format_ in ("PNG", "JPEG", "GIF", "AVIF", "TIFF", "BMP", "WEBP"):
        yield Case(f"{format_} L", encode(picture("L"), format_), colors=_grey())
    for format_ in ("PNG", "TIFF"):
        yield Case(f"{format_} I;16", encode(picture("I;16"), format_), colors=_grey())
        yield Case(
            f"{format_} LA",
            encode(picture("LA"), format_),
            colors=_with_transparent_corner(_grey()),
        )
    for mode in ("I", "F"):
        yield Case(f"TIFF {mode}", encode(picture(mode), "TIFF"), colors=_stretched(_grey()))
    for format_ in ("PNG", "WEBP", "AVIF", "TIFF"):
        yield Case(
            f"{format_} RGBA",
            encode(picture("RGBA"), format_),
            colors=_with_transparent_corner(CORNERS),
        )
    for format_ in ("PNG", "TIFF", "BMP", "GIF"):
        yield Case(
            f"{format_} 1", encode(picture("1"), format_), colors=(*((0,) * 3,) * 3, (255,) * 3)
        )
    palette = picture("P")
    clear = palette.getpixel((SIZE[0] - 9, SIZE[1] - 9))
    for format_ in ("PNG", "GIF"):
        yield Case(
            f"{format_} P with a transparent colour",
            encode(palette, format_, transparency=clear),
            colors=_with_transparent_corner(CORNERS),
        )
    yield Case(
        "PNG RGB with a transparent colour",
        encode(picture(), "PNG", transparency=CORNERS[3]),
        colors=_with_transparent_corner(CORNERS),
    )
    yield Case("PNG RGB of 16 bits", _png_of_16_bits())
    yield Case("TIFF RGB of 16 bits", _tiff_of_16_bits())
    yield Case(
        "TIFF with premultiplied alpha", _premultiplied(), colors=_with_transparent_corner(CORNERS)
    )
    yield Case("JPEG progressive", encode(picture(), "JPEG", progressive=True))
    yield Case("JPEG 4:4:4", encode(picture(), "JPEG", subsampling=0))
    yield Case("WEBP lossless", encode(picture(), "WEBP", lossless=True))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield Case(f"TIFF {compression}", encode(picture(), "TIFF", compression=compression))
    yield Case(
        "a single pixel",
        encode(Image.new("RGB", (1, 1), CORNERS[0]), "PNG"),
        colors=CORNERS[:1] * 4,
    )
    yield Case("a JPEG called .png", encode(picture(), "JPEG"))  # only the bytes count
    yield Case("a JPEG that is also a ZIP", encode(picture(), "JPEG") + _archive())
    yield Case(
        "a GIF followed by a script", encode(picture("P"), "GIF") + b"<script>alert(1)</script>"
    )


def orientations() -> Iterator[Case]:
    """Yields every orientation in every format that has one."""
    for format_ in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        for orientation, turn in TURNS.items():
            stored = picture() if turn is None else picture().transpose(turn)
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            yield Case(f"{format_} {orientation}", encode(stored, format_, exif=exif))
    on_its_side = picture().transpose(Image.Transpose.ROTATE_90)
    for format_ in ("JPEG", "PNG", "WEBP"):
        for name, content in _flawed_exif(6):
            yield Case(f"{format_}, {name}", encode(on_its_side, format_, exif=content))
    for name, content in _flawed_exif(6):
        if "within" in name:  # the others turn an AVIF by its properties when it is made
            yield Case(f"AVIF, {name}", encode(picture(), "AVIF", exif=content))


def _flawed_exif(orientation: int) -> Iterator[tuple[str, bytes]]:
    """Yields EXIF from which Pillow cannot read the orientation, with its flaw in words."""
    for order, start in (("<", b"II"), (">", b"MM")):
        head = b"Exif\0\0" + start + struct.pack(order + "HI", 42, 8)
        turn = struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0)
        maker = struct.pack(order + "HHII", 0x10F, 2, 20, 9999)
        count = struct.pack(order + "H", 2)
        yield f"{start.decode()}, a tag before it points outside", head + count + maker + turn
        resolution = struct.pack(order + "HHII", 0x11A, 5, 1, 60)
        yield f"{start.decode()}, cut off after it", head + count + turn + resolution
        yield f"{start.decode()}, cut off within it", head + count + turn[:10]
        byte = struct.pack(order + "HHHIB7x", 1, 0x112, 1, 1, orientation)
        yield f"{start.decode()}, as a byte", head + byte


def profiles() -> Iterator[Case]:
    """Yields files with colour profiles: wide gamut, grey, broken, and for other colours."""
    wide = wide_profile()
    # Computed by hand: to linear by gamma 2.2, P3 to sRGB (1.2249 -0.2247 0; -0.0420 1.0419 0;
    # -0.0197 -0.0786 1.0979), the sRGB curve of IEC 61966-2-1; colours outside sRGB are clipped.
    in_srgb = tuple(_p3_to_srgb(color) for color in CORNERS)
    for format_ in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        yield Case(
            f"{format_} wide gamut", encode(picture(), format_, icc_profile=wide), colors=in_srgb
        )
    yield Case(
        "PNG palette, wide gamut", encode(picture("P"), "PNG", icc_profile=wide), colors=in_srgb
    )
    alpha = encode(picture("RGBA"), "PNG", icc_profile=wide)
    yield Case("PNG with alpha, wide gamut", alpha, colors=_with_transparent_corner(in_srgb))
    yield Case(
        "grey JPEG with an RGB profile",
        encode(picture("L"), "JPEG", icc_profile=wide),
        colors=_grey(),
    )
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield Case("JPEG with a LAB profile", encode(picture(), "JPEG", icc_profile=lab))
    yield Case("JPEG with a broken profile", encode(picture(), "JPEG", icc_profile=b"no profile"))
    yield Case("JPEG with a truncated profile", encode(picture(), "JPEG", icc_profile=wide[:200]))


def many_frames() -> Iterator[Case]:
    """Yields files of several pictures, of which the first counts."""
    others = [Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "white")]
    for format_ in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
        content = encode(
            picture(), format_, save_all=True, append_images=others, duration=[100, 200, 300]
        )
        yield Case(f"{format_} of three frames", content)
    yield Case("MPO of a phone", encode(picture(), "MPO", save_all=True, append_images=others))


def heif_samples() -> Iterator[Case]:
    """Yields HEIC files made with pillow-heif, because no library used here can write HEIC."""
    for path in sorted(SAMPLES.glob("*.heic")):
        colors = _grey() if path.stem.startswith("grey") else CORNERS
        colors = _with_transparent_corner(colors) if path.stem == "alpha" else colors
        yield Case(path.stem, path.read_bytes(), colors=colors)
    plain = (SAMPLES / "plain.heic").read_bytes()
    avif = encode(picture(), "AVIF")
    for brand in (b"mif1", b"mif2", b"miaf", b"msf1", b"heix", b"hevc", b"heis", b"1pic"):
        yield Case(f"HEIC of brand {brand.decode()}", plain[:8] + brand + plain[12:])
        yield Case(f"AVIF of brand {brand.decode()}", avif[:8] + brand + avif[12:])
    for name, codes, colors in STATED_COLORS:
        if codes[1] != 1 and b"colrnclx" in plain:
            yield Case(f"HEIC nclx {name}", _with_nclx(plain, *codes), colors=colors)
    for coding, sentence in (
        (b"unci", "uncompressed"),
        (b"j2k1", "JPEG 2000"),
        (b"vvc1", "VVC"),
        (b"avc1", "AVC"),
    ):
        changed = plain.replace(b"hvc1", coding)
        yield Case(f"HEIF of {coding.decode()}", changed, "unsupported", sentence=sentence)


# ---- files of every kind, with the colours that they must show


def stated_colors() -> Iterator[Case]:
    """Yields files that state their colours without an ICC profile.

    The expected values are what Chromium shows, measured to 1 of 255.
    """
    for name, codes, colors in STATED_COLORS:
        yield Case(
            f"PNG cICP {name}",
            _with_chunks(_png_of(picture()), (b"cICP", bytes([*codes, 0, 1]))),
            colors=colors,
        )
        if codes[1] != 1:  # see docs/formats.md: BT.709 differs between PNG and AVIF
            yield Case(
                f"AVIF nclx {name}",
                _with_nclx(encode(picture(), "AVIF", subsampling="4:4:4"), *codes),
                colors=colors,
            )
        if codes[1] in (16, 18):
            profile = _with_codes(wide_profile(), *codes)
            for format_ in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF"):
                content = encode(picture(), format_, icc_profile=profile, quality=100)
                yield Case(f"{format_} with a profile of {name}", content, colors=colors)
            cmyk = encode(picture("CMYK"), "JPEG", icc_profile=profile)
            yield Case(f"CMYK JPEG with a profile of {name}", cmyk)
    gamma = struct.pack(">I", 100_000)
    wide = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    linear = tuple(tuple(_code_srgb(value / 255) for value in color) for color in CORNERS)
    yield Case("PNG gAMA", _with_chunks(_png_of(picture()), (b"gAMA", gamma)), colors=linear)
    yield Case("PNG cHRM alone", _with_chunks(_png_of(picture()), (b"cHRM", wide)))
    yield Case(
        "PNG sRGB over gAMA", _with_chunks(_png_of(picture()), (b"sRGB", b"\0"), (b"gAMA", gamma))
    )
    profile = b"wide\0\0" + zlib.compress(wide_profile())
    in_srgb = tuple(_p3_to_srgb(color) for color in CORNERS)
    yield Case(
        "PNG iCCP over gAMA",
        _with_chunks(_png_of(picture()), (b"iCCP", profile), (b"gAMA", gamma)),
        colors=in_srgb,
    )
    of_p3 = (b"cICP", bytes([12, 13, 0, 1]))
    yield Case(
        "PNG cICP over iCCP",
        _with_chunks(_png_of(picture()), of_p3, (b"iCCP", profile)),
        colors=STATED_COLORS[0][2],
    )
    wide_gamma = (b"gAMA", struct.pack(">I", 45_455)), (b"cHRM", wide)
    yield Case("PNG gAMA and cHRM", _with_chunks(_png_of(picture()), *wide_gamma), colors=in_srgb)
    grey_linear = tuple((_code_srgb(color[0] / 255),) * 3 for color in _grey())
    yield Case(
        "PNG grey with gAMA",
        _with_chunks(_png_of(picture("L")), (b"gAMA", gamma)),
        colors=grey_linear,
    )
    grey = _grey_profile()
    for mode, colors in (("L", grey_linear), ("LA", _with_transparent_corner(grey_linear))):
        yield Case(
            f"PNG {mode} with a linear grey profile",
            encode(picture(mode), "PNG", icc_profile=grey),
            colors=colors,
        )


def transparent_colors() -> Iterator[Case]:
    """Yields PNGs with a transparent colour, at every bit depth."""
    for bits in (1, 2, 4, 8, 16):
        steps = 2**bits - 1
        values = [0, steps, 0, steps] if bits == 1 else [0, steps // 3, steps * 2 // 3, steps]
        colors = [(round(value * 255 / steps),) * 3 for value in values]
        expected = tuple(
            (0, 0, 0, 0) if value == steps else (*color, 255)
            for value, color in zip(values, colors, strict=True)
        )
        content = _png_chunks(
            SIZE, bits, 0, _rows_of(values, bits), (b"tRNS", struct.pack(">H", steps))
        )
        yield Case(f"grey of {bits} bits", content, colors=expected)
    for bits in (8, 16):
        pixels = np.asarray(picture()).astype(">u2" if bits == 16 else "u1") * (
            257 if bits == 16 else 1
        )
        clear = struct.pack(">3H", *(int(value) for value in pixels[-1, -1]))
        data = b"".join(
            b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels
        )
        yield Case(
            f"RGB of {bits} bits",
            _png_chunks(SIZE, bits, 2, data, (b"tRNS", clear)),
            colors=_with_transparent_corner(CORNERS),
        )
    grey = _rows_of([0, 85, 170, 255], 8)
    clear = (b"tRNS", struct.pack(">H", 0x5AFF))
    yield Case(
        "grey of 8 bits, stated in 16",
        _png_chunks(SIZE, 8, 0, grey, clear),
        colors=((0,) * 3, (85,) * 3, (170,) * 3, (0,) * 4),
    )
    yield Case(
        "grey of 2 bits, stated in 8",
        _png_chunks(SIZE, 2, 0, _rows_of([0, 1, 2, 3], 2), (b"tRNS", b"\0\xff")),
        colors=((0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3),
    )
    data = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()))
    clear = (b"tRNS", struct.pack(">3H", *(0x5A00 | value for value in CORNERS[3])))
    yield Case(
        "RGB of 8 bits, stated in 16",
        _png_chunks(SIZE, 8, 2, data, clear),
        colors=_with_transparent_corner(CORNERS),
    )
    near = np.asarray(picture()).astype(np.uint16) * 257
    # Differs from the colour in the lowest bit only.
    clear = struct.pack(">3H", *(int(value) ^ 1 for value in near[-1, -1]))
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in near)
    yield Case(
        "RGB of 16 bits, one bit off the colour", _png_chunks(SIZE, 16, 2, data, (b"tRNS", clear))
    )


def partial_frames() -> Iterator[Case]:
    """Yields GIFs whose first frame does not cover the canvas."""
    for left, top in ((0, 0), (SIZE[0] // 2, SIZE[1] // 2)):
        frame = encode(Image.new("P", (SIZE[0] // 2, SIZE[1] // 2), 1), "GIF")
        at = frame.index(b",")
        content = (
            frame[:6]
            + struct.pack("<HH", *SIZE)
            + frame[10:at]
            + b","
            + struct.pack("<HH", left, top)
            + frame[at + 5 :]
        )
        palette = frame[13 + 3 : 13 + 6]
        colors = [(0, 0, 0, 0)] * 4
        colors[3 if left else 0] = (*palette, 255)
        yield Case(f"GIF frame at {left}, {top}", content, colors=tuple(colors))


def kinds_of_tiff() -> Iterator[Case]:
    """Yields TIFFs that are read correctly, and kinds that are refused by name."""
    rgb = np.asarray(picture())
    grey = np.asarray(picture("L"))
    for bits, kind in ((8, "u1"), (16, "u2")):
        light = (grey.astype(kind) * (257 if bits == 16 else 1)).astype("<" + kind)
        yield Case(
            f"grey of {bits} bits", _tiff(bits, 1, light.tobytes(), {262: (3, 1)}), colors=_grey()
        )
        dark = ((2**bits - 1) - light.astype(np.int64)).astype("<" + kind)
        yield Case(
            f"white is zero, {bits} bits",
            _tiff(bits, 1, dark.tobytes(), {262: (3, 0)}),
            colors=_grey(),
        )
    dark = (1 - grey / 255).astype("<f4")
    extra = {262: (3, 0), 339: (3, 3)}
    yield Case(
        "white is zero, floating-point",
        _tiff(32, 1, dark.tobytes(), extra),
        colors=_stretched(_grey()),
    )
    wide = grey.astype(np.uint64) * 16_843_009
    yield Case(
        "grey of 32 unsigned bits",
        _tiff(32, 1, wide.astype("<u4").tobytes(), {262: (3, 1)}),
        colors=_stretched(_grey()),
    )
    for name, kind, sample_format in (
        ("floats", "f4", 3),
        ("signed, 16 bits", "i2", 2),
        ("signed, 32 bits", "i4", 2),
        ("16 bits", "u2", 1),
    ):
        for order in "<>":
            for is_packed in (False, True):
                yield Case(
                    f"grey, {name}, {order}, {'compressed' if is_packed else 'uncompressed'}",
                    _tiff_in_order(grey.astype(order + kind), sample_format, is_packed),
                    colors=_stretched(_grey()),
                )
    content = bytearray(encode(picture("P"), "TIFF"))
    entry = content.index(struct.pack("<HHI", 320, 3, 768))
    at = int.from_bytes(content[entry + 8 : entry + 12], "little")
    content[at : at + 1536] = (np.frombuffer(content, "<u2", 768, at) >> 8).tobytes()
    yield Case("a palette of bytes", bytes(content))
    planes = b"".join(rgb[:, :, channel].astype("<u2").tobytes() for channel in range(3))
    half = np.concatenate([rgb, grey[:, :, None]], axis=2)
    refused = {
        "RGB of 16 bits in separate planes": (
            _tiff(16, 3, planes, {284: (3, 2)}),
            "RGB TIFF with 3 x 16-bit samples, in separate",
        ),
        "CMYK with alpha": (
            _tiff(8, 5, bytes(96 * 64 * 5), {262: (3, 5), 338: (3, 2)}),
            "CMYK TIFF with 5 x 8-bit",
        ),
        "grey with alpha, 16 bits": (
            _tiff(16, 2, bytes(96 * 64 * 4), {262: (3, 1), 338: (3, 2)}),
            "grey TIFF with 2 x 16-bit",
        ),
        "Lab of 16 bits": (
            _tiff(16, 3, bytes(96 * 64 * 6), {262: (3, 8)}),
            "CIE Lab TIFF with 3 x 16-bit",
        ),
        "floating-point RGB": (
            _tiff(32, 3, bytes(96 * 64 * 12), {339: (3, 3)}),
            "3 x 32-bit floating-point",
        ),
        "RGB of 32 bits": (_tiff(32, 3, bytes(96 * 64 * 12)), "RGB TIFF with 3 x 32-bit"),
        "grey of half floats": (
            _tiff(16, 1, bytes(96 * 64 * 2), {262: (3, 1), 339: (3, 3)}),
            "1 x 16-bit floating-point",
        ),
        "grey of signed bytes": (
            _tiff(8, 1, bytes(96 * 64), {262: (3, 1), 339: (3, 2)}),
            "1 x 8-bit signed",
        ),
        "LogLuv": (
            _tiff(16, 3, bytes(96 * 64 * 6), {262: (3, 32845), 259: (3, 34676)}),
            "SGI LogLuv",
        ),
        "YCbCr, subsampled and uncompressed": (
            _tiff(8, 3, bytes(96 * 64 * 3), {262: (3, 6)}),
            "YCbCr TIFF with 3 x 8-bit",
        ),
        "WebP inside": (_tiff(8, 3, bytes(99), {259: (3, 50001)}), "compressed as WebP"),
        "JPEG XL inside": (_tiff(8, 3, bytes(99), {259: (3, 50002)}), "compressed as JPEG XL"),
        "tiles listed as strips": (
            _tiff(8, 3, bytes(96 * 64 * 3), {322: (3, 96), 323: (3, 64)}),
            "RGB TIFF with 3 x 8-bit samples, whose tiles",
        ),
        "a big-endian BigTIFF": (_big_tiff(">"), "BigTIFF in big-endian"),
    }
    for name, (content, sentence) in refused.items():
        yield Case(name, content, "unsupported", sentence=sentence)
    yield Case("a BigTIFF", _big_tiff("<"), colors=_grey())
    assert half.shape[2] == 4


def kinds_of_bmp() -> Iterator[Case]:
    """Yields BMPs with bit fields, most of which Pillow refuses, and other rare kinds."""
    for name, bits, masks in (
        ("565", 16, (0xF800, 0x07E0, 0x001F, 0)),
        ("555", 16, (0x7C00, 0x03E0, 0x001F, 0)),
        ("4444", 16, (0x0F00, 0x00F0, 0x000F, 0xF000)),
        ("1010102", 32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
        ("8888", 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
        ("the other way round", 32, (0xFF, 0xFF00, 0xFF0000, 0)),
    ):
        for is_top_down in (False, True):
            colors = _with_transparent_corner(CORNERS) if masks[3] else CORNERS
            yield Case(
                f"{name}{', top down' * is_top_down}",
                _bmp_of_fields(bits, masks, is_top_down),
                colors=colors,
            )
    cut = _bmp_of_fields(16, (0xF800, 0x07E0, 0x001F, 0), False)
    yield Case("565, cut off", cut[: len(cut) * 3 // 4], "truncated", sentence="7")
    yield Case("runs of 8 bits", _bmp_of_runs(1, False))
    yield Case("runs of 4 bits", _bmp_of_runs(2, False))
    yield Case("runs that skip a corner", _bmp_of_runs(1, True), colors=(*CORNERS[:3], (0, 0, 0)))
    whole = _bmp_of_runs(1, False)
    yield Case("runs, cut off", whole[: len(whole) * 3 // 4], "truncated", sentence="of the rows")
    for name, at, value, sentence in (
        ("JPEG inside", 30, 4, "wraps a JPEG"),
        ("two bits", 28, 2, "2 bits a pixel"),
    ):
        content = bytearray(encode(picture(), "BMP"))
        content[at] = value
        yield Case(name, bytes(content), "unsupported", sentence=sentence)


def kinds_of_jpeg() -> Iterator[Case]:
    """Yields JPEGs whose headers state a rare coding process, and common variations."""
    content = encode(picture(), "JPEG")
    at = content.index(b"\xff\xc0")
    for name, marker, sentence in (
        ("lossless", 0xC3, "lossless"),
        ("hierarchical", 0xC5, "hierarchical"),
        ("arithmetic", 0xC9, "arithmetic"),
    ):
        changed = content[: at + 1] + bytes([marker]) + content[at + 2 :]
        yield Case(name, changed, "unsupported", sentence=sentence)
    yield Case(
        "12 bits",
        content[: at + 4] + b"\x0c" + content[at + 5 :],
        "unsupported",
        sentence="12 bits",
    )
    yield Case(
        "no height",
        content[: at + 5] + b"\0\0" + content[at + 7 :],
        "unsupported",
        sentence="height",
    )
    yield Case("extended", content[: at + 1] + b"\xc1" + content[at + 2 :])
    for subsampling in (0, 1, 2):
        yield Case(f"subsampling {subsampling}", encode(picture(), "JPEG", subsampling=subsampling))
    yield Case("restart markers", encode(picture(), "JPEG", restart_marker_blocks=2))
    yield Case("RGB, not YCbCr", encode(picture(), "JPEG", keep_rgb=True))


def cropped() -> Iterator[Case]:
    """Yields AVIFs cropped by `clap`, with and without rotation, and files rotated by XMP alone."""
    wide = Image.new("RGB", (SIZE[0] + 32, SIZE[1] + 16), "magenta")
    wide.paste(picture(), (32, 0))
    exif = Image.Exif()
    yield Case(
        "AVIF with clap", _with_clap(encode(wide, "AVIF", subsampling="4:4:4"), SIZE, (16, -8))
    )
    exif[ExifTags.Base.Orientation] = 3
    turned = wide.copy()
    turned.paste(picture().transpose(TURNS[3]), (32, 0))
    content = encode(turned, "AVIF", subsampling="4:4:4", exif=exif)
    yield Case("AVIF with clap and irot", _with_clap(content, SIZE, (16, -8)))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    xmp += b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    xmp += b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    xmp += b"</rdf:RDF></x:xmpmeta>"
    for format_ in ("AVIF", "JPEG", "WEBP"):
        yield Case(f"{format_} rotated by XMP alone", encode(picture(), format_, xmp=xmp))


def kept_animations() -> Iterator[Case]:
    """Yields animations whose frames are all kept, and long ones with only the first kept."""
    clear = picture("RGBA")
    for format_ in ("GIF", "PNG", "WEBP", "AVIF"):
        # AVIF needs frames of the same mode.
        other = picture("RGBA") if format_ == "AVIF" else picture()
        content = encode(clear, format_, save_all=True, append_images=[other], duration=100, loop=3)
        yield Case(
            f"{format_}, transparent then opaque",
            content,
            colors=_with_transparent_corner(CORNERS),
            rules=KEEP,
        )
        content = encode(other, format_, save_all=True, append_images=[clear], duration=100, loop=3)
        yield Case(f"{format_}, opaque then transparent", content, colors=None, rules=KEEP)
    fallback, black = Image.new("RGB", SIZE), ((0, 0, 0),) * 4
    content = encode(
        fallback, "PNG", save_all=True, default_image=True, append_images=[picture()], duration=100
    )
    yield Case("PNG of a fallback and one frame", content, rules=KEEP)
    yield Case("PNG of a fallback and one frame, only one kept", content, colors=black)
    frames = [Image.new("RGB", SIZE, (index * 2, 0, 0)) for index in range(99)]
    for format_ in ("GIF", "PNG", "WEBP"):
        content = encode(picture(), format_, save_all=True, append_images=frames)
        yield Case(f"{format_} of 100 frames, only the first kept", content)
    yield Case(
        "TIFF of 100 pages",
        encode(picture(), "TIFF", save_all=True, append_images=frames),
        rules=KEEP,
    )


def large() -> Iterator[Case]:
    """Yields the large pictures of phones and scanners, which are decoded at a reduced size."""
    for name, size in (
        ("50 MP of a phone", (8160, 6144)),
        ("the same upright", (6144, 8160)),
        ("108 MP", (12_000, 9000)),
    ):
        yield Case(f"JPEG of {name}", encode(_large(size), "JPEG", quality=50), colors=_grey())
    yield Case(
        "JPEG of 200 MP", encode(_large((16_320, 12_240)), "JPEG", quality=30), colors=_grey()
    )
    yield Case("panorama", encode(_large((20_000, 2000)), "JPEG"), colors=_grey())
    yield Case(
        "panorama as PNG", encode(_large((20_000, 2000)), "PNG", compress_level=1), colors=_grey()
    )
    yield Case("a line", encode(Image.new("1", (16_384, 1)), "PNG"), colors=None)


# ---- hostile files


def bombs() -> Iterator[Case]:
    """Yields small files that would need much memory or CPU time."""
    yield Case(
        "PNG of 169 megapixels in 20 kB", encode(Image.new("1", (13_000, 13_000)), "PNG"), "limits"
    )
    yield Case(
        "PNG slightly over the pixel limit",
        encode(Image.new("1", (10_000, 5_001)), "PNG"),
        "limits",
    )
    yield Case(
        "PNG whose variants would be too long", encode(Image.new("1", (1, 16_384)), "PNG"), "limits"
    )
    yield Case(
        "PNG that claims 2 billion px", _png_chunks((2**31 - 1, 2**31 - 1), 8, 2, b""), "limits"
    )
    yield Case(
        "JPEG of 65500 x 65500 according to its header", _resized_jpeg(65_500, 65_500), "limits"
    )
    yield Case("WebP of 16383 x 16383 according to its header", _resized_webp(), "limits")
    yield Case("BMP of a billion pixels according to its header", _resized_bmp(), "limits")
    tiff = encode(Image.new("1", (15_000, 15_000)), "TIFF", compression="group4")
    yield Case("TIFF of 225 megapixels", tiff, "limits")
    frame = Image.new("RGB", (16, 16))
    frames = [Image.new("RGB", (16, 16), (index * 4, 0, 0)) for index in range(1, 61)]
    gifs = encode(frame, "GIF", save_all=True, append_images=frames)
    yield Case("GIF of 61 frames to keep", gifs, "limits", rules=KEEP)
    pngs = encode(frame, "PNG", save_all=True, append_images=frames)
    yield Case("PNG of 61 frames to keep", pngs, "limits", rules=KEEP)
    webps = encode(frame, "WEBP", save_all=True, append_images=frames, lossless=True)
    yield Case("WebP of 61 frames to keep", webps, "limits", rules=KEEP)
    wide_frames = [Image.new("L", (3000, 3000), index * 40) for index in range(1, 6)]
    content = encode(Image.new("L", (3000, 3000)), "GIF", save_all=True, append_images=wide_frames)
    yield Case("GIF of 54 megapixels in six frames to keep", content, "limits", rules=KEEP)
    yield Case(
        "GIF of a million frames to keep", _gif_of_empty_frames(1_000_000), "limits", rules=KEEP
    )
    yield Case(
        "JPEG whose variants would be too long",
        _resized_jpeg(1000, 60_000),
        "limits",
        sentence="60000 px",
    )
    yield Case("TIFF whose pages form a cycle", _circular_tiff(), "completed", None)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 20_000_000, zip=True)
    yield Case("PNG with 20 MB of text in 20 kB", encode(picture(), "PNG", pnginfo=text), "limits")
    many = PngImagePlugin.PngInfo()
    for index in range(30):
        many.add_text(f"comment{index}", "a" * 90_000, zip=True)
    yield Case("PNG with many texts", encode(picture(), "PNG", pnginfo=many), "limits")
    profile = wide_profile() + bytes(2_000_000)
    for format_ in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        yield Case(
            f"{format_} with a profile of 2 MB",
            encode(picture(), format_, icc_profile=profile),
            "limits",
        )
    yield Case("more than 25 MB", bytes(25_000_001), "too_large")


def truncated() -> Iterator[Case]:
    """Yields files cut off at 1 to 99 %."""
    files = {
        "JPEG": photo_as("JPEG"),
        "progressive JPEG": photo_as("JPEG", progressive=True),
        "PNG": photo_as("PNG"),
        "WEBP": photo_as("WEBP"),
        "GIF": photo_as("GIF"),
        "AVIF": photo_as("AVIF"),
        "TIFF": photo_as("TIFF"),
        "TIFF tiff_lzw": photo_as("TIFF", compression="tiff_lzw"),
        "BMP": photo_as("BMP"),
        "HEIC": (SAMPLES / "plain.heic").read_bytes(),
    }
    for name, content in files.items():
        for percent in (1, 5, 10, 25, 50, 75, 90, 99):
            cut = content[: max(16, len(content) * percent // 100)]
            yield Case(f"{name} at {percent} %", cut, "truncated", None)
    bilevel = Image.open(PHOTO).convert("1")
    for format_, options in (
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "group4"}),
    ):
        content = encode(bilevel, format_, **options)
        yield Case(
            f"{format_} of two colours {options}", content[: len(content) // 2], "truncated", None
        )
    zeros = photo_as("JPEG")
    # As if the space had been reserved but not written.
    zeros = zeros[: len(zeros) // 2].ljust(len(zeros), b"\0")
    yield Case(
        "JPEG with zeros in place of its second half",
        zeros,
        "truncated",
        None,
        sentence="of the rows",
    )
    whole = photo_as("JPEG")
    assert whole.endswith(b"\xff\xd9")
    yield Case("JPEG without its end marker", whole[:-2], "completed", None)


def harmless_flaws() -> Iterator[Case]:
    """Yields files with flaws that do not affect the picture."""
    margin = picture()
    margin.paste((128, 128, 128), (SIZE[0] - 8, 0, *SIZE))
    for name, image in (
        ("", picture()),
        (" with a grey margin", margin),
        (" all grey", Image.new("RGB", SIZE, (165,) * 3)),
    ):
        content = encode(image, "PNG")
        colors = CORNERS if name != " all grey" else ((165,) * 3,) * 4
        yield Case(f"PNG{name}, no end", content[:-12], colors=colors)
    for name in (
        b"pHYs",
        b"tEXt",
        b"tIME",
        b"gAMA",
        b"cHRM",
        b"iCCP",
        b"eXIf",
        b"bKGD",
        b"sBIT",
        b"zzZz",
        b"acTL",
    ):
        for is_late in (False, True):
            content = _with_chunks(
                _png_of(picture()), (name, b"\0\0\0\1\0\0\0\1\1"), is_late=is_late, is_wrong=True
            )
            yield Case(f"PNG, {name.decode()} with a wrong checksum{', late' * is_late}", content)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        content = encode(picture(), "JPEG", **options)
        yield Case(f"JPEG {options}, no end", content[:-2])
        yield Case(
            f"JPEG {options}, followed by noise", content + np.random.default_rng(5).bytes(500)
        )
        yield Case(f"JPEG {options}, zeros before its end", content[:-2] + bytes(40) + content[-2:])
    text = b"comment\0\0" + zlib.compress(bytes(20_000_000))
    yield Case(
        "PNG, 20 MB of text after its pixels",
        _with_chunks(_png_of(picture()), (b"zTXt", text), is_late=True),
    )
    for name in (b"pHYs", b"cHRM", b"sRGB", b"gAMA", b"iCCP", b"tIME", b"eXIf"):
        yield Case(
            f"PNG, {name.decode()} of one byte", _with_chunks(_png_of(picture()), (name, b"\0"))
        )
    content = encode(picture(), "JPEG")
    at = content.index(b"\xff\xdb")
    yield Case("JPEG, junk between its segments", content[:at] + b"junk" + content[at:])
    scan = content.index(b"\xff\xda")
    nonsense = content[: scan + 11] + b"\x01\x05\x11" + content[scan + 14 :]
    yield Case("JPEG, nonsense in bytes used by progressive ones only", nonsense)
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "x" * 100
    thumbnail = exif.tobytes() + encode(Image.new("RGB", (8, 8)), "JPEG")
    yield Case(
        "JPEG with a thumbnail that has its own end marker",
        encode(picture(), "JPEG", exif=thumbnail),
    )
    yield Case("GIF, no end", encode(picture("P"), "GIF")[:-1])


def damaged() -> Iterator[Case]:
    """Yields files that are damaged after an intact start."""
    yield Case("nothing", b"", "empty")
    image = Image.open(PHOTO).convert("1")
    fax = bytearray(encode(image, "TIFF", compression="group4"))
    fax[len(fax) // 2 : len(fax) // 2 + 20] = b"\x55" * 20
    yield Case("fax with a hole", bytes(fax), "corrupt", sentence="Bad code word")
    png = bytearray(photo_as("PNG"))
    png[2000:2100] = bytes(100)
    yield Case("PNG with a hole", bytes(png), "corrupt")
    jpeg = bytearray(photo_as("JPEG"))
    start = jpeg.index(b"\xff\xc4")  # the Huffman tables
    jpeg[start + 4 : start + 24] = b"\xff" * 20
    yield Case("JPEG without tables", bytes(jpeg), "corrupt")
    noise = np.random.default_rng(3).bytes(4096)
    for name, options in JPEGS.items():
        whole = photo_as("JPEG", **options)
        middle = len(whole) // 2
        for kind, hole in (("noise", noise), ("zeros", bytes(4096)), ("nothing", b"")):
            changed = whole[:middle] + hole + whole[middle + 4096 :]
            yield Case(f"{name} JPEG, a part replaced by {kind}", changed, "corrupt", None)
    for start in (-9000, -6000, -2000, -200):
        avif = bytearray(photo_as("AVIF"))
        avif[start : start + 6000 if start == -9000 else None] = bytes(
            6000 if start == -9000 else -start
        )
        yield Case(f"AVIF with zeros from {start}", bytes(avif), "corrupt", None, sentence="zeros")
    heic = bytearray((SAMPLES / "plain.heic").read_bytes())
    heic[-60:-20] = bytes(40)
    yield Case("HEIC with a hole", bytes(heic), "corrupt", None)
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture())[:40])
    yield Case(
        "PNG of too few rows",
        _png_chunks(SIZE, 8, 2, rows),
        "corrupt",
        None,
        sentence="62 % of the rows",
    )
    short = encode(picture("P").crop((0, 0, SIZE[0], 32)), "GIF", interlace=0)
    short = bytearray(short.replace(struct.pack("<HH", SIZE[0], 32), struct.pack("<HH", *SIZE)))
    yield Case("GIF of too few rows", bytes(short), "corrupt", None, sentence="50 % of the rows")
    webp = bytearray(photo_as("WEBP", lossless=True))
    webp[40:1040] = np.random.default_rng(2).bytes(1000)
    yield Case("WebP with a hole", bytes(webp), "corrupt")
    yield Case(
        "BMP of noise",
        b"BM\x88\x13\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0" + np.random.default_rng(4).bytes(5000),
        "corrupt",
    )


def found_by_fuzzing() -> Iterator[Case]:
    """Yields files that crashed a decoder (libheif 1.21)."""
    for path in sorted(SAMPLES.glob("crash*")):
        yield Case(path.stem, path.read_bytes(), "crashed")


def refused() -> Iterator[Case]:
    """Yields files of other formats, most of which the error names."""
    files = {
        "SVG": b'<?xml version="1.0"?>\n<!-- x -->\n'
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "SVG without a prologue": b"<svg xmlns='x'/>",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file",
        "PDF": b"%PDF-1.7\n",
        "PSD": b"8BPS\0\x01" + bytes(20),
        "MP4": b"\0\0\0\x18ftypisom\0\0\0\0isommp41",
        "QuickTime": b"\0\0\0\x14ftypqt  \0\0\0\0qt  ",
        "WebM": b"\x1a\x45\xdf\xa3" + bytes(20),
        "AVI": b"RIFF\0\0\0\0AVI LIST",
        "ZIP": _archive(),
        "gzip": b"\x1f\x8b\x08" + bytes(20),
        "RAR": b"Rar!\x1a\x07\x01\0",
        "Canon raw": b"II*\0\x10\0\0\0CR\x02\0" + bytes(40),
        "Nikon raw, whose first page is a preview": encode(picture(), "TIFF", tiffinfo={254: 1}),
        "JPEG XL": b"\xff\x0a" + bytes(20),
        "icon": b"\0\0\1\0\1\0" + bytes(40),
        "a program": b"\x7fELF" + bytes(40),
        "PNG for Apple's devices": b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI" + bytes(40),
        "text": b"hello, this is no picture",
        "zeros": bytes(99),
        "one byte": b"G",
    }
    for name, content in files.items():
        yield Case(name, content, "unsupported")


# ---- files that no library writes


def wide_profile() -> bytes:
    """Builds a profile with the primaries of Display P3 (D50) and gamma 2.2 (ICC.1:2010)."""

    def s15(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1571, 0.0666, 0.7841),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data, offset = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (offset + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    header = b"\0" * 8 + b"\x02\x10\0\0" + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    header += s15(0.9642) + s15(1.0) + s15(0.8249)
    profile = header.ljust(128, b"\0") + table + data
    return len(profile).to_bytes(4, "big") + profile[4:]


def _with_codes(profile: bytes, primaries: int, transfer: int) -> bytes:
    """Adds the tag `cicp` to an ICC profile (ICC.1:2022, 9.2.17)."""
    count = int.from_bytes(profile[128:132], "big")
    table, data = b"", profile[132 + 12 * count :]
    for at in range(132, 132 + 12 * count, 12):
        name, start, size = struct.unpack_from(">4sII", profile, at)
        table += struct.pack(">4sII", name, start + 12, size)
    size = 144 + 12 * count + len(data)
    table += struct.pack(">4sII", b"cicp", size, 12)
    data += b"cicp" + bytes([0, 0, 0, 0, primaries, transfer, 0, 1])
    header = struct.pack(">I", size + 12) + profile[4:128]
    return header + struct.pack(">I", count + 1) + table + data


def _p3_to_srgb(color: tuple[int, ...]) -> tuple[int, ...]:
    matrix = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = np.clip(matrix @ (np.array(color) / 255) ** 2.2, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in (curved * 255).round())


def _chunk(name: bytes, content: bytes, is_wrong: bool = False) -> bytes:
    checksum = zlib.crc32(name + content) ^ is_wrong
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def _png_chunks(
    size: tuple[int, int], bits: int, color_type: int, data: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    content = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0))
    content += b"".join(_chunk(*chunk) for chunk in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + content + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")
    )


def _png_of(image: Image.Image) -> bytes:
    return encode(image, "PNG")


def _with_chunks(
    content: bytes, *chunks: tuple[bytes, bytes], is_late: bool = False, is_wrong: bool = False
) -> bytes:
    """Adds chunks to a PNG, after its header or before its end."""
    at = len(content) - 12 if is_late else 33
    return content[:at] + b"".join(_chunk(*chunk, is_wrong) for chunk in chunks) + content[at:]


def _rows_of(values: list[int], bits: int) -> bytes:
    """Returns the rows of a grey PNG whose four corners have these values."""
    rows = b""
    for y in range(SIZE[1]):
        left, right = values[y * 2 // SIZE[1] * 2 :][:2]
        pixels = np.repeat([left, right], SIZE[0] // 2)
        if bits == 16:
            rows += b"\0" + pixels.astype(">u2").tobytes()
        else:
            digits = (pixels[:, None] >> np.arange(bits - 1, -1, -1)) & 1
            rows += b"\0" + np.packbits(digits.astype(np.uint8).ravel()).tobytes()
    return rows


def _code_srgb(linear: float) -> int:
    return round(
        255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)
    )


def _grey_profile() -> bytes:
    """Builds a grey profile with linear values (ICC.1:2010, 8.3.3)."""
    white = b"XYZ \0\0\0\0" + b"".join(
        round(value * 65_536).to_bytes(4, "big") for value in (0.9642, 1.0, 0.8249)
    )
    curve = b"curv" + bytes(8)
    header = (
        b"\0" * 8
        + b"\x02\x10\0\0"
        + b"mntrGRAYXYZ "
        + b"\0" * 12
        + b"acsp"
        + b"\0" * 28
        + white[8:]
    )
    table = struct.pack(
        ">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 156 + len(white), len(curve)
    )
    profile = header.ljust(128, b"\0") + table + white + curve
    return len(profile).to_bytes(4, "big") + profile[4:]


def _with_nclx(content: bytes, primaries: int, transfer: int) -> bytes:
    """Sets the colour code points of an AVIF or HEIC."""
    at = content.index(b"colrnclx") + 8
    return content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :]


def _with_clap(content: bytes, size: tuple[int, int], offset: tuple[int, int]) -> bytes:
    """Crops an AVIF with a `clap` property.

    `offset` is the distance, right and down, from the centre of the whole to that of the part.
    """
    values = [(size[0], 1), (size[1], 1), (offset[0], 1), (offset[1], 1)]
    box = b"\0\0\0\x28clap" + b"".join(struct.pack(">iI", *value) for value in values)
    changed = bytearray(content)
    ipco = content.index(b"ipco")
    ipco_bytes = int.from_bytes(content[ipco - 4 : ipco], "big")
    position, count = ipco + 4, 0
    while position < ipco - 4 + ipco_bytes:
        position, count = (
            position + int.from_bytes(content[position : position + 4], "big"),
            count + 1,
        )
    ipma = content.index(b"ipma")
    entry = ipma + 4 + 4 + 4 + 2  # after version and flags, number of entries, item
    place = entry + 1 + content[entry]
    turns = [
        at
        for at in range(entry + 1, place)
        if _property_at(content, ipco, content[at] & 127) in (b"irot", b"imir")
    ]
    place = min(turns, default=place)
    changed[entry] += 1
    changed[place:place] = bytes([0x80 | count + 1])
    changed[position:position] = box
    for name, grown in ((b"ipco", 40), (b"ipma", 1), (b"iprp", 41), (b"meta", 41)):
        at = content.index(name) - 4
        at += 40 if at >= position else 0
        changed[at : at + 4] = (int.from_bytes(changed[at : at + 4], "big") + grown).to_bytes(
            4, "big"
        )
    iloc = content.index(b"iloc")
    iloc += 41 if iloc > ipma else 40 if iloc > position else 0
    for at in _offsets_of(bytes(changed), iloc):
        changed[at : at + 4] = (int.from_bytes(changed[at : at + 4], "big") + 41).to_bytes(4, "big")
    return bytes(changed)


def _property_at(content: bytes, ipco: int, index: int) -> bytes:
    position = ipco + 4
    for _ in range(index - 1):
        position += int.from_bytes(content[position : position + 4], "big")
    return content[position + 4 : position + 8]


def _offsets_of(content: bytes, iloc: int) -> Iterator[int]:
    """Yields the positions of the items' offsets in an `iloc` box written by libavif.

    Its version is 0, and its offsets and lengths have 4 bytes.
    """
    assert content[iloc + 4 : iloc + 10] in (b"\0\0\0\0\x44\0", b"\0\0\0\0\x44\x40")
    base = content[iloc + 9] >> 4
    position = iloc + 12
    for _ in range(int.from_bytes(content[iloc + 10 : iloc + 12], "big")):
        position += 4 + base
        for _ in range(int.from_bytes(content[position : position + 2], "big")):
            yield position + 2
            position += 8
        position += 2


def _bmp_of_fields(bits: int, masks: tuple[int, ...], is_top_down: bool) -> bytes:
    """Builds a BMP of version 4 with the given bit masks."""
    pixels = np.asarray(picture("RGBA")).astype(np.uint64)
    packed = np.zeros(pixels.shape[:2], np.uint64)
    for channel, mask in enumerate(masks):
        if mask:
            shift = (mask & -mask).bit_length() - 1
            packed |= (pixels[:, :, channel] * (mask >> shift) + 127) // 255 << np.uint64(shift)
    if not masks[3]:
        packed[SIZE[1] // 2 :, SIZE[0] // 2 :] = packed[-1, -1]
        last = np.uint64(0)
        for channel, mask in enumerate(masks[:3]):
            shift = (mask & -mask).bit_length() - 1
            last |= np.uint64((CORNERS[3][channel] * (mask >> shift) + 127) // 255 << shift)
        packed[SIZE[1] // 2 :, SIZE[0] // 2 :] = last
    data = (
        (packed if is_top_down else packed[::-1]).astype("<u2" if bits == 16 else "<u4").tobytes()
    )
    height = -SIZE[1] if is_top_down else SIZE[1]
    header = struct.pack(
        "<IiiHHIIiiII4I", 108, SIZE[0], height, 1, bits, 3, len(data), 0, 0, 0, 0, *masks
    ).ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(data), 0, 0, 14 + 108) + header + data


def _bmp_of_runs(compression: int, is_skipping: bool) -> bytes:
    """Builds a run-length encoded BMP, stored bottom-up; `is_skipping` leaves one corner empty."""
    palette = b"".join(bytes([*color[::-1], 0]) for color in CORNERS)
    data, half = b"", SIZE[0] // 2
    for y in reversed(range(SIZE[1])):
        left, right = (2, 3) if y >= SIZE[1] // 2 else (0, 1)
        indexes = [index * 17 if compression == 2 else index for index in (left, right)]
        data += bytes([half, indexes[0]])
        data += (
            b""
            if is_skipping and right == 3
            else bytes([0, half, *(_absolute(right, compression, half))])
        )
        data += b"\0\0"
    data += b"\0\1"
    bits = 4 if compression == 2 else 8
    header = struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, bits, compression, len(data), 0, 0, 4, 0)
    start = 14 + 40 + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def _absolute(index: int, compression: int, count: int) -> bytes:
    return bytes([index * 17]) * (count // 2) if compression == 2 else bytes([index]) * count


def _big_tiff(order: str) -> bytes:
    """Builds a grey BigTIFF of one strip."""
    data = np.asarray(picture("L")).tobytes()
    tags = {
        256: SIZE[0],
        257: SIZE[1],
        258: 8,
        259: 1,
        262: 1,
        273: 400,
        277: 1,
        278: SIZE[1],
        279: len(data),
    }
    content = (b"II" if order == "<" else b"MM") + struct.pack(
        order + "HHHQQ", 43, 8, 0, 16, len(tags)
    )
    for tag, value in tags.items():
        content += struct.pack(order + "HHQQ", tag, 16, 1, value)
    return (content + bytes(8)).ljust(400, b"\0") + data


def _tiff_in_order(
    values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]",
    sample_format: int,
    is_packed: bool,
) -> bytes:
    """Builds a grey TIFF of one strip in the byte order of the values, from black to white."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    if sample_format == 1:  # only these have an agreed white
        values = ((values - values.min()) / (values.max() - values.min()) * 65_535).astype(
            values.dtype
        )
    data = zlib.compress(values.tobytes()) if is_packed else values.tobytes()
    tags = {
        256: SIZE[0],
        257: SIZE[1],
        258: values.dtype.itemsize * 8,
        259: 8 if is_packed else 1,
        262: 1,
        273: 400,
        277: 1,
        278: SIZE[1],
        279: len(data),
        339: sample_format,
    }
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in tags.items():
        content += struct.pack(order + "HHII", tag, 4, 1, value)
    return (content + bytes(4)).ljust(400, b"\0") + data


def _large(size: tuple[int, int]) -> Image.Image:
    return picture("L").resize(size, Image.Resampling.NEAREST)


def _wide_rows() -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
    return np.asarray(picture()).astype(np.uint16) * 257


def _png_of_16_bits() -> bytes:
    return png_of_16_bits(_wide_rows())


def png_of_16_bits(
    values: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]", *chunks: tuple[bytes, bytes]
) -> bytes:
    """Builds a PNG of values [height, width] or [height, width, channels], and further chunks."""
    color_type = 0 if values.ndim == 2 else {2: 4, 3: 2, 4: 6}[values.shape[2]]
    data = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    return _png_chunks(values.shape[1::-1], 16, color_type, data, *chunks)


def _tiff(
    bits: int, samples: int, data: bytes, extra: dict[int, tuple[int, int]] | None = None
) -> bytes:
    """Builds an uncompressed RGB TIFF of one strip; `extra` is {tag: (type, value)}."""
    tags = {
        256: (4, SIZE[0]),
        257: (4, SIZE[1]),
        258: (3, bits),
        259: (3, 1),
        262: (3, 2),
        273: (4, 1000),
        277: (3, samples),
        278: (4, SIZE[1]),
        279: (4, len(data)),
        **(extra or {}),
    }
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        if tag == 258 and samples > 2:  # one per sample, after the directory
            content += struct.pack("<HHII", tag, kind, samples, 900)
        elif tag == 258:
            content += struct.pack("<HHI", tag, kind, samples) + (
                struct.pack("<H", bits) * samples
            ).ljust(4, b"\0")
        else:
            content += struct.pack("<HHII", tag, kind, 1, value)
    content = (content + bytes(4)).ljust(900, b"\0") + struct.pack("<H", bits) * samples
    return content.ljust(1000, b"\0") + data


def _tiff_of_16_bits() -> bytes:
    return _tiff(16, 3, _wide_rows().astype("<u2").tobytes())


def _premultiplied() -> bytes:
    rgba = np.asarray(picture("RGBA")).astype(np.uint16)
    rgba[:, :, :3] = rgba[:, :, :3] * rgba[:, :, 3:] // 255
    return _tiff(8, 4, rgba.astype(np.uint8).tobytes(), {338: (3, 1)})


def _circular_tiff() -> bytes:
    content = bytearray(encode(picture(), "TIFF"))
    start = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[start : start + 2], "little")
    end = start + 2 + 12 * count
    content[end : end + 4] = start.to_bytes(4, "little")
    return bytes(content)


def _resized_jpeg(width: int, height: int) -> bytes:
    content = bytearray(encode(picture(), "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def _resized_webp() -> bytes:
    content = bytearray(encode(picture("RGBA"), "WEBP"))
    assert content[12:16] == b"VP8X"
    content[24:30] = (16_382).to_bytes(3, "little") * 2
    return bytes(content)


def _resized_bmp() -> bytes:
    content = bytearray(encode(picture(), "BMP"))
    content[18:26] = struct.pack("<ii", 15_000, 15_000)
    return bytes(content)


def _gif_of_empty_frames(count: int) -> bytes:
    start = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff"
    return start + b",\0\0\0\0\x01\0\x01\0\0\x02\x02L\x01\0" * count + b";"


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


# ---- the commands


@dataclass(frozen=True)
class Result:
    """The result for a file.

    Attributes:
        outcome: see `Case`; `distrusted` if the sandbox's answer cannot be true.
        sentence: the error message, or "".
        cpu_seconds: CPU time used.
        peak_bytes: peak memory of the decoding process.
        variants: the rendered variants.
    """

    outcome: str
    sentence: str = ""
    cpu_seconds: float = 0
    peak_bytes: int = 0
    variants: tuple[Variant, ...] = ()


DEFAULT_SANDBOX, DEFAULT_RULES = Sandbox(), Rules()
SPECS = build_variant_specs()


def process(
    content: bytes, sandbox: Sandbox = DEFAULT_SANDBOX, rules: Rules = DEFAULT_RULES
) -> Result:
    """Processes a file as the assets process an original, and distrusts the sandbox as they do."""
    try:
        with sandbox.open(decode, content, rules) as session:
            prepared, preparing = session.call(prepare)
            verify_prepared(prepared, rules, None)
            arguments = SPECS, True, choose_compared(SPECS)
            (made, found), encoding = session.call(render_and_inspect, *arguments)
            verify_variants(made, SPECS, (prepared.facts.width, prepared.facts.height))
            verify_own_inspections(found, made, arguments[2])
    except ImagePipelineError as error:
        return Result(getattr(error, "reason", "unexpected"), str(error))
    except ImpossibleAnswerError as error:
        return Result("distrusted", f"what the sandbox said of it cannot be true: {error}")
    cpu_seconds = session.usage.cpu_seconds + preparing.cpu_seconds + encoding.cpu_seconds
    return Result("completed", "", cpu_seconds, encoding.peak_bytes, tuple(made))


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument(
    "folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the contact sheet.",
)
def main(folder: Path | None, sheet: Path | None) -> None:
    files = (
        cases()
        if folder is None
        else (
            Case(path.name, path.read_bytes(), "")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )
    )
    results = [(case, process(case.content, rules=case.rules)) for case in files]
    out = Console(width=160)
    table = Table(
        "outcome",
        "files",
        "max. CPU s",
        "max. memory",
        "example",
        "message for the uploader",
    )
    for outcome in sorted({result.outcome for _, result in results}):
        group = [(case, result) for case, result in results if result.outcome == outcome]
        sentences = dict.fromkeys(result.sentence for _, result in group)
        for index, sentence in enumerate(list(sentences)[: 12 if folder is None else 6]):
            example = next(case.name for case, result in group if result.sentence == sentence)
            cpu = f"{max(result.cpu_seconds for _, result in group):.2f}"
            peak = f"{max(result.peak_bytes for _, result in group) / 1e6:.0f} MB"
            table.add_row(
                *((outcome, str(len(group)), cpu, peak) if index == 0 else ("",) * 4),
                example,
                sentence,
            )
    out.print(table)
    wrong = [
        (case.name, result.outcome)
        for case, result in results
        if case.outcome and case.outcome != result.outcome
    ]
    for name, outcome in wrong:
        out.print(f"[red]{name} ended as {outcome}")
    if sheet:
        draw_sheet([(case.name, result) for case, result in results if result.variants], sheet)
    raise SystemExit(bool(wrong))


def draw_sheet(pictures: list[tuple[str, Result]], path: Path) -> None:
    """Draws the smallest WebP and AVIF of each picture on a checkerboard, with its name."""
    columns, cell, caption = 10, 110, 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * 2 * cell, rows * (cell + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, result) in enumerate(pictures):
        x, y = index % columns * 2 * cell, index // columns * (cell + caption)
        for offset, variant in enumerate(result.variants[:2]):
            image = Image.open(io.BytesIO(variant.content)).convert("RGBA")
            image.thumbnail((cell - 6, cell - 6))
            ground = Image.fromarray(
                (np.indices(image.size[::-1]).sum(axis=0) // 8 % 2 * 60 + 180).astype(np.uint8)
            )
            sheet.paste(
                Image.alpha_composite(ground.convert("RGBA"), image), (x + offset * cell, y)
            )
        draw.text((x, y + cell), name.partition(": ")[2] or name, fill="black")
    sheet.save(path)


if __name__ == "__main__":
    main()

"""The odd and hostile files people upload, made in code, each with what must become of it; and two commands.

python -m imagepipeline_tests.imaging.odd_files                 what becomes of them, as a table
python -m imagepipeline_tests.imaging.odd_files FOLDER          the same for the files of a folder
… --sheet sheet.png                                             and a contact sheet of those that give a picture
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, PngImagePlugin
from rich.console import Console
from rich.table import Table

from imagepipeline.errors import ImagePipelineError
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.preparation import prepare
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import render
from imagepipeline.models import Variant, build_variant_specs

SAMPLES = Path(__file__).parent / "samples"
PHOTO = Path(__file__).parent.parent.parent / "imagepipeline" / "demo_photos" / "cat.jpg"
SIZE = (96, 64)
# Upper left, upper right, lower left, lower right: each turn and each mix-up of channels shows.
CORNERS = ((200, 40, 40), (40, 180, 60), (50, 60, 200), (230, 230, 220))
TURNS = {  # what the camera stored, so that turning it by the orientation gives the picture (CIPA DC-008, 4.6.4)
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
    """A file and its fate: `completed`, or the reason of its failure.

    `colors` are what the four corners must show, as RGB or RGBA; None where the picture is another one.
    """

    name: str
    content: bytes
    outcome: str = "completed"
    colors: tuple[tuple[int, ...], ...] | None = CORNERS


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (
        modes,
        orientations,
        profiles,
        many_frames,
        heif_samples,
        bombs,
        truncated,
        damaged,
        found_by_fuzzing,
        refused,
    ):
        for case in group():
            yield Case(f"{group.__name__}: {case.name}", case.content, case.outcome, case.colors)


# ---- the picture


def picture(mode: str = "RGB") -> Image.Image:
    """The four corners, in a mode of Pillow."""
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
        kinds = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 65_536, "F": grey / np.float32(255)}
        return Image.fromarray(kinds[mode])
    return image.quantize(4) if mode == "P" else image.convert(mode, dither=Image.Dither.NONE)


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def photo_as(format_: str, **options: object) -> bytes:
    """A photo with detail in every row."""
    image = Image.open(PHOTO).convert("RGB")
    return encode(image.quantize() if format_ == "GIF" else image, format_, **options)


def _grey() -> tuple[tuple[int, ...], ...]:
    return tuple((round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in CORNERS)


def _clear_last(colors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return (*((*color, 255) for color in colors[:3]), (0, 0, 0, 0))


def _stretched(colors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """What becomes of values without an agreed white: darkest to black, lightest to white."""
    values = [color[0] for color in colors]
    low, high = min(values), max(values)
    return tuple((round((value - low) * 255 / (high - low)),) * 3 for value in values)


# ---- pictures that must come out right


def modes() -> Iterator[Case]:
    """Every mode a format can hold."""
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
        yield Case(f"{format_} LA", encode(picture("LA"), format_), colors=_clear_last(_grey()))
    for mode in ("I", "F"):
        yield Case(f"TIFF {mode}", encode(picture(mode), "TIFF"), colors=_stretched(_grey()))
    for format_ in ("PNG", "WEBP", "AVIF", "TIFF"):
        yield Case(f"{format_} RGBA", encode(picture("RGBA"), format_), colors=_clear_last(CORNERS))
    for format_ in ("PNG", "TIFF", "BMP", "GIF"):
        yield Case(f"{format_} 1", encode(picture("1"), format_), colors=(*((0,) * 3,) * 3, (255,) * 3))
    palette = picture("P")
    clear = palette.getpixel((SIZE[0] - 9, SIZE[1] - 9))
    for format_ in ("PNG", "GIF"):
        yield Case(
            f"{format_} P with a clear colour",
            encode(palette, format_, transparency=clear),
            colors=_clear_last(CORNERS),
        )
    yield Case(
        "PNG RGB with a clear colour", encode(picture(), "PNG", transparency=CORNERS[3]), colors=_clear_last(CORNERS)
    )
    yield Case("PNG RGB of 16 bits", _png_of_16_bits())
    yield Case("TIFF RGB of 16 bits", _tiff_of_16_bits())
    yield Case("TIFF with premultiplied alpha", _premultiplied(), colors=_clear_last(CORNERS))
    yield Case("JPEG progressive", encode(picture(), "JPEG", progressive=True))
    yield Case("JPEG 4:4:4", encode(picture(), "JPEG", subsampling=0))
    yield Case("WEBP lossless", encode(picture(), "WEBP", lossless=True))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield Case(f"TIFF {compression}", encode(picture(), "TIFF", compression=compression))
    yield Case("a single pixel", encode(Image.new("RGB", (1, 1), CORNERS[0]), "PNG"), colors=CORNERS[:1] * 4)
    yield Case("a JPEG called .png", encode(picture(), "JPEG"))  # no name is read, only bytes
    yield Case("a JPEG that is a ZIP as well", encode(picture(), "JPEG") + _archive())
    yield Case("a GIF with a script behind it", encode(picture("P"), "GIF") + b"<script>alert(1)</script>")


def orientations() -> Iterator[Case]:
    """Every orientation in every format that has one."""
    for format_ in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        for orientation, turn in TURNS.items():
            stored = picture() if turn is None else picture().transpose(turn)
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            yield Case(f"{format_} {orientation}", encode(stored, format_, exif=exif))


def profiles() -> Iterator[Case]:
    """Colour profiles: wide, grey, broken and unfitting."""
    wide = wide_profile()
    # By hand: to linear by 2.2, P3 to sRGB (1.2249 -0.2247 0; -0.0420 1.0419 0; -0.0197 -0.0786 1.0979), and the
    # sRGB curve of IEC 61966-2-1; what falls outside sRGB is cut off.
    in_srgb = tuple(_p3_to_srgb(color) for color in CORNERS)
    for format_ in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        yield Case(f"{format_} wide gamut", encode(picture(), format_, icc_profile=wide), colors=in_srgb)
    yield Case("PNG palette, wide gamut", encode(picture("P"), "PNG", icc_profile=wide), colors=in_srgb)
    alpha = encode(picture("RGBA"), "PNG", icc_profile=wide)
    yield Case("PNG with alpha, wide gamut", alpha, colors=_clear_last(in_srgb))
    yield Case("JPEG grey with a profile for colours", encode(picture("L"), "JPEG", icc_profile=wide), colors=_grey())
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield Case("JPEG with a LAB profile", encode(picture(), "JPEG", icc_profile=lab))
    yield Case("JPEG with a broken profile", encode(picture(), "JPEG", icc_profile=b"no profile"))
    yield Case("JPEG with a cut profile", encode(picture(), "JPEG", icc_profile=wide[:200]))


def many_frames() -> Iterator[Case]:
    """More than one picture in a file: the first counts."""
    others = [Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "white")]
    for format_ in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
        content = encode(picture(), format_, save_all=True, append_images=others, duration=[100, 200, 300])
        yield Case(f"{format_} of three frames", content)
    yield Case("MPO of a phone", encode(picture(), "MPO", save_all=True, append_images=others))


def heif_samples() -> Iterator[Case]:
    """HEIC, which no free library here can write: made once with pillow-heif."""
    for path in sorted(SAMPLES.glob("*.heic")):
        colors = _clear_last(CORNERS) if path.stem == "alpha" else CORNERS
        yield Case(path.stem, path.read_bytes(), colors=colors)


# ---- hostile files


def bombs() -> Iterator[Case]:
    """Small files that would be large pictures, or much else."""
    yield Case("PNG of 169 megapixels in 20 kB", encode(Image.new("1", (13_000, 13_000)), "PNG"), "limits")
    yield Case("PNG one pixel too many", encode(Image.new("1", (10_000, 5_001)), "PNG"), "limits")
    yield Case("PNG too wide", encode(Image.new("1", (16_384, 1)), "PNG"), "limits")
    yield Case("PNG that claims 2 billion px", _png_chunks((2**31 - 1, 2**31 - 1), 8, 2, b""), "limits")
    yield Case("JPEG of 65500 x 65500 by its header", _resized_jpeg(65_500, 65_500), "limits")
    yield Case("WebP of 16383 x 16383 by its header", _resized_webp(), "limits")
    yield Case("BMP of a billion pixels by its header", _resized_bmp(), "limits")
    tiff = encode(Image.new("1", (15_000, 15_000)), "TIFF", compression="group4")
    yield Case("TIFF of 225 megapixels", tiff, "limits")
    frame = Image.new("RGB", (16, 16))
    frames = [Image.new("RGB", (16, 16), (index * 4, 0, 0)) for index in range(1, 61)]
    yield Case("GIF of 61 frames", encode(frame, "GIF", save_all=True, append_images=frames), "limits")
    yield Case("PNG of 61 frames", encode(frame, "PNG", save_all=True, append_images=frames), "limits")
    yield Case("WebP of 61 frames", encode(frame, "WEBP", save_all=True, append_images=frames, lossless=True), "limits")
    yield Case("TIFF of 61 pages", encode(frame, "TIFF", save_all=True, append_images=frames), "limits")
    wide_frames = [Image.new("L", (3000, 3000), index * 40) for index in range(1, 6)]
    content = encode(Image.new("L", (3000, 3000)), "GIF", save_all=True, append_images=wide_frames)
    yield Case("GIF of 54 megapixels in six frames", content, "limits")
    yield Case("GIF of a million frames", _gif_of_empty_frames(1_000_000), "limits")
    yield Case("TIFF whose pages go in a circle", _circular_tiff(), "completed", None)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 20_000_000, zip=True)
    yield Case("PNG with 20 MB of text in 20 kB", encode(picture(), "PNG", pnginfo=text), "limits")
    many = PngImagePlugin.PngInfo()
    for index in range(30):
        many.add_text(f"comment{index}", "a" * 90_000, zip=True)
    yield Case("PNG with many texts", encode(picture(), "PNG", pnginfo=many), "limits")
    profile = wide_profile() + bytes(2_000_000)
    for format_ in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        yield Case(f"{format_} with a profile of 2 MB", encode(picture(), format_, icc_profile=profile), "limits")
    yield Case("more than 25 MB", bytes(25_000_001), "too_large")


def truncated() -> Iterator[Case]:
    """Files cut at 1 to 99 %."""
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
    whole = photo_as("JPEG")
    assert whole.endswith(b"\xff\xd9")
    yield Case("JPEG of which only the end marker is missing", whole[:-2], "completed", None)


def damaged() -> Iterator[Case]:
    """Files whose start is right and whose middle is not."""
    yield Case("nothing", b"", "empty")
    png = bytearray(photo_as("PNG"))
    png[2000:2100] = bytes(100)
    yield Case("PNG with a hole", bytes(png), "corrupt")
    jpeg = bytearray(photo_as("JPEG"))
    start = jpeg.index(b"\xff\xc4")  # the Huffman tables
    jpeg[start + 4 : start + 24] = b"\xff" * 20
    yield Case("JPEG without tables", bytes(jpeg), "corrupt")
    avif = bytearray(photo_as("AVIF"))
    avif[-9000:-3000] = bytes(6000)
    yield Case("AVIF with a hole", bytes(avif), "completed", None)  # AV1 has no checksums
    webp = bytearray(photo_as("WEBP", lossless=True))
    webp[40:1040] = np.random.default_rng(2).bytes(1000)
    yield Case("WebP with a hole", bytes(webp), "corrupt")
    yield Case(
        "BMP of noise", b"BM\x88\x13\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0" + np.random.default_rng(4).bytes(5000), "corrupt"
    )


def found_by_fuzzing() -> Iterator[Case]:
    """Files that killed a decoder (libheif's, in 1.21)."""
    for path in sorted(SAMPLES.glob("crash*")):
        yield Case(path.stem, path.read_bytes(), "crashed")


def refused() -> Iterator[Case]:
    """What is no picture of ours, called by its name."""
    files = {
        "SVG": b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
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
        "text": b"hello, this is no picture",
        "zeros": bytes(99),
        "one byte": b"G",
    }
    for name, content in files.items():
        yield Case(name, content, "unsupported")


# ---- files no library writes


def wide_profile() -> bytes:
    """An RGB matrix profile with the primaries of Display P3 (D50) and a gamma of 2.2 (ICC.1:2010)."""

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


def _p3_to_srgb(color: tuple[int, ...]) -> tuple[int, ...]:
    matrix = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = np.clip(matrix @ (np.array(color) / 255) ** 2.2, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in (curved * 255).round())


def _png_chunks(size: tuple[int, int], bits: int, color_type: int, data: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _wide_rows() -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
    return np.asarray(picture()).astype(np.uint16) * 257


def _png_of_16_bits() -> bytes:
    rows = _wide_rows().astype(">u2")
    return _png_chunks(SIZE, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def _tiff(bits: int, samples: int, data: bytes, extra: dict[int, tuple[int, int]] | None = None) -> bytes:
    """An uncompressed RGB TIFF of one strip; `extra` are further tags as {tag: (type, value)}."""
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
        if tag == 258:  # one per sample, behind the directory
            content += struct.pack("<HHII", tag, kind, samples, 900)
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
    """What became of a file: `outcome` as in `Case`, the error's sentence, what it took, and what was made."""

    outcome: str
    sentence: str = ""
    cpu_seconds: float = 0
    peak_bytes: int = 0
    variants: tuple[Variant, ...] = ()


def process(content: bytes, sandbox: Sandbox = Sandbox(), rules: Rules = Rules()) -> Result:  # noqa: B008
    """Does with a file what the assets do with an original."""
    try:
        with sandbox.open(decode, content, rules) as session:
            _, preparing = session.call(prepare)
            made, encoding = session.call(render, build_variant_specs())
    except ImagePipelineError as error:
        return Result(getattr(error, "reason", "unexpected"), str(error))
    cpu_seconds = session.usage.cpu_seconds + preparing.cpu_seconds + encoding.cpu_seconds
    return Result("completed", "", cpu_seconds, encoding.peak_bytes, tuple(made))


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the contact sheet.")
def main(folder: Path | None, sheet: Path | None) -> None:
    files = (
        cases()
        if folder is None
        else (Case(path.name, path.read_bytes(), "") for path in sorted(folder.rglob("*")) if path.is_file())
    )
    results = [(case, process(case.content)) for case in files]
    out = Console(width=160)
    table = Table("outcome", "files", "CPU s at most", "memory at most", "an example", "what its uploader is told")
    for outcome in sorted({result.outcome for _, result in results}):
        group = [(case, result) for case, result in results if result.outcome == outcome]
        sentences = dict.fromkeys(result.sentence for _, result in group)
        for index, sentence in enumerate(list(sentences)[: 12 if folder is None else 6]):
            example = next(case.name for case, result in group if result.sentence == sentence)
            cpu = f"{max(result.cpu_seconds for _, result in group):.2f}"
            peak = f"{max(result.peak_bytes for _, result in group) / 1e6:.0f} MB"
            table.add_row(*((outcome, str(len(group)), cpu, peak) if index == 0 else ("",) * 4), example, sentence)
    out.print(table)
    wrong = [(case.name, result.outcome) for case, result in results if case.outcome and case.outcome != result.outcome]
    for name, outcome in wrong:
        out.print(f"[red]{name} ended as {outcome}")
    if sheet:
        draw_sheet([(case.name, result) for case, result in results if result.variants], sheet)
    raise SystemExit(bool(wrong))


def draw_sheet(pictures: list[tuple[str, Result]], path: Path) -> None:
    """Each picture's small WebP and AVIF over a chequered ground, with its name."""
    columns, cell, caption = 10, 110, 26
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * 2 * cell, rows * (cell + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (name, result) in enumerate(pictures):
        x, y = index % columns * 2 * cell, index // columns * (cell + caption)
        for offset, variant in enumerate(result.variants[:2]):
            image = Image.open(io.BytesIO(variant.content)).convert("RGBA")
            image.thumbnail((cell - 6, cell - 6))
            ground = Image.fromarray((np.indices(image.size[::-1]).sum(axis=0) // 8 % 2 * 60 + 180).astype(np.uint8))
            sheet.paste(Image.alpha_composite(ground.convert("RGBA"), image), (x + offset * cell, y))
        draw.text((x, y + cell), name.partition(": ")[2] or name, fill="black")
    sheet.save(path)


if __name__ == "__main__":
    main()

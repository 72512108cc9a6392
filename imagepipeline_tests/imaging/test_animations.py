"""Kept animations have the frames and the number of plays that a browser would show."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from imagepipeline.errors import LimitError, TruncatedImageError, UnreadableImageError
from imagepipeline.imaging.boxes import walk
from imagepipeline.imaging.decoding import decode
from imagepipeline.imaging.variants import render
from imagepipeline.models import build_variant_specs
from imagepipeline_tests.imaging.odd_files import KEEP, encode, picture

SPECS = build_variant_specs()[:2]
COLORS = ("red", "lime", "blue")


def frames():
    return [Image.new("RGB", (32, 24), color) for color in COLORS]


def animation(format_, **options):
    first, *others = frames()
    return encode(first, format_, save_all=True, append_images=others, duration=100, **options)


# A GIF states the number of repetitions after the first play: browsers, libvips and gif2webp agree.
@pytest.mark.parametrize(
    ("format_", "options", "play_count"),
    [
        ("GIF", {}, 1),
        ("GIF", {"loop": 0}, 0),
        ("GIF", {"loop": 1}, 2),
        ("GIF", {"loop": 3}, 4),
        ("WEBP", {"loop": 0}, 0),
        ("WEBP", {"loop": 1}, 1),
        ("WEBP", {"loop": 3}, 3),
        ("PNG", {"loop": 0}, 0),
        ("PNG", {"loop": 1}, 1),
        ("PNG", {"loop": 3}, 3),
    ],
)
def test_variants_play_as_often_as_the_original(format_, options, play_count):
    decoded = decode(animation(format_, **options), KEEP)
    assert decoded.play_count == play_count
    webp, avif = render(decoded, SPECS)
    assert Image.open(io.BytesIO(webp.content)).info["loop"] == play_count
    assert count_plays(avif.content) == play_count
    assert Image.open(io.BytesIO(avif.content)).n_frames == 3


def count_plays(content):
    """Returns how often an AVIF is played, 0 for ever.

    This is the duration of its track, divided by the duration of a round in its edit list.
    """
    boxes = {kind: content[start:end] for kind, start, end in walk_in(content, 0, len(content))}
    duration = int.from_bytes(boxes[b"tkhd"][28:36], "big")
    round_duration = int.from_bytes(boxes[b"elst"][8:16], "big")
    return 0 if duration == 2**64 - 1 else duration // round_duration


def walk_in(content, start, end):
    for kind, first, last in walk(content, start, end):
        yield kind, first, last
        if kind in (b"moov", b"trak", b"edts"):
            yield from walk_in(content, first, last)


def test_the_default_image_of_an_apng_is_not_a_frame():
    first, *others = frames()
    content = encode(
        Image.new("RGB", (32, 24)),
        "PNG",
        save_all=True,
        append_images=[first, *others],
        default_image=True,
    )
    decoded = decode(content, KEEP)
    assert [frame.getpixel((5, 5)) for frame in decoded.frames] == [
        frame.getpixel((5, 5)) for frame in frames()
    ]
    assert decode(content).image.getpixel((5, 5)) == (0, 0, 0)


def gif(*blocks, size=(32, 24)):
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return b"GIF89a" + struct.pack("<HH", *size) + b"\x91\0\0" + palette + b"".join(blocks) + b";"


def block(index, box, disposal=0, clear=None):
    """Returns the block of a frame in one colour of the palette."""
    left, top, width, height = box
    image = Image.new("P", (width, height), index)
    image.putpalette(bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]))
    whole = encode(image, "GIF", interlace=0, optimize=False)
    data = whole[whole.rindex(b",\0\0\0\0" + struct.pack("<HH", width, height)) + 10 : -1]
    control = bytes([0x21, 0xF9, 4, disposal << 2 | (clear is not None), 10, 0, clear or 0, 0])
    return control + b"," + struct.pack("<HHHH", left, top, width, height) + b"\0" + data


@pytest.mark.parametrize(
    ("disposal", "left_behind"),
    [
        *((kept, (255, 0, 0, 255)) for kept in (0, 1, 5, 6, 7)),
        *((removed, (0, 0, 0, 0)) for removed in (2, 3, 4)),
    ],
)
def test_the_disposal_of_a_gif_frame_is_followed(disposal, left_behind):
    content = gif(block(0, (0, 0, 16, 12), disposal), block(1, (16, 12, 16, 12)))
    first, second = decode(content, KEEP).frames
    assert first.getpixel((5, 5)) == (255, 0, 0, 255)
    assert first.getpixel((20, 20))[3] == 0
    assert second.getpixel((5, 5)) == left_behind
    assert second.getpixel((20, 20)) == (0, 255, 0, 255)


def test_a_transparent_colour_shows_the_frame_below():
    content = gif(block(0, (0, 0, 32, 24)), block(2, (0, 0, 32, 24), clear=2))
    assert [frame.convert("RGB").getpixel((5, 5)) for frame in decode(content, KEEP).frames] == [
        (255, 0, 0)
    ] * 2


def test_variants_mix_transparent_and_opaque_frames():
    content = gif(block(0, (0, 0, 16, 12), 2), block(1, (0, 0, 32, 24)))
    decoded = decode(content, KEEP)
    assert {frame.mode for frame in decoded.frames} == {"RGBA"}
    for variant in render(decoded, SPECS):
        assert Image.open(io.BytesIO(variant.content)).n_frames == 2


def test_later_frames_are_ignored_if_only_the_first_is_kept():
    content = gif(block(0, (0, 0, 32, 24)), *[block(1, (0, 0, 32, 24))] * 500)
    assert len(decode(content).frames) == 1
    assert decode(content[: len(content) // 2]).flaw is None


def test_pages_of_a_tiff_are_not_an_animation():
    content = encode(picture(), "TIFF", save_all=True, append_images=frames())
    assert len(decode(content, KEEP).frames) == 1


# ---- APNG, composed here once more by the formulas of W3C PNG, third edition, 13.6

WIDTH, HEIGHT = 24, 20
PALETTE = np.random.default_rng(7).integers(0, 256, (16, 3))
# By kind: colour type, bits, and what makes which value transparent.
KINDS = {
    "grey": (0, 8, b""),
    "grey with a transparent value": (0, 8, struct.pack(">H", 1)),
    "grey of 16 bits": (0, 16, struct.pack(">H", 1)),
    "RGB": (2, 8, b""),
    "RGB with a transparent colour": (2, 8, struct.pack(">3H", 1, 1, 1)),
    "palette with alpha": (3, 8, bytes([0, 128])),
    "RGBA": (6, 8, b""),
    "RGBA of 16 bits": (6, 16, b""),
}
CHANNELS = {0: 1, 2: 3, 3: 1, 6: 4}


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def control(number, box, disposal=0, blending=0):
    left, top, width, height = box
    return chunk(
        b"fcTL",
        struct.pack(">5I2H2B", number, width, height, left, top, 10, 100, disposal, blending),
    )


def apng(kind, pixels, controls, declared=None):
    """An APNG whose frames have those pixels [height, width, channels]."""
    color_type, bits, clear = KINDS[kind]
    header = struct.pack(">2I5B", WIDTH, HEIGHT, bits, color_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"acTL", struct.pack(">2I", declared or len(pixels), 0))
    content += chunk(b"PLTE", PALETTE.astype("u1").tobytes()) if color_type == 3 else b""
    content += chunk(b"tRNS", clear) if clear else b""
    for index, (values, fields) in enumerate(zip(pixels, controls, strict=True)):
        rows = values.astype(">u2" if bits == 16 else "u1")
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        content += control(index, *fields)
        content += chunk(b"fdAT", bytes(4) + data) if index else chunk(b"IDAT", data)
    return content + chunk(b"IEND", b"")


def to_rgba(kind, values):
    color_type, bits, clear = KINDS[kind]
    shown = np.full((*values.shape[:2], 4), 255.0)
    if color_type == 3:
        alphas = np.array([*clear, *[255] * (16 - len(clear))])
        shown[..., :3], shown[..., 3] = PALETTE[values[..., 0]], alphas[values[..., 0]]
        return shown
    bytes_ = values / 257 if bits == 16 else values
    shown[..., : 4 if color_type == 6 else 3] = bytes_
    if clear:
        shown[..., 3][(values == 1).all(axis=2)] = 0
    return shown


def compose(kind, pixels, controls):
    canvas, shown = np.zeros((HEIGHT, WIDTH, 4)), []
    for index, (values, fields) in enumerate(zip(pixels, controls, strict=True)):
        (left, top, width, height), disposal, blending = fields
        area = canvas[top : top + height, left : left + width]
        before, new = area.copy(), to_rgba(kind, values)
        if blending:
            over, under = new[..., 3:] / 255, area[..., 3:] / 255
            alpha = over + under * (1 - over)
            mixed = new[..., :3] * over + area[..., :3] * under * (1 - over)
            area[:] = np.concatenate([mixed / np.maximum(alpha, 1e-9), alpha * 255], axis=2)
        else:
            area[:] = new
        shown.append(canvas.copy())
        if disposal:
            area[:] = before if disposal == 2 and index else 0
    return shown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_frames_of_an_apng_are_composed_as_the_standard_says(kind, seed):
    rng = np.random.default_rng(seed)
    color_type, bits, _ = KINDS[kind]
    top_value = {3: 16}.get(color_type, 2**bits)
    pixels, controls = [], []
    for index in range(5):
        left, top = (int(rng.integers(0, side - 4)) if index else 0 for side in (WIDTH, HEIGHT))
        width, height = WIDTH - left, HEIGHT - top
        if index:
            width, height = (int(rng.integers(1, side + 1)) for side in (width, height))
        values = rng.integers(0, top_value, (height, width, CHANNELS[color_type]))
        values[rng.random((height, width)) < 0.4] = 1
        pixels.append(values)
        controls.append(((left, top, width, height), (seed + index) % 3, int(rng.integers(0, 2))))
    decoded = decode(apng(kind, pixels, controls), KEEP)
    assert decoded.durations_ms == (100,) * 5
    for frame, wanted in zip(decoded.frames, compose(kind, pixels, controls), strict=True):
        found = np.asarray(frame.convert("RGBA")).astype(float)
        visible = found[..., 3:] / 255, wanted[..., 3:] / 255
        assert abs(found[..., 3] - wanted[..., 3]).max() <= 2
        assert abs(found[..., :3] * visible[0] - wanted[..., :3] * visible[1]).max() <= 4


def flat_apng(*boxes, declared=None):
    pixels = [np.full((box[3], box[2], 3), 9) for box in boxes]
    return apng("RGB", pixels, [(box, 0, 0) for box in boxes], declared)


@pytest.mark.parametrize("box", [(20, 0, 5, 5), (0, 20, 5, 1), (0, 0, 25, 1), (0, 2**31, 1, 1)])
def test_a_frame_of_an_apng_must_be_within_the_canvas(box):
    content = flat_apng((0, 0, WIDTH, HEIGHT), (0, 0, 5, 5))
    changed = content.replace(control(1, (0, 0, 5, 5)), control(1, box))
    assert changed != content
    with pytest.raises(UnreadableImageError, match="not within"):
        decode(changed, KEEP)
    assert decode(changed).image.size == (WIDTH, HEIGHT)


def test_an_apng_cut_off_after_some_frames_is_truncated():
    content = flat_apng(*[(0, 0, WIDTH, HEIGHT)] * 3)
    cut = content[: content.rindex(b"fcTL") - 4]
    with pytest.raises(TruncatedImageError, match="2 of 3 frames"):
        decode(cut, KEEP)
    kept = decode(cut, replace(KEEP, is_truncated_accepted=True))
    assert (len(kept.frames), kept.flaw) == (2, "2 of 3 frames could be read")


def test_the_frames_of_an_apng_are_limited_whatever_it_declares():
    content = flat_apng(*[(0, 0, WIDTH, HEIGHT)] * 3, declared=1)
    with pytest.raises(LimitError, match="MAX_FRAMES"):
        decode(content, replace(KEEP, max_frames=2))
    with pytest.raises(LimitError, match="MAX_PIXELS"):
        decode(content, replace(KEEP, max_pixels=2 * WIDTH * HEIGHT))

"""Kept animations have the frames and the number of plays that a browser would show."""

import io
import struct

import pytest
from PIL import Image

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
    [(0, (255, 0, 0, 255)), (1, (255, 0, 0, 255)), (2, (0, 0, 0, 0)), (3, (0, 0, 0, 0))],
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

"""Every odd file ends with the right picture, or fails for the right reason.

None of them needs an import after the sandbox's warm-up, or a system call that is refused.
"""

import io
from contextlib import closing
from dataclasses import replace

import pytest
from PIL import Image

from imagepipeline.errors import LimitError
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.sandbox import Sandbox, Zygote
from imagepipeline_tests.imaging.odd_files import encode, list_groups, process

pytestmark = pytest.mark.stack

LOSSY = 14  # steps of 255, for quality 75 and chroma at half resolution


@pytest.fixture(scope="module")
def sandbox():
    with closing(Zygote("imagepipeline_tests.imaging.watched_operations")) as zygote:
        yield Sandbox(zygote=zygote)


@pytest.mark.parametrize("group", list_groups(), ids=lambda group: group.__name__)
def test_an_odd_file_ends_as_expected(group, sandbox, subtests):
    for case in group():
        with subtests.test(case.name):
            check(case, sandbox)


def check(case, sandbox):
    result = process(case.content, sandbox, case.rules)
    assert result.outcome == case.outcome, result.sentence
    assert case.sentence in result.sentence
    if not result.variants:
        assert len(result.sentence) > 20
        assert "0x" not in result.sentence
        return
    pictures = [Image.open(io.BytesIO(variant.content)) for variant in result.variants]
    for picture in pictures:
        assert_shows(picture, case.colors)
        assert picture.size == pictures[0].size or pictures[0].width == 640  # none is enlarged
        assert not picture.info.get("exif")
        assert not picture.info.get("icc_profile")


def assert_shows(picture, colors):
    if colors is None:
        return
    pixels = picture.convert("RGBA")
    width, height = pixels.size
    for index, color in enumerate(colors):
        found = pixels.getpixel(
            (int((0.25 + index % 2 / 2) * width), int((0.25 + index // 2 / 2) * height))
        )
        expected = color if len(color) == 4 else (*color, 255)
        if expected[3] == 0:  # transparent pixels have no defined colour
            assert found[3] == 0
        else:
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= LOSSY, (
                index,
                found,
                expected,
            )


@pytest.mark.parametrize("format_", ["PNG", "GIF", "TIFF"])
def test_too_little_memory_is_no_damage(sandbox, format_):
    options = {"compression": "tiff_lzw"} if format_ == "TIFF" else {}
    content = encode(Image.new("L", (7000, 7000)), format_, **options)
    with pytest.raises(LimitError, match=r"40 MB.*IMAGEPIPELINE_MAX_MEMORY_BYTES"):
        replace(sandbox, memory_bytes=40_000_000).open(decode, content, Rules())

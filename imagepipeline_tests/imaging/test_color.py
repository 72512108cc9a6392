"""Converted colours agree with independent formulas and with what Chromium shows."""

import struct

import numpy as np
import pytest
from PIL import Image

from imagepipeline.imaging.color import (
    HLG,
    PQ,
    ColorSpace,
    read_nclx,
    read_png_space,
    to_srgb,
    tone_map,
)

GREYS = (33, 66, 132, 197, 255)
# GREYS as Chromium 156 shows them in a PNG with cICP. PQ and HLG have the primaries of BT.2020.
SHOWN = {
    (1, 1): (21, 56, 125, 194, 255),
    (1, 4): (27, 64, 133, 198, 255),
    (1, 5): (11, 42, 111, 185, 255),
    (1, 7): (51, 83, 145, 204, 255),
    (1, 8): (101, 139, 190, 228, 255),
    (1, 13): GREYS,
    (1, 17): (16, 50, 123, 197, 255),
    (9, 16): (5, 32, 142, 255, 255),
    (9, 18): (15, 45, 103, 198, 255),
}
# (197, 0, 0) in other primaries with the curve of sRGB, as Chromium 156 shows it.
REDS = {
    4: (235, 0, 0),
    5: (201, 0, 0),
    6: (192, 25, 0),
    8: (225, 0, 0),
    9: (247, 0, 0),
    11: (210, 0, 0),
    12: (216, 0, 0),
    22: (199, 27, 0),
}


def show(rgb, space):
    image = Image.fromarray(np.array([rgb], dtype=np.uint8))
    return np.asarray(to_srgb(image, space))[0].astype(int)


@pytest.mark.parametrize("codes", SHOWN)
def test_each_curve_agrees_with_a_browser(codes):
    shown = show([(grey,) * 3 for grey in GREYS], ColorSpace(codes=codes))
    assert abs(shown - np.array(SHOWN[codes])[:, None]).max() <= 1


@pytest.mark.parametrize("primaries", REDS)
def test_each_set_of_primaries_agrees_with_a_browser(primaries):
    assert (
        abs(show([(197, 0, 0)], ColorSpace(codes=(primaries, 13)))[0] - REDS[primaries]).max() <= 1
    )


def test_display_p3_agrees_with_its_matrix():
    # Linear P3-D65 to linear sRGB, from the primaries in SMPTE EG 432-1 and IEC 61966-2-1.
    matrix = np.array(
        [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09828]]
    )
    pixels = np.random.default_rng(1).integers(0, 256, (500, 3))
    value = pixels / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    expected = np.clip(linear @ matrix.T, 0, 1)
    expected = (
        np.where(expected <= 0.0031308, 12.92 * expected, 1.055 * expected ** (1 / 2.4) - 0.055)
        * 255
    )
    assert abs(show(pixels, ColorSpace(codes=(12, 13))) - expected).max() <= 1


def test_hdr_white_loses_one_stop_and_the_peak_becomes_white():
    def code_pq(nits):  # SMPTE ST 2084, equation 5.2
        power = (nits / 10_000) ** 0.1593017578125
        return round(255 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375)

    greys = np.array([[code_pq(nits)] * 3 for nits in (203, 1000, 4000)], dtype=np.uint8)
    white, peak, beyond = tone_map(greys, 9, PQ, 1000)[:, 0]
    assert white == pytest.approx(188, abs=3)  # half the light, encoded as sRGB
    assert peak == pytest.approx(255, abs=1)
    assert beyond == 255
    brighter = tone_map(greys, 9, PQ, 4000)[:, 0]
    assert brighter[1] < brighter[2] == 255  # a higher peak keeps the highlights distinct
    dim = tone_map(greys, 9, PQ, 203)[:, 0]
    assert dim[0] >= 253  # a picture without highlights is not darkened


def test_tone_mapping_preserves_order_and_keeps_greys_neutral():
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    for transfer in (PQ, HLG):
        for peak in (100, 400, 1000, 10_000):
            shown = tone_map(greys, 9, transfer, peak).astype(int)
            assert (np.diff(shown[:, 0]) >= 0).all()
            assert abs(shown - shown[:, :1]).max() <= 1


def test_the_most_precise_colour_chunk_of_a_png_counts():
    gamma = struct.pack(">I", 50_000)
    wide = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    chunks = {b"cICP": bytes([12, 13, 0, 1]), b"sRGB": b"\0", b"gAMA": gamma, b"cHRM": wide}
    assert read_png_space(chunks, b"icc").codes == (12, 13)
    del chunks[b"cICP"]
    assert read_png_space(chunks, b"icc") == ColorSpace(b"icc")
    assert read_png_space(chunks, None) == ColorSpace()
    del chunks[b"sRGB"]
    found = read_png_space(chunks, None)
    assert found.gamma == 2
    assert found.chromaticities == pytest.approx(
        (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329)
    )
    assert read_png_space({b"cHRM": wide}, None) == ColorSpace()


@pytest.mark.parametrize("codes", [b"\xff\xff\0\1", b"\0\0\0\1", b"\x0c\x0d\1\1", b"\x0c"])
def test_unknown_code_points_are_taken_as_srgb(codes):
    assert read_png_space({b"cICP": codes}, None) == ColorSpace()


def test_impossible_chromaticities_are_taken_as_srgb():
    for values in ((0,) * 8, (1,) * 8, (31270, 0, 1, 1, 1, 1, 1, 1), (2**31,) * 8):
        chunks = {b"gAMA": struct.pack(">I", 100_000), b"cHRM": struct.pack(">8I", *values)}
        shown = show([(10, 100, 200)], read_png_space(chunks, None))
        assert shown.shape == (1, 3)


def test_the_peak_is_read_from_the_file():
    def nclx(codes):
        return b"nclx" + struct.pack(">HHHB", *codes, 9, 0x80)

    assert read_nclx(nclx((9, 16)), None, None).peak_nits == 1000
    assert read_nclx(nclx((9, 16)), struct.pack(">HH", 4000, 400), None).peak_nits == 4000
    mastering = bytes(16) + struct.pack(">II", 600 * 10_000, 50)
    assert read_nclx(nclx((9, 16)), None, mastering).peak_nits == 600
    codes = read_nclx(nclx((1, 1)), None, None).codes
    assert codes == (1, 13)  # in a still picture, the curve of video is taken as sRGB's
    assert read_nclx(nclx((255, 255)), None, None) == ColorSpace()

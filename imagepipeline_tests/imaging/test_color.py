"""Converted colours agree with independent formulas and with what Chromium shows."""

import struct
import zlib

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms

from imagepipeline.imaging.color import (
    HLG,
    PQ,
    TO_LINEAR,
    ColorSpace,
    plan_reduction,
    read_nclx,
    read_png_space,
    to_srgb,
    tone_map,
)
from imagepipeline.imaging.decoding import decode
from imagepipeline_tests.imaging.odd_files import (
    encode,
    picture,
    png_of_16_bits,
    wide_profile,
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


@pytest.mark.parametrize(
    ("gamma", "is_srgb"),
    [(43_180, False), (43_185, True), (45_454, True), (47_725, True), (47_730, False)],
)
def test_a_gamma_near_that_of_srgb_stands_for_srgb_as_in_chromium(gamma, is_srgb):
    found = read_png_space({b"gAMA": struct.pack(">I", gamma)}, None)
    assert (found == ColorSpace()) == is_srgb


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


@pytest.mark.parametrize("space", [b"RGB ", b"GRAY"])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_rgb_describes_grey_too(space, mode):
    grey = Image.new(mode, (8, 8), 50 if mode == "L" else (50, 128))
    decoded = decode(encode(grey, "PNG", icc_profile=linear_profile(space)))
    assert decoded.image.convert("RGB").getpixel((0, 0)) == (122, 122, 122)


def test_of_two_profiles_in_a_jpeg_the_first_counts():
    whole = encode(picture(), "JPEG", icc_profile=wide_profile())
    later = encode(picture(), "JPEG", icc_profile=linear_profile())
    start = later.index(b"\xff\xe2")
    end = start + 2 + int.from_bytes(later[start + 2 : start + 4], "big")
    at = whole.index(b"\xff\xdb")
    both = whole[:at] + later[start:end] + whole[at:]
    assert decode(both).image.tobytes() == decode(whole).image.tobytes()


# ---- linear light in 16 bits

LEVELS = np.arange(256, dtype=np.uint8).reshape(8, 32)
RAMPS = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=2)
GAMMA = (b"gAMA", struct.pack(">I", 100_000))
LINEAR, SRGB_CURVE = 8, 13


def linear(levels):
    return (TO_LINEAR[SRGB_CURVE](levels / 255) * 65_535).round().astype(np.uint16)


def linear_profile(space=b"RGB "):
    """A profile of linear light with sRGB's primaries, or of grey (ICC.1:2022, 8.3, 8.4)."""
    names = (b"rTRC", b"gTRC", b"bTRC") if space == b"RGB " else (b"kTRC",)
    tags = dict.fromkeys(names, b"curv" + bytes(8))
    if space == b"RGB ":
        whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for at in range(132, 132 + 12 * int.from_bytes(whole[128:132], "big"), 12):
            name, start, size = struct.unpack_from(">4sII", whole, at)
            if name in (b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"):
                tags[name] = whole[start : start + size]
    else:
        tags[b"wtpt"] = b"XYZ " + bytes(4) + struct.pack(">3I", 63_190, 65_536, 54_061)
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3I",
        *(start + len(data), 0x02400000, b"mntr", space, b"XYZ ", b"acsp"),
        *(63_190, 65_536, 54_061),
    )
    return header.ljust(128, b"\0") + table + data


def tiff(values, profile, compression):
    image = pyvips.Image.new_from_array(values)
    image = image.copy(interpretation="rgb16" if values.ndim == 3 else "grey16")
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    return image.tiffsave_buffer(compression=compression)


def packed_profile(profile):
    return b"iCCP", b"linear\0\0" + zlib.compress(profile)


ALPHA = np.full((8, 32, 1), 65_535, np.uint16)
CLEAR = (b"tRNS", linear(RAMPS[0, 0]).astype(">u2").tobytes())
LINEAR_FILES = {
    "PNG, gAMA": lambda: png_of_16_bits(linear(RAMPS), GAMMA),
    "PNG, cICP": lambda: png_of_16_bits(linear(RAMPS), (b"cICP", bytes([1, LINEAR, 0, 1]))),
    "PNG, profile": lambda: png_of_16_bits(linear(RAMPS), packed_profile(linear_profile())),
    "PNG, alpha": lambda: png_of_16_bits(np.dstack([linear(RAMPS), ALPHA]), GAMMA),
    "PNG, grey": lambda: png_of_16_bits(linear(LEVELS), GAMMA),
    "PNG, grey, profile": lambda: png_of_16_bits(
        linear(LEVELS), packed_profile(linear_profile(b"GRAY"))
    ),
    "PNG, grey, profile of RGB": lambda: png_of_16_bits(
        linear(LEVELS), packed_profile(linear_profile())
    ),
    "TIFF": lambda: tiff(linear(RAMPS), linear_profile(), "none"),
    "TIFF, compressed": lambda: tiff(linear(RAMPS), linear_profile(), "deflate"),
    "TIFF, grey": lambda: tiff(linear(LEVELS), linear_profile(b"GRAY"), "lzw"),
    "TIFF, grey, profile of RGB": lambda: encode(
        Image.fromarray(linear(LEVELS)), "TIFF", icc_profile=linear_profile()
    ),
}


@pytest.mark.parametrize("name", LINEAR_FILES)
def test_16_bits_of_linear_light_keep_their_darks(name):
    found = np.asarray(decode(LINEAR_FILES[name]()).image).astype(int)
    wanted = np.repeat(LEVELS[..., None], 3, axis=2) if "grey" in name else RAMPS
    assert abs(found - wanted).max() <= 1


def test_grey_with_alpha_of_16_linear_bits_is_shown_as_its_upper_bytes():
    values = np.dstack([linear(LEVELS), ALPHA - 1000])
    found = np.asarray(decode(png_of_16_bits(values, GAMMA)).image)[..., 0].astype(int)
    upper = (linear(LEVELS) >> 8) / 255
    coded = np.where(upper <= 0.0031308, 12.92 * upper, 1.055 * upper ** (1 / 2.4) - 0.055) * 255
    assert abs(found - coded).max() <= 1


def test_a_transparent_colour_of_16_linear_bits_is_kept():
    decoded = np.asarray(decode(png_of_16_bits(linear(RAMPS), GAMMA, CLEAR)).image)
    assert decoded[0, 0, 3] == 0
    assert abs(decoded[..., :3].astype(int) - RAMPS)[decoded[..., 3] > 0].max() <= 1
    grey = (b"tRNS", linear(LEVELS[:1, :1]).astype(">u2").tobytes())
    decoded = np.asarray(decode(png_of_16_bits(linear(LEVELS), GAMMA, grey)).image)
    assert (decoded[..., 3] == 0).sum() == 1
    assert abs(decoded[..., 0].astype(int) - LEVELS)[decoded[..., 3] > 0].max() <= 1


def test_linear_light_of_a_wide_gamut_has_the_colours_that_its_primaries_say():
    def show_coded(values, transfer):
        chunk = (b"cICP", bytes([12, transfer, 0, 1]))
        return np.asarray(decode(png_of_16_bits(values, chunk)).image).astype(int)

    coded = show_coded(RAMPS.astype(np.uint16) * 257, SRGB_CURVE)
    assert abs(show_coded(linear(RAMPS), LINEAR) - coded).max() <= 1


@pytest.mark.parametrize("gamma", [45_455, 50_000, 55_556])
def test_a_curve_for_displays_needs_no_second_look(gamma):
    assert plan_reduction(ColorSpace(gamma=100_000 / gamma), is_grey=False) is None


def test_a_broken_profile_of_linear_light_is_harmless():
    rng = np.random.default_rng(6)
    whole = linear_profile()
    for _ in range(300):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(broken), 3):
            broken[at] = rng.integers(0, 256)
        content = png_of_16_bits(linear(RAMPS), packed_profile(bytes(broken)))
        assert decode(content).image.size == (32, 8)

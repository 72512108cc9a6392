"""Converts stored colours to sRGB, using the file's ICC profile or its CICP code points.

If a file describes its colours in several ways, the most precise one counts, as in browsers. PNG:
`cICP`, then an ICC profile, then `sRGB`, then `gAMA` with `cHRM`. AVIF and HEIC: an ICC profile,
then `nclx`. Without a description, the colours are taken as sRGB.
"""

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from imagepipeline.imaging import icc

Floats = NDArray[np.floating]
SRGB = ImageCms.createProfile("sRGB")
# x and y of red, green, blue and white.
SRGB_PRIMARIES = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290)
D50 = np.array([0.9642, 1.0, 0.8249])  # white of the profile connection space, ICC.1:2022, 7.2.16
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
CURVE_ENTRIES = 4096
# ITU-T H.273, table 2. The missing 1 (BT.709) and 2 (unspecified) have sRGB's primaries.
PRIMARIES: dict[int, tuple[float, ...]] = {
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    10: (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1 / 3, 1 / 3),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, 0.3127, 0.3290),
}
BT2020 = 9
SRGB_CURVE, PQ, HLG = 13, 16, 18  # transfer characteristics, ITU-T H.273, table 3
REFERENCE_WHITE_NITS = 203  # of HDR pictures, ITU-R BT.2408
DEFAULT_PEAK_NITS = 1000  # the usual peak of PQ pictures, and the one HLG is defined for
KNEE = 0.65  # how sharply the tone curve bends at reference white
SRGB_GAMMA = 45_455  # the gAMA of an sRGB picture
SRGB_GAMMA_TOLERANCE = 0.05  # writers round; Chromium takes all that is as near as sRGB
MAX_S15 = 32_000  # a little below the largest s15Fixed16Number of an ICC profile
STRIP_ROWS = 128
# A curve is flat in the darks if a tenth of its range is more light than this; sRGB's is 0.010.
FLAT_LIGHT = 0.02


@dataclass(frozen=True)
class ColorSpace:
    """The colour space of a picture: sRGB, unless one of the first three attributes is set.

    Attributes:
        profile: ICC profile.
        codes: code points of the primaries and the transfer characteristics (ITU-T H.273); with a
            profile only those of HDR, which it states and cannot describe otherwise.
        gamma: exponent from stored to linear values.
        chromaticities: x and y of red, green, blue and white; used with `gamma`.
        peak_nits: brightness of the brightest pixel of a PQ picture.
    """

    profile: bytes | None = None
    codes: tuple[int, int] | None = None
    gamma: float | None = None
    chromaticities: tuple[float, ...] = SRGB_PRIMARIES
    peak_nits: float = DEFAULT_PEAK_NITS


@dataclass(frozen=True)
class Reduction:
    """How to reduce samples of 16 bits to bytes whose darks are not too coarse.

    Attributes:
        table: the byte for each value.
        space: the colour space of these bytes.
    """

    table: NDArray[np.uint8]
    space: ColorSpace


def plan_reduction(space: ColorSpace, is_grey: bool) -> Reduction | None:
    """How to reduce 16 bits if their curve is flat in the darks, as that of linear light is.

    Its bytes have few values for the darks, where the eye tells most apart. So each value is coded
    by sRGB's curve while it still has 16 bits. None if the upper byte is as good.
    """
    if space.codes and space.codes[1] in (PQ, HLG):
        return None
    profile = space.profile or _build_profile(space)
    if profile is None or (not is_grey and profile[16:20] == b"GRAY"):
        return None
    linear = icc.read_curve(profile)
    if linear is None or not linear[0] < FLAT_LIGHT < linear[icc.STEPS // 10]:
        return None
    table = SRGB_BYTES[(np.clip(linear, 0, 1) * (len(SRGB_BYTES) - 1) + 0.5).astype(np.uint16)]
    if is_grey or (not space.profile and _get_primaries(space) == SRGB_PRIMARIES):
        return Reduction(table, ColorSpace())
    curve = TO_LINEAR[SRGB_CURVE](np.linspace(0, 1, CURVE_ENTRIES))
    return Reduction(table, ColorSpace(icc.replace_curve(profile, curve)))


def to_srgb(image: Image.Image, space: ColorSpace) -> Image.Image:
    """Converts an image in mode L, RGB, CMYK or LAB to mode RGB in sRGB."""
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        return _convert_profile(image, lab).convert("RGB")
    # HDR is never in CMYK, whatever a profile of other colours says.
    if space.codes and space.codes[1] in (PQ, HLG) and image.mode != "CMYK":
        return _map_tones(image.convert("RGB"), *space.codes, space.peak_nits)
    if space.profile:
        return _convert_profile(image, space.profile).convert("RGB")
    image = image.convert("RGB")
    profile = _build_profile(space)
    return _convert_profile(image, profile) if profile else image


def read_icc(profile: bytes | None) -> ColorSpace:
    """Returns the colour space that an ICC profile describes; None describes sRGB."""
    codes = icc.read_codes(profile) if profile else None
    is_hdr = codes is not None and codes[1] in (PQ, HLG) and _is_known(*codes)
    return ColorSpace(profile, codes if is_hdr else None)


def read_png_space(chunks: Mapping[bytes, bytes], profile: bytes | None) -> ColorSpace:
    """Returns the colour space given by a PNG's chunks (W3C PNG, third edition, 4.3, 11.3.2)."""
    coded = chunks.get(b"cICP", b"")
    if len(coded) == 4 and coded[2] == 0 and coded[3] == 1 and _is_known(coded[0], coded[1]):
        levels, mastering = chunks.get(b"cLLI", b""), chunks.get(b"mDCV", b"")
        brightest = _number(levels[:4]) / 10_000 or _number(mastering[16:20]) / 10_000
        return ColorSpace(codes=(coded[0], coded[1]), peak_nits=brightest or DEFAULT_PEAK_NITS)
    if profile:
        return read_icc(profile)
    gamma, chromaticities = _number(chunks.get(b"gAMA", b"")), chunks.get(b"cHRM", b"")
    if b"sRGB" in chunks or not gamma:
        return ColorSpace()
    if len(chromaticities) == 32:
        white_x, white_y, *colors = (
            value / 100_000 for value in struct.unpack(">8I", chromaticities)
        )
        return ColorSpace(gamma=100_000 / gamma, chromaticities=(*colors, white_x, white_y))
    is_srgb = abs(gamma / SRGB_GAMMA - 1) <= SRGB_GAMMA_TOLERANCE
    return ColorSpace() if is_srgb else ColorSpace(gamma=100_000 / gamma)


def read_nclx(colr: bytes, clli: bytes | None, mdcv: bytes | None) -> ColorSpace:
    """Returns the colour space given by properties of an AVIF or HEIC.

    See ISO/IEC 14496-12, 12.1.5 to 12.1.7.

    Args:
        colr: content of the `colr` property of type `nclx`.
        clli: content of the `clli` property, the content light level.
        mdcv: content of the `mdcv` property, the mastering display.
    """
    primaries, transfer = _number(colr[4:6]), _number(colr[6:8])
    if not _is_known(primaries, transfer):
        return ColorSpace()
    if transfer in VIDEO_CURVES:  # in still pictures, browsers take these curves as sRGB's
        transfer = SRGB_CURVE
    brightest = _number((clli or b"")[:2]) or _number((mdcv or b"")[16:20]) / 10_000
    return ColorSpace(codes=(primaries, transfer), peak_nits=brightest or DEFAULT_PEAK_NITS)


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big")


def _is_known(primaries: int, transfer: int) -> bool:
    """Whether we can convert from both code points."""
    return (primaries in (1, 2) or primaries in PRIMARIES) and (
        transfer in (2, PQ, HLG) or transfer in TO_LINEAR
    )


# ---- matrices and curves


def _from_xyz(primaries: tuple[float, ...]) -> Floats:
    return np.asarray(np.linalg.inv(_to_xyz(primaries)))


def _to_xyz(primaries: tuple[float, ...]) -> Floats:
    """Returns the matrix from linear RGB to CIE XYZ (SMPTE RP 177)."""
    red_x, red_y, green_x, green_y, blue_x, blue_y, white_x, white_y = primaries
    x, y = np.array([red_x, green_x, blue_x]), np.array([red_y, green_y, blue_y])
    colors = np.stack([x, y, 1 - x - y])
    white = np.array([white_x, white_y, 1 - white_x - white_y]) / white_y
    return np.asarray(colors * np.linalg.solve(colors, white))


def _power(exponent: float) -> Callable[[Floats], Floats]:
    return lambda value: np.asarray(value**exponent)


def _with_toe(
    exponent: float, slope: float, offset: float, end: float
) -> Callable[[Floats], Floats]:
    """Returns a curve that is linear up to `end` and a shifted power above it."""
    return lambda value: np.where(
        value < end, value / slope, ((value + offset) / (1 + offset)) ** exponent
    )


VIDEO_CURVES = (1, 6, 11, 14, 15)  # BT.709 and similar curves
# Curves from stored to linear values (0..1) by code point (ITU-T H.273, table 3). They describe the
# display, not the camera: video encoded by BT.709 is made for a display of gamma 2.4 (ITU-R
# BT.1886). The missing 2 (unspecified) is taken as sRGB's.
TO_LINEAR: dict[int, Callable[[Floats], Floats]] = {
    **dict.fromkeys(VIDEO_CURVES, _power(2.4)),
    4: _power(2.2),
    5: _power(2.8),
    7: _with_toe(1 / 0.45, 4.0, 0.1115, 0.0912),
    8: _power(1.0),
    SRGB_CURVE: _with_toe(2.4, 12.92, 0.055, 0.04045),
    17: lambda value: value**2.6 * 52.37 / 48,
}


def _get_primaries(space: ColorSpace) -> tuple[float, ...]:
    if space.gamma:
        return space.chromaticities
    return PRIMARIES.get(space.codes[0], SRGB_PRIMARIES) if space.codes else SRGB_PRIMARIES


@lru_cache(maxsize=8)
def _build_profile(space: ColorSpace) -> bytes | None:
    """Builds an ICC profile (ICC.1:2022, 8.3) from the codes or the gamma of a colour space.

    Returns None if the space is sRGB, or if its chromaticities are impossible.
    """
    primaries = _get_primaries(space)
    if space.gamma:
        curve = _power(space.gamma)
    else:
        codes = space.codes or (1, SRGB_CURVE)
        curve = TO_LINEAR.get(codes[1], TO_LINEAR[SRGB_CURVE])
        if primaries is SRGB_PRIMARIES and curve is TO_LINEAR[SRGB_CURVE]:
            return None
    try:
        with np.errstate(all="ignore"):  # impossible chromaticities show up in the result
            to_xyz = _to_xyz(primaries)
            white = to_xyz.sum(axis=1)
            scale = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
            columns = np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ to_xyz
    except (ZeroDivisionError, np.linalg.LinAlgError):
        return None
    if not np.isfinite(columns).all() or abs(columns).max() > MAX_S15:
        return None
    entries = np.clip(curve(np.linspace(0, 1, CURVE_ENTRIES)), 0, 1) * 65_535
    shared = (
        b"curv" + struct.pack(">II", 0, CURVE_ENTRIES) + entries.round().astype(">u2").tobytes()
    )
    tags = {
        b"wtpt": _xyz(D50),
        b"rXYZ": _xyz(columns[:, 0]),
        b"gXYZ": _xyz(columns[:, 1]),
        b"bXYZ": _xyz(columns[:, 2]),
    }
    count = len(tags) + 3
    table, data, start = struct.pack(">I", count), b"", 132 + 12 * count
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        table += name + struct.pack(">II", start + len(data), len(shared))
    size = start + len(data) + len(shared)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    ) + _s15(*D50)
    return header.ljust(128, b"\0") + table + data + shared


def _xyz(values: Floats) -> bytes:
    return b"XYZ \0\0\0\0" + _s15(*values)


def _s15(*values: float) -> bytes:
    return b"".join(round(value * 65_536).to_bytes(4, "big", signed=True) for value in values)


def _convert_profile(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode == "L" and profile[16:20] == b"RGB ":  # grey is a colour, too
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image  # the profile is broken or for other colours: assume sRGB, as browsers do
    return converted if converted is not None else image


# ---- HDR


def _code_srgb() -> NDArray[np.uint8]:
    """Returns a table of 65,536 steps of linear light as sRGB bytes (IEC 61966-2-1)."""
    linear = np.linspace(0, 1, 65_536)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (coded * 255).round().astype(np.uint8)


SRGB_BYTES = _code_srgb()


def _map_tones(image: Image.Image, primaries: int, transfer: int, peak_nits: float) -> Image.Image:
    """Converts an RGB image of PQ or HLG values to sRGB.

    It works in strips, because the intermediate values take twelve times the image's memory.
    """
    stored = np.asarray(image)
    shown = np.empty_like(stored)
    for row in range(0, len(stored), STRIP_ROWS):
        strip = stored[row : row + STRIP_ROWS]
        mapped = tone_map(strip.reshape(-1, 3), primaries, transfer, peak_nits)
        shown[row : row + STRIP_ROWS] = mapped.reshape(strip.shape)
    return Image.fromarray(shown)


def tone_map(
    stored: NDArray[np.uint8], primaries: int, transfer: int, peak_nits: float
) -> NDArray[np.uint8]:
    """Converts PQ or HLG bytes [n, 3] to sRGB bytes [n, 3], with the tone curve of Chromium.

    The curve scales each pixel by its brightest channel in BT.2020. Up to reference white (203
    nits, ITU-R BT.2408) a picture that reaches 1,000 nits or more is darkened by one stop, and a
    less bright one by less. The highlights above are compressed into the range this frees, up to
    the picture's peak.
    """
    steps = np.linspace(0, 1, 256)
    to_wide = (
        (_from_xyz(PRIMARIES[BT2020]) @ _to_xyz(PRIMARIES.get(primaries, SRGB_PRIMARIES)))
        .astype(np.float32)
        .T
    )
    to_shown = (_from_xyz(SRGB_PRIMARIES) @ _to_xyz(PRIMARIES[BT2020])).astype(np.float32).T
    if transfer == PQ:
        linear = (_pq_to_nits(steps) / REFERENCE_WHITE_NITS).astype(np.float32)[stored] @ to_wide
    else:  # HLG is defined for 1,000 nits, whatever the file says (ITU-R BT.2100, table 5)
        peak_nits = DEFAULT_PEAK_NITS
        scene = _hlg_to_scene(steps).astype(np.float32)[stored] @ to_wide
        luminance = np.maximum(scene @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32), 1e-9)
        peak = np.float32(DEFAULT_PEAK_NITS / REFERENCE_WHITE_NITS)
        linear = scene * (luminance ** np.float32(0.2) * peak)[:, None]
    brightest = np.maximum(linear.max(axis=1), 1e-9)
    linear *= (_bend(brightest, max(peak_nits / REFERENCE_WHITE_NITS, 1.0)) / brightest)[:, None]
    shown = np.clip(linear @ to_shown, 0, 1)
    return SRGB_BYTES[(shown * (len(SRGB_BYTES) - 1) + 0.5).astype(np.uint16)]


def _bend(value: Floats, peak: float) -> Floats:
    """Applies the tone curve to values relative to reference white.

    The curve is a straight line up to reference white; a quadratic Bézier curve then continues it
    smoothly to (peak, 1).
    """
    if peak <= 1:
        return np.minimum(value, 1.0)
    white = 1 - 0.5 * min(
        1.0, float(np.log(peak) / np.log(DEFAULT_PEAK_NITS / REFERENCE_WHITE_NITS))
    )
    middle, height = (1 - KNEE) + KNEE / white, (1 - KNEE) * white + KNEE
    # value = (1-t)² + 2 t (1-t) middle + t² peak, solved for t
    a, b, c = 1 - 2 * middle + peak, 2 * (middle - 1), 1 - np.clip(value, 1, peak)
    t = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a) if abs(a) > 1e-9 else -c / b
    return np.where(
        value <= 1, value * white, (1 - t) ** 2 * white + 2 * t * (1 - t) * height + t**2
    )


def _pq_to_nits(stored: Floats) -> Floats:
    """Applies the PQ EOTF (ITU-R BT.2100, table 4)."""
    root = stored ** (1 / 78.84375)
    return np.asarray(
        10_000
        * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    )


def _hlg_to_scene(stored: Floats) -> Floats:
    """Applies the inverse of the HLG OETF (ITU-R BT.2100, table 5)."""
    return np.where(
        stored <= 0.5, stored**2 / 3, (np.exp((stored - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )

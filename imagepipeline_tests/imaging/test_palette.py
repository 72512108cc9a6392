"""Measurements agree with published values and known colours."""

import numpy as np
import pytest
from PIL import Image

from imagepipeline.imaging.decoding import Decoded
from imagepipeline.imaging.palette import measure, to_lab


def facts_of(image):
    return measure(Decoded((image,), "PNG", *image.size), image)


# CIE Lab (D65) of the corners of sRGB, as published by Lindbloom.
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_agrees_with_published_values(rgb, lab):
    assert to_lab(np.array([rgb], dtype=np.uint8))[0] == pytest.approx(lab, abs=0.1)


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ("#fefefe", "white"),
        ("#000000", "black"),
        ("#e02020", "red"),
        ("#2040c0", "blue"),
        ("#a05030", "sienna"),
    ],
)
def test_a_plain_image_has_one_colour_with_its_name(color, name):
    assert facts_of(Image.new("RGB", (300, 200), color)).colors == ((name, color, 1.0),)


def test_colours_are_sorted_by_share():
    image = Image.new("RGB", (100, 100), "#2040c0")
    image.paste("#e02020", (0, 0, 100, 30))
    (first, _, share), (second, _, _) = facts_of(image).colors
    assert (first, second) == ("blue", "red")
    assert share == pytest.approx(0.7, abs=0.02)


def test_brightness_and_warmth_have_the_right_sign():
    assert (
        facts_of(Image.new("RGB", (9, 9), "#ffcc66")).warmth
        > 20
        > -20
        > facts_of(Image.new("RGB", (9, 9), "#6699ff")).warmth
    )
    assert (
        facts_of(Image.new("RGB", (9, 9), "#eeeeee")).brightness
        > 90
        > 15
        > facts_of(Image.new("RGB", (9, 9), "#111111")).brightness
    )


def test_transparent_pixels_count_as_white():
    assert facts_of(Image.new("RGBA", (9, 9), (0, 0, 0, 0))).colors[0][0] == "white"

"""Both ways of resizing give the same picture."""

import numpy as np
import pytest
from PIL import Image

from imagepipeline.imaging import scaling
from imagepipeline_tests.imaging.odd_files import PHOTO


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
def test_without_simd_pillow_gives_the_same_picture(monkeypatch, mode):
    image = Image.open(PHOTO).convert(mode)
    fast = scaling.resize(image, (100, 60))
    monkeypatch.setattr(scaling, "SIMD_MODES", ())
    slow = scaling.resize(image, (100, 60))
    assert (fast.mode, fast.size) == (slow.mode, slow.size) == (mode, (100, 60))
    assert np.abs(np.asarray(fast, int) - np.asarray(slow, int)).max() <= 4

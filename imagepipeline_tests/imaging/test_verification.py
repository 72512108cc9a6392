"""What an honest sandbox says is believed, however large the original; see test_confinement.py."""

from contextlib import closing

import pytest
from PIL import Image

from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.limits import MAX_JPEG_REDUCTION
from imagepipeline.imaging.preparation import prepare
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.imaging.verification import ImpossibleAnswerError, verify_prepared
from imagepipeline.models import build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline_tests.imaging.odd_files import decode, encode

RULES = Rules(variants=build_variant_specs())


def process(files, content):
    """The size of an original and of its variants, as the assets make them."""
    files.put_original("large", content, "bin")
    renderer = Renderer(RULES.variants)
    with closing(Originals(files, Sandbox(), RULES)) as originals:
        original = originals.look("large", None, None)
        with closing(original):
            facts = original.facts
            made, _ = renderer.render(original.session, facts, renderer.specs)
    return (facts.width, facts.height), {(one.width, one.height) for one in made}


@pytest.mark.stack
@pytest.mark.parametrize(
    ("format_", "size", "height"),
    [
        ("JPEG", (8160, 6144), 482),
        ("JPEG", (12_000, 9000), 480),
        ("JPEG", (20_000, 2000), 64),
        ("PNG", (20_000, 2000), 64),
    ],
)
def test_an_original_may_be_larger_than_what_is_decoded_and_than_a_variant(
    files, format_, size, height
):
    found, made = process(files, encode(Image.new("L", size, 120), format_))
    assert found == size
    assert (640, height) in made


@pytest.mark.parametrize(("format_", "most"), [("PNG", 1), ("JPEG", MAX_JPEG_REDUCTION)])
def test_only_a_jpeg_may_have_more_pixels_than_may_be_decoded(format_, most):
    content = encode(Image.new("L", (100, 80 * most)), format_)
    prepared = prepare(decode(content, Rules(max_width_px=20)))
    verify_prepared(prepared, Rules(max_pixels=8000), None)
    with pytest.raises(ImpossibleAnswerError, match="its size"):
        verify_prepared(prepared, Rules(max_pixels=7999), None)

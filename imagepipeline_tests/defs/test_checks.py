"""The asset checks find problems with an image's variants."""

from contextlib import closing

import pytest
from PIL import Image

from imagepipeline.defs.checks import CHECKS, find_problems
from imagepipeline.defs.originals import Originals
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Claim, Variant, build_variant_specs
from imagepipeline_tests.imaging.odd_files import encode


@pytest.fixture
def check(catalogue, files):
    """A function that runs the checks of an image; returns {name: problem, or ""}."""

    def check(image_id, specs=build_variant_specs()):  # noqa: B008
        with closing(Originals(files, Sandbox(), Rules())) as originals:
            problems, _ = find_problems(
                Claim(image_id, 1, 1, None), catalogue, files, originals, Renderer(specs)
            )
        return {name: "; ".join(found) for name, found in problems.items()}

    return check


def test_checks_are_recorded_for_the_partition_by_the_run(run, cat):
    evaluations = run(cat).get_asset_check_evaluations()
    assert {evaluation.check_name for evaluation in evaluations} == set(CHECKS)
    for evaluation in evaluations:
        assert evaluation.partition == cat
        assert evaluation.passed, evaluation.description
        assert evaluation.metadata["variant_count"].value == 6


def test_missing_and_damaged_variants_are_named(run, cat, check, files):
    run(cat)
    (files.root / "variants" / "cat-sm.webp").unlink()
    files.write("variants/cat-md.avif", files.read("variants/cat-md.avif")[:300])
    files.write("variants/cat-lg.webp", encode(Image.new("RGB", (9, 9)), "WEBP"))
    description = check(cat)["complete"]
    for path in ("cat-sm.webp", "cat-md.avif", "cat-lg.webp"):
        assert path in description


def test_metadata_added_to_a_variant_is_found(run, cat, check, files):
    run(cat)
    image = Image.open(files.root / "variants" / "cat-lg.webp")
    files.write("variants/cat-lg.webp", encode(image, "WEBP", xmp=b"<gps/>"))
    assert check(cat)["clean"] == "variants/cat-lg.webp: xmp"


def test_a_variant_of_another_picture_is_found(run, cat, check, files):
    run(cat)
    image = Image.open(files.root / "variants" / "cat-lg.webp")
    files.write("variants/cat-lg.webp", encode(Image.new("RGB", image.size, "red"), "WEBP"))
    assert check(cat)["similar"].startswith("variants/cat-lg.webp has a similarity of 0.")


def test_a_variant_larger_than_its_original_is_reported(run, check, files):
    noise = Image.effect_noise((300, 300), 60)
    files.put_original("noise", encode(noise, "JPEG", quality=5), "jpg")
    run("noise")
    assert "variants/noise-sm.avif has" in check("noise")["small"]


@pytest.mark.parametrize(("avif_quality", "is_asked_for"), [(80, True), (65, False)])
def test_an_avif_larger_than_its_webp_is_reported_unless_its_quality_is_as_high(
    run, check, files, catalogue, avif_quality, is_asked_for
):
    noise = Image.effect_noise((300, 300), 60)
    files.put_original("noise", encode(noise, "BMP"), "bmp")
    run("noise")
    swapped = files.read("variants/noise-sm.webp")
    claim = catalogue.claim_anew("noise", "run")
    specs = build_variant_specs(80, avif_quality)
    larger = [Variant(s, 300, 300, swapped + bytes(9 if s.format == "avif" else 0)) for s in specs]
    catalogue.save_variants(claim, [(v.spec.path_for("original/noise.bmp"), v) for v in larger])
    assert (check("noise", specs)["small"] == "") is is_asked_for


def test_the_checks_of_an_image_without_variants_fail(check, catalogue):
    found = check("ghost")
    assert all(found.values())
    assert "original/ghost.*" in found["complete"]

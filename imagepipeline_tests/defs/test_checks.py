"""The asset checks find problems with an image's variants."""

from contextlib import closing

import dagster as dg
import pytest
from PIL import Image

from imagepipeline.defs.checks import (
    CHECKS,
    REPORT_EVERY,
    Reported,
    check_sensor,
    check_variants,
    variant_checks,
)
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import Claim, Variant, build_variant_specs
from imagepipeline.originals import Originals
from imagepipeline_tests.imaging.odd_files import encode

pytestmark = pytest.mark.stack


@pytest.fixture
def check(catalogue, files):
    """A function that runs the checks of an image; returns {name: problem, or ""}."""

    def check(image_id, specs=build_variant_specs()):  # noqa: B008
        with closing(Originals(files, Sandbox(), Rules())) as originals:
            claim = Claim(image_id, 1, 1, None)
            original = originals.load(claim, catalogue)
            problems, _ = check_variants(claim, catalogue, files, original, Renderer(specs))
        return {name: "; ".join(found) for name, found in problems.items()}

    return check


def get_facts(result):
    """The values in the materialization of the run's variants."""
    [made] = [
        event.materialization
        for event in result.get_asset_materialization_events()
        if event.asset_key.path == ["variants"]
    ]
    return {name: entry.value for name, entry in made.metadata.items()}


def test_what_the_checks_found_is_in_the_materialization(run, cat):
    result = run(cat)
    assert not result.get_asset_check_evaluations()
    assert get_facts(result)["problems"] == "none"
    assert get_facts(result)["variant_count"] == 6


@pytest.mark.parametrize(
    ("width_px", "share", "count"), [(2000, 0.0, 2), (2000, 1.0, 6), (600, 0.0, 6)]
)
def test_the_materialization_says_how_many_variants_were_compared(
    run, files, width_px, share, count
):
    files.put_original("sky", encode(Image.new("RGB", (width_px, 200), "#89abef"), "JPEG"), "jpg")
    renderer = Renderer(build_variant_specs(), compared_share=share)
    facts = get_facts(run("sky", renderer=renderer))
    assert facts["compared_count"] == count
    assert facts["min_similarity"] > 0.9


def test_variants_that_were_stored_wrong_are_made_again(run, cat, catalogue, files, monkeypatch):
    written = []

    def write(path, content):
        written.append(path)
        is_torn = path.endswith("-sm.avif") and written.count(path) == 1
        type(files).write(files, path, content[:300] if is_torn else content)

    monkeypatch.setattr(files, "write", write, raising=False)
    assert run(cat).success
    row = catalogue.get(cat)
    assert (row["status"], row["attempts"]) == ("completed", 2)
    assert written.count("variants/cat-sm.avif") == 2
    assert "cat-sm.avif cannot be decoded" in next(
        event["detail"] for event in row["history"] if event["event"] == "check_failed"
    )


def test_variants_that_are_always_stored_wrong_fail_the_image(
    run, cat, catalogue, files, monkeypatch
):
    monkeypatch.setattr(
        files,
        "write",
        lambda path, content: type(files).write(files, path, content[:300]),
        raising=False,
    )
    run(cat)
    row = catalogue.get(cat)
    assert (row["status"], row["reason"]) == ("failed", "wrong_variants")
    assert "the stored variants are not complete" in row["error"]


def evaluate_checks(instance, catalogue):
    """What the UI's button evaluates, by check."""
    result = dg.materialize(
        [variant_checks],
        selection=dg.AssetSelection.checks(variant_checks),
        instance=instance,
        resources={"catalogue": catalogue},
    )
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def test_the_checks_of_the_asset_tell_of_the_images_of_the_last_day(
    run, cat, files, instance, catalogue
):
    run(cat)
    noise = Image.effect_noise((300, 300), 60)
    files.put_original("noise", encode(noise, "JPEG", quality=5), "jpg")
    run("noise")
    evaluations = evaluate_checks(instance, catalogue)
    assert set(evaluations) == set(CHECKS)
    assert [name for name, one in evaluations.items() if not one.passed] == ["small"]
    assert "noise: variants/noise-sm.avif has" in evaluations["small"].description
    assert evaluations["small"].severity == dg.AssetCheckSeverity.WARN
    assert evaluations["clean"].metadata["completed_count"].value == 2
    assert all(one.partition is None for one in evaluations.values())


def test_the_sensor_reports_new_problems_at_once_and_the_rest_hourly(
    run, cat, files, instance, catalogue
):
    def tick(cursor):
        context = dg.build_sensor_context(
            instance=instance, cursor=cursor, resources={"catalogue": catalogue}
        )
        return check_sensor(context)

    assert isinstance(tick(None), dg.SkipReason)
    run(cat)
    first = tick(None)
    assert [event.passed for event in first.asset_events] == [True] * 4
    assert isinstance(tick(first.cursor), dg.SkipReason)
    noise = Image.effect_noise((300, 300), 60)
    files.put_original("noise", encode(noise, "JPEG", quality=5), "jpg")
    run("noise")
    second = tick(first.cursor)
    assert [event.check_name for event in second.asset_events if not event.passed] == ["small"]
    assert isinstance(tick(second.cursor), dg.SkipReason)
    reported = Reported.model_validate_json(second.cursor)
    an_hour_ago = reported.model_copy(update={"at": reported.at - REPORT_EVERY})
    assert len(tick(an_hour_ago.model_dump_json()).asset_events) == 4


def test_missing_and_damaged_variants_are_named(run, cat, check, files):
    run(cat)
    (files.root / "variants" / "cat-sm.webp").unlink()
    files.write("variants/cat-sm.avif", files.read("variants/cat-sm.avif")[:300])
    description = check(cat)["complete"]
    for path in ("cat-sm.webp", "cat-sm.avif"):
        assert f"{path} cannot be decoded" in description
    files.write("variants/cat-sm.webp", encode(Image.new("RGB", (9, 9)), "WEBP"))
    assert "cat-sm.webp is ('webp', 9, 9) where" in check(cat)["complete"]


def test_metadata_added_to_a_variant_is_found(run, cat, check, files):
    run(cat)
    image = Image.open(files.root / "variants" / "cat-sm.webp")
    files.write("variants/cat-sm.webp", encode(image, "WEBP", xmp=b"<gps/>"))
    assert check(cat)["clean"] == "variants/cat-sm.webp: xmp"


def test_a_variant_of_another_picture_is_found(run, cat, check, files):
    run(cat)
    image = Image.open(files.root / "variants" / "cat-sm.webp")
    files.write("variants/cat-sm.webp", encode(Image.new("RGB", image.size, "red"), "WEBP"))
    assert check(cat)["similar"].startswith("variants/cat-sm.webp has a similarity of 0.")


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

"""What became of an image is on its page of `original`, and only what is broken is red."""

import dagster as dg
import pytest

from imagepipeline.defs.outcomes import ORIGINAL, REASON_TAG, STATUS_TAG
from imagepipeline.errors import BadAnswerError, PausedError, RateLimitError
from imagepipeline.models import Upload
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.usage import CallUsage
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.defs.test_assets import ANSWER, ScriptedVision

pytestmark = pytest.mark.stack

PROSE = BadAnswerError("prose", CallUsage(10, cost_usd=0.01))


@pytest.fixture
def process(run, catalogue, instance):
    """Pushes an image and runs it; gives the run, the image's row, and what its page shows."""

    def process(image_id, **resources):
        catalogue.accept([Upload(image_id)])
        row = catalogue.get(image_id)
        result = run(image_id, generation=row["generation"], **resources)
        event = instance.get_latest_materialization_event(ORIGINAL).asset_materialization
        assert event.partition == image_id
        run_record = instance.get_run_by_id(result.run_id)
        shown = {name: entry.value for name, entry in event.metadata.items()}
        return run_record, catalogue.get(image_id), shown

    return process


def read_tags(run_record):
    return run_record.tags.get(STATUS_TAG), run_record.tags.get(REASON_TAG)


def test_a_completed_image_has_all_that_is_known_of_it_on_one_page(process, cat):
    run_record, row, shown = process(cat, vision=ScriptedVision(ANSWER))
    assert run_record.status == dg.DagsterRunStatus.SUCCESS
    assert read_tags(run_record) == (None, None)
    assert (shown["status"], shown["description"], shown["attempts"]) == ("completed", "A cat", 1)
    assert shown["cost_usd"] == pytest.approx(0.0014)  # 800 tokens in, 60 out
    assert (shown["width_px"], shown["bytes_in"]) == (451, 38702)
    assert shown["see_variants"] == "/assets/variants?view=partitions&partition=cat"
    table = {record.data["path"]: record.data for record in shown["variants"].records}
    assert set(table) == {variant["path"] for variant in row["variants"]}
    smallest = table["variants/cat-sm.webp"]
    assert smallest["saved_percent"] == round(100 - 100 * smallest["bytes"] / 38702)
    assert len(shown["picture"]) < 1000  # longer Markdown hides behind a link
    assert shown["run"] == run_record.run_id
    assert "error" not in shown


def test_the_run_of_a_rejected_upload_succeeds_and_the_page_says_what_the_row_says(
    process, files, instance
):
    files.put_original("pdf", b"%PDF-1.7\n", "jpg")
    run_record, row, shown = process("pdf", vision=ScriptedVision())
    assert run_record.status == dg.DagsterRunStatus.SUCCESS
    assert read_tags(run_record) == ("failed", "unsupported")
    assert (row["status"], row["reason"]) == ("failed", "unsupported")
    assert row["error"].startswith("the original is a PDF document")
    assert (shown["status"], shown["reason"]) == (row["status"], row["reason"])
    assert shown["error"] == row["error"]
    assert shown["next"] == "push a better file: no retry can help"
    for asset in ("metadata", "variants", "embedding"):
        assert instance.get_materialized_partitions(dg.AssetKey(asset)) == set()
    files.root.joinpath("original/pdf.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
    run_record, row, shown = process("pdf", vision=ScriptedVision(ANSWER))
    assert (row["status"], shown["status"], "error" in shown) == ("completed", "completed", False)


def test_what_an_operator_must_mend_is_red_and_on_the_page(process, cat):
    vision = ScriptedVision(PROSE, PROSE, PROSE)
    run_record, row, shown = process(cat, vision=vision)
    assert run_record.status == dg.DagsterRunStatus.FAILURE
    assert read_tags(run_record) == ("failed", "bad_output")
    assert shown["error"] == row["error"] == "prose (after 3 attempts)"
    assert shown["next"].startswith(
        f"once the cause is removed, run `imagepipeline failed retry {cat}`"
    )


@pytest.mark.parametrize("reason", ["bad_output", "cancelled", "corrupt"])
def test_a_run_that_a_person_starts_retries_a_failed_image(run, cat, catalogue, instance, reason):
    if reason == "corrupt":  # the file is replaced
        catalogue.fail(catalogue.claim_anew(cat, "earlier"), reason, "the JPEG data is damaged")
    elif reason == "cancelled":
        catalogue.accept([Upload(cat)])
        catalogue.cancel(cat, "a person cancelled it")
    else:
        run(
            cat,
            vision=ScriptedVision(PROSE, PROSE, PROSE),
        )
    assert catalogue.get(cat)["reason"] == reason
    generation = catalogue.get(cat)["generation"]
    result = run(cat, vision=ScriptedVision(ANSWER))
    row = catalogue.get(cat)
    assert (row["status"], row["reason"], row["generation"]) == ("completed", None, generation + 1)
    event = instance.get_latest_materialization_event(ORIGINAL).asset_materialization
    assert event.metadata["status"].value == "completed"
    assert result.success


def test_a_re_execution_does_not_keep_the_verdict_of_the_run_it_repeats(run, cat, instance):
    inherited = {STATUS_TAG: "failed", REASON_TAG: "corrupt"}
    result = run(cat, tags=inherited, vision=ScriptedVision(ANSWER))
    assert read_tags(instance.get_run_by_id(result.run_id)) == ("completed", "none")
    vision = ScriptedVision(PROSE, PROSE, PROSE)
    result = run(cat, tags=inherited, vision=vision, anew="metadata")
    assert read_tags(instance.get_run_by_id(result.run_id)) == ("failed", "bad_output")


@pytest.mark.parametrize(
    ("pause", "reason"),
    [(PausedError("budget", "spent", 60), "budget"), (RateLimitError("used up"), "rate_limit")],
)
def test_a_pause_of_paid_work_is_no_broken_pipeline(process, cat, pause, reason):
    run_record, row, shown = process(cat, vision=ScriptedVision(pause))
    assert run_record.status == dg.DagsterRunStatus.SUCCESS
    assert read_tags(run_record) == ("pending", reason)
    assert (row["status"], shown["status"]) == ("pending", "pending")
    assert shown["waits_because"] == str(pause)


def test_a_run_without_a_decoded_original_shows_the_placeholder(process, cat, catalogue):
    process(cat, vision=ScriptedVision(ANSWER))
    _, row, shown = process(cat, vision=ScriptedVision(), embedder=LocalEmbedder())
    assert shown["picture"] == f"![picture]({row['placeholder']})"

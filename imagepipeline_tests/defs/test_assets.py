"""A run updates the catalogue, the files and the index, and its failures have the right effect."""

import errno
import hashlib
import io
import os
from dataclasses import replace
from unittest.mock import Mock

import dagster as dg
import pytest
from PIL import Image

from imagepipeline.defs.assets import embedding, metadata, variants
from imagepipeline.errors import (
    BadAnswerError,
    CatalogueDownError,
    DiskFullError,
    PausedError,
    ProviderUnavailableError,
    RefusedError,
    StaleClaimError,
)
from imagepipeline.imaging.decoding import Rules
from imagepipeline.imaging.sandbox import Sandbox
from imagepipeline.models import (
    ASSETS,
    Claim,
    ImageMetadata,
    Recipe,
    Upload,
    VisionAnswer,
)
from imagepipeline.originals import Originals
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.services.vision import LocalVision
from imagepipeline.stores import database
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.files import FileStore
from imagepipeline.usage import CallUsage
from imagepipeline_tests.conftest import PHOTOS
from imagepipeline_tests.imaging.odd_files import SAMPLES

pytestmark = pytest.mark.stack

ANSWER = VisionAnswer(
    ImageMetadata(
        description="A cat", tags=["cat"], category="animal", dominant_colors=[], mood="calm"
    ),
    CallUsage(800, 60),
)


class ScriptedVision:
    """Returns or raises the given outcomes in order."""

    recipe = Recipe("openai", "scripted", "prompt-1")

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def describe(self, preview, facts):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def retry_waits(result):
    events = result.events_for_node("metadata")
    return [
        event.step_retry_data.seconds_to_wait
        for event in events
        if event.event_type_value == "STEP_UP_FOR_RETRY"
    ]


def test_an_upload_becomes_metadata_variants_and_an_embedding(
    run, cat, catalogue, files, index, instance
):
    catalogue.accept([Upload(cat)])
    result = run(cat, generation=1)
    assert result.success
    row = catalogue.get(cat)
    assert (row["status"], row["generation"], row["attempts"]) == ("completed", 1, 1)
    assert row["run_id"] == result.run_id
    assert row["metadata"]["category"] == "cat"
    assert row["path"] == "original/cat.jpg"
    assert {asset: made["provider"] for asset, made in row["made_by"].items()} == dict.fromkeys(
        ASSETS, "local"
    )
    assert [variant["id"] for variant in row["variants"]] == sorted(
        f"cat-{suffix}-{format_}" for suffix in ("sm", "md", "lg") for format_ in ("webp", "avif")
    )
    for variant in row["variants"]:
        content = files.read(variant["path"])
        image = Image.open(io.BytesIO(content))
        assert len(content) == variant["size"]
        assert (image.format.lower(), *image.size) == (
            variant["format"],
            variant["width"],
            variant["height"],
        )
    assert index.get(cat, "local:all-MiniLM-L6-v2-int8")["text"].startswith("Looks like cat")
    for asset in ASSETS:
        assert instance.get_materialized_partitions(dg.AssetKey(asset)) == {cat}


def test_results_are_shown_in_the_ui(run, cat, instance):
    run(cat, vision=ScriptedVision(ANSWER))
    event = instance.get_latest_materialization_event(dg.AssetKey("metadata"))
    shown = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    assert shown["description"] == "A cat"
    assert (shown["model"], shown["settings"], shown["tokens_in"], shown["tokens_out"]) == (
        "scripted",
        "prompt-1",
        800,
        60,
    )
    assert (shown["width_px"], shown["bytes_in"], shown["attempt"]) == (451, 38702, 1)
    assert shown["picture"].startswith("![picture](data:image/webp;base64,")
    assert len(shown["picture"]) < 1000  # longer ones hide behind a link


def test_an_unchanged_text_leaves_the_embedding_fresh(run, cat, instance):
    versions = []
    for _ in range(2):
        run(cat, vision=ScriptedVision(ANSWER))
        event = instance.get_latest_materialization_event(dg.AssetKey("metadata"))
        versions.append(event.asset_materialization.tags["dagster/data_version"])
    assert versions[0] == versions[1]


def test_a_retryable_error_is_retried_after_one_and_two_seconds(run, cat, catalogue):
    vision = ScriptedVision(ProviderUnavailableError("busy"), BadAnswerError("prose"), ANSWER)
    result = run(cat, vision=vision)
    assert result.success
    assert retry_waits(result) == [1, 2]
    assert catalogue.get(cat)["attempts"] == 3


def test_a_provider_may_ask_for_a_longer_wait(run, cat):
    result = run(cat, vision=ScriptedVision(ProviderUnavailableError("slow down", 1.5), ANSWER))
    assert result.success
    assert retry_waits(result) == [1.5]


@pytest.mark.parametrize(
    "error", [ProviderUnavailableError("busy"), ValueError("nobody thought of this")]
)
def test_after_three_attempts_the_image_has_failed(run, cat, catalogue, files, error):
    result = run(cat, vision=ScriptedVision(error, error, error))
    assert not result.success
    row = catalogue.get(cat)
    assert (row["status"], row["attempts"]) == ("failed", 3)
    assert row["reason"] == getattr(error, "reason", "unexpected")
    assert str(error) in row["error"]
    assert row["variants"] == []
    assert len(retry_waits(result)) == 2


def test_a_refusal_is_final(run, cat, catalogue):
    result = run(cat, vision=ScriptedVision(RefusedError("no")))
    row = catalogue.get(cat)
    assert (row["status"], row["reason"], row["attempts"]) == ("failed", "refused", 1)
    assert retry_waits(result) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"<html>", "unsupported"), (b"\xff" * 25_000_001, "too_large")],
)
def test_a_file_that_is_not_an_image_fails_without_a_call(run, catalogue, files, content, reason):
    files.put_original("bad", content, "jpg")
    run("bad", vision=ScriptedVision())
    row = catalogue.get("bad")
    assert (row["status"], row["reason"], row["attempts"]) == ("failed", reason, 1)


def test_an_image_without_an_original_fails(run, catalogue):
    catalogue.accept([Upload("ghost")])
    run("ghost", generation=1)
    row = catalogue.get("ghost")
    assert (row["status"], row["reason"]) == ("failed", "missing")
    assert "original/ghost.*" in row["error"]


def test_a_run_of_a_claimed_generation_does_nothing_and_succeeds(run, cat, catalogue, instance):
    catalogue.accept([Upload(cat)])
    catalogue.claim(cat, 1, "another run")
    before = catalogue.get(cat)
    result = run(cat, generation=1)
    assert result.success
    assert catalogue.get(cat) == before
    assert instance.get_materialized_partitions(dg.AssetKey("metadata")) == set()


def test_a_run_writes_nothing_after_another_run_has_taken_its_image(
    run, cat, catalogue, files, index
):
    class Thief(LocalVision):
        def describe(self, preview, facts):
            row = catalogue.get(cat)
            catalogue.hand_back(catalogue.claim(cat, 1, row["run_id"]), "x")
            catalogue.claim(cat, 2, "successor")
            return ANSWER

    catalogue.accept([Upload(cat)])
    result = run(cat, generation=1, vision=Thief())
    assert result.success
    row = catalogue.get(cat)
    assert (row["status"], row["run_id"], row["metadata"], row["variants"]) == (
        "processing",
        "successor",
        None,
        [],
    )
    assert not (files.root / "variants").exists()


class FreezingFiles(FileStore):
    """Freezes in its first change of a variant until something else has happened, then goes on."""

    def __init__(self, root, meanwhile, path):
        super().__init__(root)
        self.meanwhile, self.path = meanwhile, path

    def write(self, path, content):
        self.freeze(path)
        super().write(path, content)

    def delete(self, path):
        self.freeze(path)
        super().delete(path)

    def freeze(self, path):
        if path == self.path and (meanwhile := self.meanwhile):
            self.meanwhile = None
            meanwhile()


def lose(catalogue, image_id):
    """Takes an image from its run, as the reconciler does."""
    row = catalogue.get(image_id)
    claim = catalogue.claim(image_id, row["generation"], row["run_id"])
    catalogue.hand_back(claim, "its run did not answer")
    return claim.generation + 1


@pytest.mark.parametrize("then", ["completed", "processing", "cancelled", "erased"])
def test_a_run_that_was_frozen_in_a_write_leaves_no_wrong_variant(
    run, cat, catalogue, files, sqlite_catalogue_url, then
):
    """It overwrites a variant of an original that was uploaded while it was frozen."""
    path, seen = "variants/cat-sm.webp", {}

    def replace_original():
        files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
        generation = lose(catalogue, cat)
        if then in ("completed", "processing"):
            assert run(cat, generation).success
            seen["right"] = files.read(path)
        if then == "processing":  # by a run that finds everything current
            seen["claim"] = catalogue.claim_anew(cat, "successor")
        elif then == "cancelled":
            catalogue.cancel(cat, "a person did")
        elif then == "erased":
            catalogue.cancel(cat, "it is erased")
            Erasures(sqlite_catalogue_url).remove(cat, catalogue.get(cat)["fence"], [])

    catalogue.accept([Upload(cat)])
    run(cat, 1, files=FreezingFiles(files.root, replace_original, path))
    row = catalogue.get(cat)
    if then == "erased":
        assert row is None
        assert not (files.root / path).exists()
        return
    assert row["status"] == ("failed" if then == "cancelled" else "pending")
    if then == "processing":
        with pytest.raises(StaleClaimError):
            catalogue.finish(seen["claim"])
    assert run(cat).success
    row = catalogue.get(cat)
    assert row["status"] == "completed"
    assert seen.get("right", files.read(path)) == files.read(path)
    assert {one["path"]: len(files.read(one["path"])) for one in row["variants"]} == {
        one["path"]: one["size"] for one in row["variants"]
    }


@pytest.mark.parametrize("error", [DiskFullError("no room"), CatalogueDownError("it restarts")])
def test_variants_are_made_again_also_if_the_late_run_meets_an_error(
    run, cat, catalogue, files, monkeypatch, error
):
    path, seen = "variants/cat-sm.webp", {}
    monkeypatch.setattr(database, "OUTLAST_INTERVAL_SECONDS", 0)

    def replace_original():
        files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
        assert run(cat, lose(catalogue, cat)).success
        seen["right"] = files.read(path)
        if isinstance(error, CatalogueDownError):
            monkeypatch.setattr(Catalogue, "holds", Mock(side_effect=[error, False, True, True]))

    class Failing(FreezingFiles):
        def write(self, path, content):
            if "right" in seen and isinstance(error, DiskFullError):
                raise error
            super().write(path, content)

    catalogue.accept([Upload(cat)])
    run(cat, 1, files=Failing(files.root, replace_original, path))
    assert catalogue.get(cat)["status"] == "pending"
    assert run(cat).success
    assert catalogue.get(cat)["status"] == "completed"
    assert files.read(path) == seen["right"]


def test_a_late_write_to_a_path_that_belongs_to_another_image_by_then_is_repaired(
    run, catalogue, files, sqlite_catalogue_url
):
    path, seen = "variants/photos/p-sm.webp", {}
    files.write("original/photos/p.jpg", (PHOTOS / "cat.jpg").read_bytes())

    def give_path_to_another():
        lose(catalogue, "erased")
        catalogue.cancel("erased", "it is erased")
        fence = catalogue.get("erased")["fence"]
        Erasures(sqlite_catalogue_url).remove("erased", fence, [])
        files.delete("original/photos/p.jpg")
        files.write("original/photos/p.jpeg", (PHOTOS / "coffee.jpg").read_bytes())
        catalogue.accept([Upload("other", "original/photos/p.jpeg")])
        assert run("other", 1).success
        seen["right"] = files.read(path)

    catalogue.accept([Upload("erased", "original/photos/p.jpg")])
    run("erased", 1, files=FreezingFiles(files.root, give_path_to_another, path))
    assert catalogue.get("other")["status"] == "pending"
    assert run("other").success
    assert files.read(path) == seen["right"]


def test_a_manual_run_processes_a_completed_image_again(run, cat, catalogue, index):
    run(cat)
    run(cat, vision=ScriptedVision(ANSWER))
    row = catalogue.get(cat)
    assert (row["status"], row["generation"]) == ("completed", 2)
    assert row["metadata"]["description"] == "A cat"
    assert row["made_by"]["metadata"]["model"] == "scripted"
    assert index.get(cat, "local:all-MiniLM-L6-v2-int8")["text"].startswith("A cat")


def test_a_manual_run_may_make_one_asset_only(run, cat, catalogue):
    run(cat)
    assert run(cat, assets=[variants], anew="all").success
    row = catalogue.get(cat)
    assert (row["status"], row["generation"]) == ("completed", 2)
    assert {asset: made["generation"] for asset, made in row["made_by"].items()} == {
        "metadata": 1,
        "variants": 2,
        "embedding": 1,
    }


def test_an_image_whose_text_has_changed_is_not_completed_until_it_is_embedded(run, cat, catalogue):
    run(cat)
    assert run(cat, assets=[metadata], vision=ScriptedVision(ANSWER)).success
    row = catalogue.get(cat)
    assert row["status"] == "pending"
    assert row["history"][-1]["detail"] == "results are missing or stale: embedding"


def test_a_new_image_with_one_asset_made_goes_back_to_the_queue(run, cat, catalogue):
    assert run(cat, assets=[variants]).success
    assert [image.image_id for image in catalogue.list_pending(9)] == [cat]


def test_the_error_for_an_embedding_without_metadata_says_what_to_do(run, cat, catalogue):
    assert not run(cat, assets=[embedding]).success
    row = catalogue.get(cat)
    assert row["reason"] == "missing_metadata"
    assert "materialize `metadata`" in row["error"]


def test_the_error_of_a_manual_run_names_the_run_that_has_the_image(run, cat, catalogue):
    catalogue.claim_anew(cat, "the-other-run")
    result = run(cat)
    assert not result.success
    assert (
        "the-other-run"
        in result.events_for_node("metadata")[-1].step_failure_data.user_failure_data.description
    )
    assert catalogue.get(cat)["status"] == "processing"


def test_originals_with_the_same_stem_do_not_overwrite_each_others_variants(
    run, catalogue, files, cat
):
    run(cat)
    before = files.read("variants/cat-sm.webp")
    files.write("original/cat.png", files.read("original/cat.jpg"))
    catalogue.accept([Upload("other", "original/cat.png")])
    run("other", generation=1)
    assert catalogue.get("other")["reason"] == "path_taken"
    assert files.read("variants/cat-sm.webp") == before


def test_on_a_full_disk_the_image_waits_and_uses_no_attempt(
    run, cat, catalogue, files, monkeypatch
):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    catalogue.accept([Upload(cat)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not run(cat, generation=1).success
    row = catalogue.get(cat)
    assert (row["status"], row["generation"], row["reason"]) == ("pending", 2, None)
    assert (row["not_before"] - row["updated_at"]).total_seconds() == 60
    assert "no room" in row["history"][-1]["detail"]
    assert catalogue.list_pending(9) == []  # pending, but not yet due
    assert run(cat).success  # a manual run does not wait
    assert catalogue.get(cat)["status"] == "completed"


def test_attempts_and_waits_are_recorded_in_the_history(run, cat, catalogue):
    run(cat, vision=ScriptedVision(ProviderUnavailableError("busy"), ANSWER))
    row = catalogue.get(cat)
    assert [event["event"] for event in row["history"]] == [
        "claimed",
        "attempt_failed",
        "made",
        "made",
        "made",
        "completed",
    ]
    assert row["history"][1]["detail"] == "metadata, attempt 1, next in 1 s: busy"
    assert row["error"] is None


def test_the_row_has_size_placeholder_and_dominant_colour(run, cat, catalogue):
    run(cat)
    row = catalogue.get(cat)
    assert (row["width"], row["height"], row["original_bytes"], row["flaw"]) == (
        451,
        300,
        38702,
        None,
    )
    assert row["placeholder"].startswith("data:image/webp;base64,")
    assert row["dominant_color"].startswith("#")


def test_all_assets_of_a_run_use_the_same_original(run, cat, catalogue, files):
    class Replacer(LocalVision):
        def describe(self, preview, facts):
            files.put_original(cat, b"another file", "jpg")
            return ANSWER

    assert run(cat, vision=Replacer()).success
    row = catalogue.get(cat)
    assert row["original_sha256"] == hashlib.sha256((PHOTOS / "cat.jpg").read_bytes()).hexdigest()
    assert {
        made["input_sha256"] for asset, made in row["made_by"].items() if asset != "embedding"
    } == {row["original_sha256"]}


def test_an_image_whose_original_was_deleted_fails(run, cat, catalogue, files):
    catalogue.accept([Upload(cat, f"original/{cat}.jpg")])
    (files.root / "original" / "cat.jpg").unlink()
    result = run(cat, generation=1)
    row = catalogue.get(cat)
    assert (row["status"], row["reason"], row["attempts"]) == ("failed", "missing", 3)
    assert row["error"] == (
        "original/cat.jpg cannot be opened below the storage root: No such file or directory "
        "(after 3 attempts)"
    )
    assert retry_waits(result) == [1, 2]


def test_a_run_waits_for_an_original_that_arrives_after_its_id(run, catalogue, files):
    class LateStore(FileStore):
        looks = 0

        def list_originals_of(self, image_id):
            self.looks += 1
            if self.looks == 3:
                files.put_original("late", (PHOTOS / "cat.jpg").read_bytes(), "jpg")
            return super().list_originals_of(image_id)

    catalogue.accept([Upload("late")])
    assert run(
        "late", generation=1, originals=Originals(LateStore(files.root), Sandbox(), Rules())
    ).success
    assert (catalogue.get("late")["status"], catalogue.get("late")["attempts"]) == ("completed", 3)


def test_a_bare_id_means_the_one_original_stored_now(run, cat, catalogue, files):
    for generation, extension in enumerate(("jpg", "png"), start=1):
        catalogue.accept([Upload(cat)])
        files.delete("original/cat.jpg")
        files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), extension)
        run(cat, generation=generation)
        assert catalogue.get(cat)["path"] == f"original/cat.{extension}"
    assert catalogue.get(cat)["status"] == "completed"
    run(cat)  # a manual run, like a backfill
    assert (catalogue.get(cat)["status"], catalogue.get(cat)["path"]) == (
        "completed",
        "original/cat.png",
    )


def test_the_error_for_two_originals_of_one_id_names_both(run, cat, catalogue, files):
    catalogue.accept([Upload(cat)])
    run(cat, generation=1)
    files.write("original/cat.png", b"another")
    catalogue.accept([Upload(cat)])
    run(cat, generation=2)
    row = catalogue.get(cat)
    assert (row["status"], row["reason"]) == ("failed", "missing")
    assert row["error"] == "cat has 2 originals (cat.jpg, cat.png): keep one (after 3 attempts)"


def test_a_bare_id_without_an_original_means_the_earlier_path(run, catalogue, files):
    files.write("original/2026/x.jpg", (PHOTOS / "cat.jpg").read_bytes())
    catalogue.accept([Upload("a", "original/2026/x.jpg")])
    run("a", generation=1)
    catalogue.accept([Upload("a")])
    run("a", generation=2)
    assert (catalogue.get("a")["status"], catalogue.get("a")["path"]) == (
        "completed",
        "original/2026/x.jpg",
    )
    files.write("original/a.jpg", (PHOTOS / "coffee.jpg").read_bytes())
    catalogue.accept([Upload("a")])
    run("a", generation=3)
    assert catalogue.get("a")["path"] == "original/a.jpg"


def test_an_original_with_an_invalid_extension_is_refused(run, catalogue, files):
    files.write("original/a.j\x1b[2Jpg", b"x")
    catalogue.accept([Upload("a")])
    run("a", generation=1)
    assert catalogue.get("a")["reason"] == "unsafe_path"
    assert catalogue.get("a")["error"].isprintable()


def test_an_image_replaced_and_pushed_during_its_run_is_processed_again(
    run, cat, catalogue, files, ledger
):
    class Uploader(ScriptedVision):
        def describe(self, preview, facts):
            files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
            catalogue.accept([Upload(cat)])
            catalogue.accept([Upload(cat)])
            return super().describe(preview, facts)

    catalogue.accept([Upload(cat)])
    assert run(cat, generation=1, vision=Uploader(ANSWER)).success
    assert (catalogue.get(cat)["status"], catalogue.get(cat)["generation"]) == ("pending", 2)
    assert run(cat, generation=2, vision=ScriptedVision(ANSWER)).success
    row = catalogue.get(cat)
    assert (row["status"], row["generation"]) == ("completed", 2)
    assert (
        row["original_sha256"] == hashlib.sha256((PHOTOS / "coffee.jpg").read_bytes()).hexdigest()
    )


def test_processing_the_same_picture_again_makes_no_paid_call(run, cat, catalogue, ledger):
    class Remote(LocalEmbedder):
        recipe = Recipe("openrouter", "m")

        def embed(self, text):
            return replace(super().embed(text), version=self.recipe.version)

    class Uploader(ScriptedVision):
        def describe(self, preview, facts):
            catalogue.accept([Upload(cat)])
            return super().describe(preview, facts)

    vision = Uploader(ANSWER)
    catalogue.accept([Upload(cat)])
    for generation in (1, 2):
        assert run(cat, generation=generation, vision=vision, embedder=Remote()).success
    assert (catalogue.get(cat)["status"], catalogue.get(cat)["generation"]) == ("completed", 2)
    assert {row["stage"]: row["calls"] for row in ledger.summarize("stage")} == {
        "embedding": 1,
        "metadata": 1,
    }


def test_the_error_for_a_truncated_original_states_how_much_could_be_read(run, catalogue, files):
    whole = (PHOTOS / "cat.jpg").read_bytes()
    files.put_original("cut", whole[: len(whole) // 2], "jpg")
    run("cut", vision=ScriptedVision())
    row = catalogue.get("cut")
    assert (row["reason"], row["attempts"]) == ("truncated", 1)
    assert "% of the rows could be read" in row["error"]


def test_a_file_that_crashes_its_decoder_fails_but_the_run_survives(run, catalogue, files):
    files.put_original("killer", (SAMPLES / "crash-1.bin").read_bytes(), "heic")
    result = run("killer", vision=ScriptedVision())
    assert not result.success
    row = catalogue.get("killer")
    assert (row["status"], row["reason"], row["attempts"]) == ("failed", "crashed", 3)
    assert "SIGSEGV" in row["error"]


def test_a_child_that_dies_between_two_assets_is_replaced(run, cat, catalogue, files, monkeypatch):
    originals = Originals(files, Sandbox(), Rules())
    loads = []

    class Killer(LocalVision):
        def describe(self, preview, facts):
            loads.append(originals.load(Claim(cat, 1, 1, None), catalogue))
            loads[0].session.close()
            return ANSWER

    assert run(cat, vision=Killer(), originals=originals).success
    assert originals.load(Claim(cat, 1, 1, None), catalogue).session is not loads[0].session
    originals.close()


def test_another_picture_another_prompt_and_a_run_that_asks_for_it_are_paid_for(
    run, cat, catalogue, files, ledger
):
    vision = ScriptedVision(ANSWER, ANSWER, ANSWER, ANSWER)
    catalogue.accept([Upload(cat)])
    run(cat, generation=1, vision=vision)
    files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
    catalogue.accept([Upload(cat)])
    run(cat, generation=2, vision=vision)
    vision.recipe = Recipe("openai", "scripted", "prompt-2")
    catalogue.accept([Upload(cat)])
    run(cat, generation=3, vision=vision)
    run(cat, vision=vision)
    assert [row["calls"] for row in ledger.summarize("stage")] == [3]
    run(cat, vision=vision, anew="metadata")
    assert [row["calls"] for row in ledger.summarize("stage")] == [4]


def test_an_unchanged_text_is_not_embedded_again(run, cat, catalogue, ledger):
    class Remote(LocalEmbedder):
        recipe = Recipe("openrouter", "m")

        def embed(self, text):
            return replace(super().embed(text), version=self.recipe.version)

    for answer in (
        ANSWER,
        ANSWER,
        replace(ANSWER, metadata=ANSWER.metadata.model_copy(update={"mood": "wild"})),
    ):
        assert run(cat, vision=ScriptedVision(answer), embedder=Remote(), anew="metadata").success
    assert {row["stage"]: row["calls"] for row in ledger.summarize("stage")} == {
        "embedding": 2,
        "metadata": 3,
    }


def test_a_bad_key_fails_no_image_and_uses_no_attempt(run, cat, catalogue, ledger):
    catalogue.accept([Upload(cat)])
    run(cat, generation=1, vision=ScriptedVision(PausedError("auth", "answered 401", 600)))
    row = catalogue.get(cat)
    assert (row["status"], row["reason"], row["attempts"]) == ("pending", None, 1)
    assert "answered 401" in row["history"][-1]["detail"]
    assert [pause.reason for pause in ledger.list_pauses()] == ["auth"]


def test_the_cost_of_a_call_is_shown_in_the_ui(run, cat, instance, limiter):
    limiter.set_limits("1/second")
    run(cat, vision=ScriptedVision(BadAnswerError("prose"), ANSWER))
    event = instance.get_latest_materialization_event(dg.AssetKey("metadata"))
    shown = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    assert shown["cost_usd"] == 0.0014  # 800 tokens in at 1 USD and 60 out at 10 USD per million
    assert shown["attempt"] == 2
    assert shown["rate_limit_wait_seconds"] >= 0
    assert shown["call_seconds"] >= 0


def test_colours_that_do_not_occur_in_the_picture_are_dropped(run, cat, catalogue):
    answer = replace(
        ANSWER,
        metadata=ANSWER.metadata.model_copy(update={"dominant_colors": ["#a07850", "#0000ff"]}),
    )
    run(cat, vision=ScriptedVision(answer))
    assert catalogue.get(cat)["metadata"]["dominantColors"] == ["#a07850"]

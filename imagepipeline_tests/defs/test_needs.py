"""Runs make what an image needs, and nothing else."""

import json
from dataclasses import replace
from unittest.mock import Mock

import dagster as dg
import pytest
import sqlalchemy as sa

from imagepipeline.defs.assets import variants
from imagepipeline.defs.outcomes import ORIGINAL
from imagepipeline.errors import CatalogueDownError
from imagepipeline.imaging.variants import Renderer
from imagepipeline.models import ASSETS, Recipe, Upload, build_variant_specs
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.stores.events import EventLog
from imagepipeline_tests.conftest import PHOTOS, count_answers
from imagepipeline_tests.defs.test_assets import ANSWER, ScriptedVision

pytestmark = pytest.mark.stack


class RemoteEmbedder(LocalEmbedder):
    """Counts as a paid model."""

    recipe = Recipe("openrouter", "m")

    def embed(self, text):
        return replace(super().embed(text), version=self.recipe.version)


@pytest.fixture
def process(run, catalogue):
    """Pushes an image and runs it with paid models; gives what was reused, by asset."""

    def process(image_id, vision, path=None, **changes):
        catalogue.accept([Upload(image_id, path=path)])
        generation = catalogue.get(image_id)["generation"]
        result = run(
            image_id, generation=generation, vision=vision, embedder=RemoteEmbedder(), **changes
        )
        assert result.success
        return {
            event.asset_key.to_user_string(): event.materialization.metadata["is_reused"].value
            for event in result.get_asset_materialization_events()
            if event.asset_key != ORIGINAL
        }

    return process


def count_calls(ledger):
    return {row["stage"]: row["calls"] for row in ledger.summarize("stage")}


def list_modification_times(files):
    return {path.name: path.stat().st_mtime_ns for path in (files.root / "variants").iterdir()}


def test_a_repeated_upload_makes_and_pays_nothing(process, cat, catalogue, files, ledger):
    vision = ScriptedVision(ANSWER)
    assert not any(process(cat, vision).values())
    before = list_modification_times(files)
    assert all(process(cat, vision).values())
    assert list_modification_times(files) == before
    assert count_calls(ledger) == {"metadata": 1, "embedding": 1}
    row = catalogue.get(cat)
    assert row["status"] == "completed"
    reused = [event["detail"] for event in row["history"] if event["event"] == "reused"]
    assert reused == ["metadata", "variants", "embedding"]


def test_nothing_is_decoded_for_what_is_current(process, cat, monkeypatch):
    process(cat, ScriptedVision(ANSWER))

    def refuse(*_):
        raise AssertionError("the original was decoded")

    monkeypatch.setattr("imagepipeline.originals.decode", refuse)
    assert all(process(cat, ScriptedVision()).values())


def test_a_new_prompt_renders_no_variants_and_embeds_no_unchanged_text(process, cat, files, ledger):
    process(cat, ScriptedVision(ANSWER))
    before = list_modification_times(files)
    vision = ScriptedVision(ANSWER)
    vision.recipe = Recipe("openai", "scripted", "prompt-2")
    reused = process(cat, vision)
    assert reused == {"metadata": False, "variants": True, "embedding": True}
    assert list_modification_times(files) == before
    assert count_calls(ledger) == {"metadata": 2, "embedding": 1}


def test_another_quality_makes_variants_alone(process, cat, ledger):
    process(cat, ScriptedVision(ANSWER))
    renderer = Renderer(build_variant_specs(70, 70))
    reused = process(cat, ScriptedVision(), renderer=renderer)
    assert reused == {"metadata": True, "variants": False, "embedding": True}
    assert count_calls(ledger) == {"metadata": 1, "embedding": 1}


def test_a_variant_that_is_gone_is_made_again(process, cat, files):
    process(cat, ScriptedVision(ANSWER))
    (files.root / "variants" / "cat-sm.avif").unlink()
    assert process(cat, ScriptedVision()) == {
        "metadata": True,
        "variants": False,
        "embedding": True,
    }
    assert (files.root / "variants" / "cat-sm.avif").exists()


def test_the_same_bytes_under_another_id_are_paid_for_once(process, cat, catalogue, files, ledger):
    process(cat, ScriptedVision(ANSWER))
    files.put_original("twin", (PHOTOS / "cat.jpg").read_bytes(), "jpg")
    assert process("twin", ScriptedVision()) == {
        "metadata": True,
        "variants": False,
        "embedding": True,
    }
    assert catalogue.get("twin")["metadata"] == catalogue.get(cat)["metadata"]
    assert catalogue.get("twin")["width"] == catalogue.get(cat)["width"]
    assert count_calls(ledger) == {"metadata": 1, "embedding": 1}


def test_another_original_makes_everything_again(process, cat, files, ledger):
    process(cat, ScriptedVision(ANSWER))
    files.put_original(cat, (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
    changed = replace(ANSWER, metadata=ANSWER.metadata.model_copy(update={"mood": "wild"}))
    assert not any(process(cat, ScriptedVision(changed)).values())
    assert count_calls(ledger) == {"metadata": 2, "embedding": 2}


def test_who_asks_for_it_gets_it_anew(run, process, cat, instance, ledger):
    process(cat, ScriptedVision(ANSWER))
    run(cat, vision=ScriptedVision(ANSWER), embedder=RemoteEmbedder(), anew="metadata, embedding")
    assert count_calls(ledger) == {"metadata": 2, "embedding": 2}
    made = instance.get_latest_materialization_event(dg.AssetKey("metadata"))
    assert made.asset_materialization.metadata["cause"].value == "a person asked for it"
    made = instance.get_latest_materialization_event(dg.AssetKey("variants"))
    assert made.asset_materialization.metadata["is_reused"].value


def test_an_answer_is_kept_until_its_result_is_in_place(
    run, cat, catalogue, ledger, monkeypatch, sqlite_catalogue_url
):
    catalogue.accept([Upload(cat)])
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "save_metadata", Mock(side_effect=CatalogueDownError("down")))
        run(cat, generation=1, vision=ScriptedVision(ANSWER), embedder=RemoteEmbedder())
    assert count_answers(sqlite_catalogue_url) == 1
    generation = catalogue.get(cat)["generation"]
    assert run(
        cat, generation=generation, vision=ScriptedVision(), embedder=RemoteEmbedder()
    ).success
    assert catalogue.get(cat)["metadata"]["description"] == "A cat"
    assert count_calls(ledger) == {"metadata": 1, "embedding": 1}
    assert count_answers(sqlite_catalogue_url) == 0


def test_a_vector_that_the_index_refuses_is_not_kept(
    run, process, cat, catalogue, files, sqlite_catalogue_url
):
    class ShortEmbedder(RemoteEmbedder):
        def embed(self, text):
            return replace(super().embed(text), vector=(1.0, 0.0))

    files.put_original("first", (PHOTOS / "coffee.jpg").read_bytes(), "jpg")
    process("first", ScriptedVision(ANSWER))
    other = replace(ANSWER, metadata=ANSWER.metadata.model_copy(update={"mood": "wild"}))
    catalogue.accept([Upload(cat)])
    run(cat, generation=1, vision=ScriptedVision(other), embedder=ShortEmbedder())
    assert catalogue.get(cat)["reason"] == "provider_rejected"
    assert count_answers(sqlite_catalogue_url) == 0
    process(cat, ScriptedVision())
    assert catalogue.get(cat)["status"] == "completed"


def test_pictures_alone_leave_the_rest_to_a_later_run(run, cat, catalogue):
    catalogue.accept([Upload(cat)])
    assert [one.image_id for one in catalogue.list_pending(9, has_no_variants=True)] == [cat]
    assert run(cat, generation=1, assets=[variants]).success
    row = catalogue.get(cat)
    assert (row["status"], row["metadata"], len(row["variants"])) == ("pending", None, 6)
    assert catalogue.list_pending(9, has_no_variants=True) == []
    assert [one.image_id for one in catalogue.list_pending(9)] == [cat]
    assert run(cat, generation=2).success
    assert catalogue.get(cat)["status"] == "completed"
    catalogue.accept([Upload(cat)])  # perhaps with another picture
    assert [one.image_id for one in catalogue.list_pending(9, has_no_variants=True)] == [cat]


def test_variants_are_not_current_while_they_are_made_again(run, process, cat, catalogue, files):
    process(cat, ScriptedVision(ANSWER))
    (files.root / "variants" / "cat-sm.avif").write_bytes(b"torn")  # a disk that lost its end
    torn = []

    def write(path, content):
        type(files).write(files, path, content if torn else content[:99])
        torn.append(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", write, raising=False)
        process(cat, ScriptedVision())
    row = catalogue.get(cat)
    assert (row["status"], row["attempts"]) == ("completed", 2)
    for variant in row["variants"]:
        assert len(files.read(variant["path"])) == variant["size"]


def test_an_original_that_has_moved_gets_its_variants_where_they_belong(
    process, cat, catalogue, files
):
    process(cat, ScriptedVision(ANSWER))
    content = files.read("original/cat.jpg")
    files.delete("original/cat.jpg")
    (files.root / "original" / "moved.jpg").write_bytes(content)
    assert process(cat, ScriptedVision(), path="original/moved.jpg")["variants"] is False
    assert {row["path"] for row in catalogue.get(cat)["variants"]} == {
        "variants/moved-sm.webp",
        "variants/moved-sm.avif",
    }
    assert list_modification_times(files).keys() == {"moved-sm.webp", "moved-sm.avif"}


def test_a_picture_that_becomes_small_leaves_no_file_of_the_large_one(
    process, cat, files, catalogue, sqlite_catalogue_url
):
    def list_files():
        return sorted(path.name for path in (files.root / "variants").iterdir())

    small = ["cat-sm.avif", "cat-sm.webp"]
    process(cat, ScriptedVision(ANSWER))
    assert list_files() == small
    files.put_original(cat, (PHOTOS / "galaxies.jpg").read_bytes(), "jpg")  # 1000 px wide
    process(cat, ScriptedVision(ANSWER))
    assert list_files() == ["cat-md.avif", "cat-md.webp", *small]
    with sa.create_engine(sqlite_catalogue_url).connect() as connection:
        published = connection.exec_driver_sql("SELECT format, width FROM published_variants_v1")
        widths = sorted(published.tuples())
    assert widths == [("avif", 640), ("avif", 1000), ("webp", 640), ("webp", 1000)]
    payload = EventLog(sqlite_catalogue_url).list_latest(cat, 1)[0].payload
    told = [(one["format"], one["width"]) for one in json.loads(payload)["variants"]]
    assert told == widths
    files.put_original(cat, (PHOTOS / "cat.jpg").read_bytes(), "jpg")
    process(cat, ScriptedVision(ANSWER))
    assert list_files() == small
    assert process(cat, ScriptedVision()) == dict.fromkeys(ASSETS, True)


def test_three_equal_files_of_an_earlier_version_stay_current(
    process, cat, files, catalogue, sqlite_catalogue_url
):
    process(cat, ScriptedVision(ANSWER))
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        for suffix in ("md", "lg"):
            for name in ("webp", "avif"):
                path = f"variants/cat-{suffix}.{name}"
                files.write(path, files.read(f"variants/cat-sm.{name}"))
                connection.exec_driver_sql(
                    f"UPDATE image_variants SET path = '{path}' WHERE id = 'cat-{suffix}-{name}'"
                )
    before = list_modification_times(files)
    assert process(cat, ScriptedVision()) == dict.fromkeys(ASSETS, True)
    assert list_modification_times(files) == before
    assert len(before) == 6


def test_a_stored_answer_of_another_kind_is_asked_for_again(
    process, cat, ledger, sqlite_catalogue_url
):
    process(cat, ScriptedVision(ANSWER))
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        connection.exec_driver_sql("""UPDATE images SET metadata = '{"title": "x"}'""")
    assert process(cat, ScriptedVision(ANSWER))["metadata"] is False
    assert count_calls(ledger)["metadata"] == 2


def test_a_picture_pushed_during_its_run_counts_as_one_without_variants(run, cat, catalogue):
    catalogue.accept([Upload(cat)])
    claim = catalogue.claim(cat, 1, "run")
    catalogue.record_result(claim, "variants", Recipe("local", "pillow"), "0" * 64)
    catalogue.accept([Upload(cat)])
    catalogue.hand_back(claim, "results are missing")
    assert [one.image_id for one in catalogue.list_pending(9, has_no_variants=True)] == [cat]

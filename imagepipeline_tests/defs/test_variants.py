"""A changed set of variants makes and removes what has changed, and touches nothing else."""

import hashlib
import io

import pytest
import sqlalchemy as sa
from PIL import Image

from imagepipeline.errors import StorageDownError
from imagepipeline.models import Upload
from imagepipeline.providers import build_renderer
from imagepipeline.settings import Settings
from imagepipeline_tests.defs.test_assets import ANSWER, ScriptedVision
from imagepipeline_tests.defs.test_needs import count_calls, process

__all__ = ["process"]  # a fixture
pytestmark = pytest.mark.stack
DEFAULT = [
    {"name": "sm", "width": 640},
    {"name": "md", "width": 1024},
    {"name": "lg", "width": 1920},
]
XS = {"name": "xs", "width": 320}
XL = {"name": "xl", "width": 2560}
SQUARE = {
    "name": "square", "width": 200, "height": 200, "fit": "cover", "formats": ["jpeg", "png"],
}  # fmt: skip


def build(*definitions, **settings):
    return build_renderer(Settings(IMAGEPIPELINE_VARIANTS=list(definitions), **settings))


def list_files(files):
    """What each file is: its time of change and its content."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (files.root / "variants").iterdir()
    }


def list_changed(before, after):
    return {name for name, state in after.items() if before.get(name) != state}


def list_rows(catalogue, image_id="cat"):
    rows = catalogue.get(image_id)["variants"]
    assert all(row["is_published"] and row["recipe"] for row in rows)
    return {row["path"].removeprefix("variants/") for row in rows}


def test_each_change_of_the_set_touches_only_its_own_files(
    process, cat, files, catalogue, ledger, sqlite_catalogue_url
):
    process(cat, ScriptedVision(ANSWER))
    first = list_files(files)
    calls = count_calls(ledger)
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        connection.exec_driver_sql("UPDATE image_variants SET recipe = NULL")  # as 0.2.0 left it

    assert all(process(cat, ScriptedVision(), renderer=build(*DEFAULT)).values())
    assert list_files(files) == first

    reused = process(cat, ScriptedVision(), renderer=build(*DEFAULT, XS))
    assert reused == {"metadata": True, "variants": False, "embedding": True}
    wider = list_files(files)
    assert list_changed(first, wider) == {"cat-xs.webp", "cat-xs.avif"}
    assert list_rows(catalogue) == wider.keys()

    process(cat, ScriptedVision(), renderer=build(*DEFAULT, XS, IMAGEPIPELINE_AVIF_QUALITY=60))
    recoded = list_files(files)
    # The picture is small: `md` and `lg` have the file of `sm`.
    assert list_changed(wider, recoded) == {"cat-xs.avif", "cat-sm.avif"}

    process(cat, ScriptedVision(), renderer=build(SQUARE, XS, IMAGEPIPELINE_AVIF_QUALITY=60))
    last = list_files(files)
    assert list_changed(recoded, last) == {"cat-square.jpg", "cat-square.png"}
    assert last.keys() == {"cat-square.jpg", "cat-square.png", "cat-xs.webp", "cat-xs.avif"}
    assert list_rows(catalogue) == last.keys()
    assert count_calls(ledger) == calls
    assert catalogue.get(cat)["status"] == "completed"


def test_removing_a_variant_decodes_nothing(process, cat, files, catalogue, monkeypatch):
    process(cat, ScriptedVision(ANSWER))
    monkeypatch.setattr("imagepipeline.originals.decode", None)
    process(cat, ScriptedVision(), renderer=build(*DEFAULT[:2]))
    assert list_rows(catalogue) == list_files(files).keys()
    assert not any("-lg." in name for name in list_files(files))


def test_a_crop_follows_the_focus_of_the_upload(process, run, files, catalogue, instance):
    picture = Image.new("RGB", (900, 300), "white")
    picture.paste("red", (600, 0, 900, 300))
    content = io.BytesIO()
    picture.save(content, "PNG")
    files.put_original("wide", content.getvalue(), "png")
    renderer = build(SQUARE, XS)

    def push(focus=None):
        catalogue.accept([Upload("wide", focus=focus)])
        generation = catalogue.get("wide")["generation"]
        assert run(
            "wide", generation=generation, vision=ScriptedVision(ANSWER), renderer=renderer
        ).success
        path = files.root / "variants" / "wide-square.png"
        return Image.open(path).convert("RGB").getpixel((100, 100)), list_files(files)

    color, first = push()
    assert color == (255, 255, 255)
    color, second = push([0.9, 0.5])
    assert color == (255, 0, 0)
    assert list_changed(first, second) == {"wide-square.jpg", "wide-square.png"}
    assert push() == (color, second)  # a push without a focus keeps it


def test_a_torn_file_among_those_that_stay_is_made_again(process, cat, files, catalogue):
    process(cat, ScriptedVision(ANSWER))
    path = files.root / "variants" / "cat-sm.webp"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    process(cat, ScriptedVision(), renderer=build(*DEFAULT, XS))
    assert catalogue.get(cat)["attempts"] == 2
    assert path.read_bytes() == content


def test_a_further_variant_of_a_small_picture_has_the_file_that_is_there(
    process, cat, files, catalogue
):
    process(cat, ScriptedVision(ANSWER))
    first = list_files(files)
    assert first.keys() == {"cat-sm.webp", "cat-sm.avif"}
    process(cat, ScriptedVision(), renderer=build(*DEFAULT, XL))
    assert list_files(files) == first
    rows = {one["id"]: one for one in catalogue.get(cat)["variants"]}
    assert rows["cat-xl-webp"]["path"] == rows["cat-sm-webp"]["path"]
    assert rows["cat-xl-webp"]["is_alias"]
    only_sm = build(DEFAULT[0], IMAGEPIPELINE_WEBP_QUALITY=60)  # what shared its file goes
    process(cat, ScriptedVision(), renderer=only_sm)
    assert list_changed(first, list_files(files)) == {"cat-sm.webp"}
    assert list_rows(catalogue) == first.keys()
    process(cat, ScriptedVision(), renderer=build(*DEFAULT, XL))
    before = list_files(files)
    process(cat, ScriptedVision(), renderer=build({"name": "sm", "width": 700}, *DEFAULT[1:], XL))
    assert list_files(files) == before  # the others lend `sm` its file, and one is still shown
    rows = catalogue.get(cat)["variants"]
    assert [one["id"] for one in rows if not one["is_alias"]] == ["cat-sm-avif", "cat-sm-webp"]
    process(cat, ScriptedVision(), renderer=build(XL))  # the file gets the name of the first
    assert list_files(files).keys() == {"cat-xl.webp", "cat-xl.avif"}
    assert list_rows(catalogue) == list_files(files).keys()
    assert not any(one["is_alias"] for one in catalogue.get(cat)["variants"])


def test_a_variant_that_could_not_be_removed_is_not_current_for_the_next_original(
    process, run, cat, files, catalogue, monkeypatch
):
    process(cat, ScriptedVision(ANSWER), renderer=build(*DEFAULT, XS))
    before = list_files(files)
    path = files.root / "original" / "cat.jpg"
    path.write_bytes(path.read_bytes() + b"changed")
    catalogue.accept([Upload(cat)])

    def refuse(*_):
        raise StorageDownError("it does not delete")

    with monkeypatch.context() as patch:
        patch.setattr("imagepipeline.defs.stages.remove_others", refuse)
        run(cat, generation=2, vision=ScriptedVision(ANSWER), renderer=build(*DEFAULT))
    process(cat, ScriptedVision(), renderer=build(*DEFAULT, XS))
    assert list_changed(before, list_files(files)) == before.keys()

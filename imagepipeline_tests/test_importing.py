"""Import: each image once, none missing, whatever is in the folder and whenever it is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from PIL import Image

from imagepipeline import importing
from imagepipeline.importing import Mode, Source, State
from imagepipeline.models import BULK_PRIORITY, Upload
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.erasures import Erasures
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.tables import image_history, images

MAX_BYTES = 100_000
# Runs the command, and kills it at the nth call of a function, before or after it.
KILLED = """
import itertools, os, signal, sys
from imagepipeline import cli
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.files import FileStore
from imagepipeline.stores.objects import ObjectStore
when, owner, name, number = sys.argv[1:5]
owner, calls = vars()[owner], itertools.count(1)
original = getattr(owner, name)
def wrapped(*arguments, **options):
    is_last = next(calls) == int(number)
    if is_last and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **options)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, wrapped)
del sys.argv[1:5]
cli.main()
"""


def draw(path, number, size=(4, 4)):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (number % 256, number // 256, 9)).save(path, "PNG")
    return path


@pytest.fixture
def site(tmp_path):
    """The folder of an existing site."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def take_in(storage, catalogue):
    """A function that imports a folder; returns the plan, which says what became of each file."""

    def take_in(folder, id_from="name", mode=Mode.COPY, change=lambda: None):
        source = Source(FileStore(folder), id_from, MAX_BYTES)
        plan = importing.plan(source, storage, catalogue, lambda *_: None)
        change()
        importing.carry_out(plan, source, storage, catalogue, mode, lambda *_: None)
        return plan

    return take_in


def states(plan):
    return {name: file.state for name, file in plan.files.items()}


def test_every_kind_of_file_is_told_and_the_rest_is_imported(take_in, site, catalogue, storage):
    draw(site / "cat.PNG", 1)
    draw(site / "2026" / "Dog_1.jpeg", 2)  # its name lies about the format, as many do
    draw(site / "no-extension", 3)
    draw(site / "Straße.png", 4)
    draw(site / "a b.png", 5)
    draw(Path(os.fsdecode(os.fsencode(site) + b"/\xff.png")), 6)
    draw(site / ".hidden.png", 7)
    draw(site / ".thumbnails" / "cat.png", 8)
    draw(site / "twice.png", 9)
    draw(site / "2026" / "twice.PNG", 10)
    draw(site / "same.png", 11)
    draw(site / "2026" / "same.png", 11)
    draw(site / f"{'long' * 20}.png", 12)
    (site / "empty.jpg").touch()
    (site / "page.jpg").write_text("<html>")
    (site / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(MAX_BYTES))
    (site / "link.png").symlink_to(site / "cat.PNG")
    (site / "loop").symlink_to(site)
    os.mkfifo(site / "pipe.png")
    plan = take_in(site)
    assert states(plan) == {
        "cat.PNG": State.IMPORTED,
        "2026/Dog_1.jpeg": State.IMPORTED,
        "no-extension": State.IMPORTED,
        "Straße.png": State.INVALID_ID,
        "a b.png": State.INVALID_ID,
        "\udcff.png": State.INVALID_ID,
        "twice.png": State.SAME_ID,
        "2026/twice.PNG": State.SAME_ID,
        "same.png": State.IMPORTED,
        "2026/same.png": State.DUPLICATE,
        f"{'long' * 20}.png": State.INVALID_ID,
        "empty.jpg": State.EMPTY,
        "page.jpg": State.NOT_AN_IMAGE,
        "large.png": State.TOO_LARGE,
        "link.png": State.UNREADABLE,
        "loop": State.UNREADABLE,
        "pipe.png": State.UNREADABLE,
    }
    assert "web page" in plan.files["page.jpg"].error
    assert "2026/twice.PNG" in plan.files["twice.png"].error
    row = catalogue.get("cat")
    assert row["requested_path"] == "original/cat.png"
    assert row["priority"] == BULK_PRIORITY
    assert [event["event"] for event in row["history"]] == ["imported"]
    assert storage.read("original/Dog_1.jpeg") == (site / "2026" / "Dog_1.jpeg").read_bytes()
    assert storage.list_originals(with_new=True).keys() == {"cat", "Dog_1", "no-extension", "same"}


def test_ids_from_paths_and_from_bytes(take_in, site, catalogue):
    draw(site / "2026" / "a b.png", 1)
    draw(site / "2026-a-b.png", 2)
    draw(site / "été" / "_x.y.png", 3)
    draw(site / "copy.png", 1)
    by_path = importing.plan(
        Source(FileStore(site), "path", MAX_BYTES), FileStore(site / "none"), catalogue, print
    )
    assert {name: (file.image_id, file.state) for name, file in by_path.files.items()} == {
        "2026/a b.png": ("2026-a-b", State.SAME_ID),
        "2026-a-b.png": ("2026-a-b", State.SAME_ID),
        "été/_x.y.png": ("t-_x-y", State.NEW),
        "copy.png": ("copy", State.NEW),
    }
    by_hash = take_in(site, "hash")
    assert by_hash.count() == {"imported": 3, "duplicate": 1}
    first = by_hash.files["copy.png"].image_id
    assert (len(first), by_hash.files["2026/a b.png"].image_id) == (64, first)
    assert catalogue.get(first)["status"] == "pending"


def test_what_is_known_stays_as_it_is(take_in, site, catalogue, storage, sqlite_catalogue_url):
    for number, name in enumerate(("done", "other", "left", "taken", "erased", "fresh")):
        draw(site / f"{name}.png", number)
    take_in(site)
    erasures = Erasures(sqlite_catalogue_url)
    claim = catalogue.claim("erased", 1, "run")
    catalogue.fail(claim, "cancelled", "it is being erased")
    for name in ("erased", "left", "taken", "fresh"):
        if name != "erased":
            catalogue.fail(catalogue.claim(name, 1, "run"), "cancelled", "by a person")
        assert erasures.remove(name, catalogue.get(name)["fence"], [])
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:  # as if never seen
        connection.execute(sa.text("DELETE FROM erasures WHERE image_id != 'erased'"))
    storage.delete("original/erased.png")
    storage.delete("original/fresh.png")
    storage.write("original/taken.png", b"an upload that is about to be pushed")
    draw(site / "other.png", 77)
    plan = take_in(site)
    assert states(plan) == {
        "done.png": State.KNOWN,
        "other.png": State.OTHER_BYTES,
        "left.png": State.IMPORTED,  # its original was stored when an import was killed
        "taken.png": State.OTHER_BYTES,
        "erased.png": State.ERASED,
        "fresh.png": State.IMPORTED,
    }
    assert storage.read("original/taken.png").startswith(b"an upload")
    assert catalogue.get_states(["done"])["done"].pushes == 1


def test_a_folder_that_changes_meanwhile(take_in, site, catalogue, storage, sqlite_catalogue_url):
    for number, name in enumerate(("gone", "grown", "pushed", "stays", "elsewhere", "erased")):
        draw(site / f"{name}.png", number)

    def change():
        (site / "gone.png").unlink()
        draw(site / "grown.png", 9, size=(99, 99))
        draw(site / "new.png", 10)
        storage.write("original/pushed.png", b"by the app")
        storage.write("original/elsewhere.jpg", b"by the app")
        catalogue.accept([Upload("pushed"), Upload("elsewhere"), Upload("erased")])
        catalogue.cancel("erased", "it is being erased")
        fence = catalogue.get("erased")["fence"]
        Erasures(sqlite_catalogue_url).remove("erased", fence, [])

    plan = take_in(site, change=change)
    assert states(plan) == {
        "gone.png": State.CHANGED,
        "grown.png": State.CHANGED,
        "pushed.png": State.OTHER_BYTES,
        "stays.png": State.IMPORTED,
        "elsewhere.png": State.OTHER_BYTES,
        "erased.png": State.ERASED,
    }
    assert storage.read("original/pushed.png") == b"by the app"
    assert storage.list_originals_of("elsewhere") == ["original/elsewhere.jpg"]
    assert storage.list_originals_of("erased") == []
    assert catalogue.get("gone") is None
    again = take_in(site)
    assert again.count() == {"imported": 2, "known": 1, "other_bytes": 2, "erased": 1}


def test_moving_deletes_only_what_is_stored(take_in, site, catalogue, storage):
    draw(site / "a.png", 1)
    draw(site / "sub" / "a.png", 1)
    draw(site / "known.png", 2)
    draw(site / "lost.png", 3)
    (site / "note.txt").write_text("stays")
    take_in(site)
    storage.delete("original/lost.png")  # as some apps do when an image is done
    draw(site / "b.png", 4)
    plan = take_in(site, mode=Mode.MOVE)
    assert plan.files["b.png"].state is State.IMPORTED
    left = {path.name for path in site.rglob("*") if path.is_file()}
    assert left == {"lost.png", "note.txt"}
    assert storage.list_originals(with_new=True).keys() == {"a", "b", "known"}


def test_links_share_the_files_of_the_site(site, catalogue, files):
    draw(site / "a.png", 1)
    source = Source(FileStore(site), "name", MAX_BYTES)
    for _ in range(2):
        plan = importing.plan(source, files, catalogue, print)
        importing.carry_out(plan, source, files, catalogue, Mode.LINK, print)
    stored = files.root / "original" / "a.png"
    assert stored.samefile(site / "a.png")
    files.write("original/a.png", b"replaced")
    content = (site / "a.png").read_bytes()
    assert content != b"replaced"

    source = Source(FileStore(site), "hash", MAX_BYTES)
    plan = importing.plan(source, files, catalogue, print)
    (site / "a.png").write_bytes(content[:-1] + b"?")
    importing.carry_out(plan, source, files, catalogue, Mode.LINK, print)
    assert states(plan) == {"a.png": State.CHANGED}
    assert files.list_originals(with_new=True).keys() == {"a"}


@pytest.fixture
def world(request, tmp_path, catalogue_url):
    """A catalogue and a storage, and the environment that names them."""
    storage = str(tmp_path / "storage")
    if "postgres" in catalogue_url:  # each database once, each storage once
        storage = request.getfixturevalue("bucket_url")
    environment = {
        **os.environ,
        "IMAGEPIPELINE_HOME": str(tmp_path / "home"),
        "IMAGEPIPELINE_STORAGE_ROOT": storage,
        "DATABASE_URL": catalogue_url,
    }
    return Catalogue(catalogue_url), open_storage(storage), environment


@pytest.mark.stack
def test_an_import_killed_three_times_takes_each_image_once(world, site, catalogue_url):
    _, storage, environment = world
    originals = {f"i{number}": draw(site / f"i{number}.png", number) for number in range(130)}
    contents = {image_id: path.read_bytes() for image_id, path in originals.items()}
    is_moved = not isinstance(storage, FileStore)
    words = ["import", str(site), "--move" if is_moved else "--copy", "--json"]
    while_writing = ("after", "ObjectStore", "create") if is_moved else ("before", "os", "fsync")
    for point in (
        (*while_writing, "30"),
        ("after", "Catalogue", "accept_imported", "1"),
        ("before", "Catalogue", "accept_imported", "1"),
    ):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, *point, *words], env=environment, capture_output=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert all(  # also of those that were just being written
            storage.read(file.path) == contents[image_id]
            for image_id, file in storage.list_originals(with_new=True).items()
        )
    ended = subprocess.run(
        [sys.executable, "-m", "imagepipeline.cli", *words],
        env=environment,
        capture_output=True,
        check=True,
    )
    counts = json.loads(ended.stdout)["counts"]
    assert counts == {"imported": 30, "known": 100}
    assert len(list(site.iterdir())) == (0 if is_moved else 130)
    assert storage.list_originals(with_new=True).keys() == contents.keys()
    with sa.create_engine(catalogue_url).connect() as connection:
        rows = connection.execute(sa.select(images.c.id, images.c.generation, images.c.pushes))
        assert sorted(rows) == sorted((image_id, 1, 1) for image_id in contents)
        count = sa.select(sa.func.count()).select_from(image_history)
        assert connection.execute(count).scalar_one() == 130


@pytest.mark.parametrize("catalogue_url", ["sqlite"], indirect=True)
def test_a_bucket_is_imported_through_the_command(world, site, bucket_url):
    catalogue, _, environment = world
    source = open_storage(f"{bucket_url}-site")
    for number, name in enumerate(("a", "sub/b", ".hidden")):
        path = draw(site / f"{number}.png", number)
        source.write(f"{name}.png", path.read_bytes())
    source.write("note.txt", b"no image")
    environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def run(*options):
        words = ["import", f"{bucket_url}-site", "--json", *options]
        ended = subprocess.run(
            [sys.executable, "-m", "imagepipeline.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
        )
        return ended.returncode, json.loads(ended.stdout)["counts"]

    assert run("--dry-run") == (1, {"new": 2, "not_an_image": 1})
    assert catalogue.count()["pending"] == 0
    assert run("--move") == (1, {"imported": 2, "not_an_image": 1})
    assert catalogue.count()["pending"] == 2
    assert [file.path for file in source.list_files()] == ["note.txt"]
    assert run() == (1, {"not_an_image": 1})

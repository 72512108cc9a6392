"""Hostile IDs and paths are refused, from the queue, manual partitions and existing rows."""

import io
import json

import dagster as dg
import pytest
import sqlalchemy as sa
from PIL import Image

from imagepipeline.defs.attempts import GENERATION_TAG
from imagepipeline.defs.notifications import tell
from imagepipeline.defs.reconciler import StandstillWatch, reconcile
from imagepipeline.defs.sensors import find_unfinished, take_in, upload_sensor
from imagepipeline.errors import MissingOriginalError
from imagepipeline.models import Upload
from imagepipeline.services.vision import LocalVision
from imagepipeline.storage import open_storage
from imagepipeline.stores.files import FileStore

pytestmark = pytest.mark.stack


def draw(color):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


CAT, BOAT = draw("orange"), draw("navy")


@pytest.fixture
def tick(instance, catalogue, queue, ledger, paid_calls, applier, tenants):
    def tick():
        resources = {
            "queue": queue,
            "catalogue": catalogue,
            "ledger": ledger,
            "paid_calls": paid_calls,
            "applier": applier,
            "tenants": tenants,
        }
        return upload_sensor(dg.build_sensor_context(instance=instance, resources=resources))

    return tick


class CountingVision(LocalVision):
    def __init__(self):
        self.calls = 0

    def describe(self, preview, facts):
        self.calls += 1
        return super().describe(preview, facts)


def list_errors(result):
    """Returns the errors of a run's failed steps."""
    return [event.step_failure_data.error.to_string() for event in result.get_step_failure_events()]


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "a b", "a\nb", "\x1b[31ma", "é", "a" * 65, "'; DROP TABLE images"]
)
@pytest.mark.parametrize("generation", [None, 1])
def test_the_key_of_a_manual_partition_is_validated_like_an_entry(run, catalogue, key, generation):
    result = run(key, generation)
    assert not result.success
    [said, *_] = list_errors(result)
    assert "is not an image ID: 1 to 64 letters, digits" in said
    assert "\x1b" not in said
    assert catalogue.get(key) is None
    assert sum(catalogue.count().values()) == 0


def test_a_malformed_generation_fails_its_run_but_no_tick(run, instance, tick, queue, catalogue):
    result = run("cat", "ten")
    assert "the run's tag imagepipeline/generation is not a number" in list_errors(result)[0]
    for tags in ({GENERATION_TAG: "ten", "dagster/partition": "a"}, {GENERATION_TAG: "1"}):
        dg_run = dg.DagsterRun(
            job_name="process_upload", tags=tags, status=dg.DagsterRunStatus.STARTED
        )
        instance.add_run(dg_run)
    assert find_unfinished(instance).images == set()
    queue.enqueue("good")
    assert [request.run_key for request in tick().run_requests] == ["good:1"]


def test_a_row_with_an_invalid_id_fails_without_affecting_others(
    tick, catalogue, outbox, sqlite_catalogue_url, instance, tasks
):
    catalogue.accept([Upload(f"victim{number}") for number in range(20)])
    evil = "evil\n\x1b[31mSubject: x"
    with sa.create_engine(sqlite_catalogue_url).begin() as connection:
        for number in range(16):  # more than may run at a time
            connection.execute(
                sa.text("UPDATE images SET id = :evil, priority = 9 WHERE id = :id"),
                {"evil": f"{evil}{number}", "id": f"victim{number}"},
            )
    assert tick().skip_message  # the first fifteen, all invalid
    keys = [request.run_key for request in tick().run_requests]
    assert sorted(keys) == [f"victim{number}:1" for number in range(16, 20)]
    assert catalogue.get(f"{evil}0")["reason"] == "invalid_id"
    told = []

    class Notifier:
        channel = "mail"

        def send(self, failures):
            told.extend(failures)

    tell(outbox, Notifier())
    assert len(told) == 16
    assert reconcile(catalogue, instance, tasks, StandstillWatch()) == []


def test_a_row_that_cannot_be_reconciled_does_not_affect_others(
    catalogue, instance, tasks, start_run, monkeypatch
):
    for image_id in ("bad", "good"):
        catalogue.accept([Upload(image_id)])
        catalogue.claim(image_id, 1, start_run(image_id, status=dg.DagsterRunStatus.FAILURE).run_id)
    recover = catalogue.recover
    monkeypatch.setattr(
        catalogue,
        "recover",
        lambda row, cause: recover(row, cause) if row.image_id != "bad" else 1 / 0,
    )
    lines = reconcile(catalogue, instance, tasks, StandstillWatch())
    assert any(line.startswith("'bad' could not be checked: ZeroDivisionError") for line in lines)
    assert catalogue.get("good")["status"] == "pending"


THEFTS = [
    "original/victim.jpg",
    "original/victim.png",
    "original/victim.x.jpg",
    "original/2026/theirs.jpg",
]


def accept_victims(catalogue):
    """Accepts two images: one by its ID alone, one by a path in a folder."""
    catalogue.accept([Upload("victim"), Upload("other", "original/2026/theirs.jpg")])


@pytest.mark.parametrize("path", THEFTS)
def test_an_entry_cannot_name_another_images_original(queue, catalogue, path):
    accept_victims(catalogue)
    queue.enqueue("thief", path)
    queue.enqueue("neighbour", "original/2026/mine.jpg")
    take_in(queue, catalogue)
    assert catalogue.get("thief") is None
    [letter] = queue.list_dead()
    assert (
        f"'{path}' is the original of {'other' if '2026' in path else 'victim'}, not of thief"
        in letter["reason"]
    )
    assert catalogue.get("neighbour")["requested_path"] == "original/2026/mine.jpg"


@pytest.mark.parametrize("path", THEFTS)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_entry_cannot_name_the_original_of_another_entry_in_the_same_tick(
    queue, catalogue, path, is_first
):
    pushes = [("victim", None), ("other", "original/2026/theirs.jpg")]
    pushes.insert(0 if is_first and "2026" not in path else 2, ("thief", path))
    for push in pushes:
        queue.enqueue(*push)
    take_in(queue, catalogue)
    assert catalogue.get("thief") is None
    assert len(queue.list_dead()) == 1


@pytest.mark.parametrize(
    "path",
    [
        "original/./victim.jpg",
        "original//victim.jpg",
        "original/x/../victim.jpg",
        "./original/victim.jpg",
        "/original/victim.jpg",
        "original\\victim.jpg",
        "original/victim.jpg/",
        "original/victim.jpg\n",
        "original/victim\u200b.jpg",
        "Original/victim.jpg",
        "original/victim.jpg\x00.png",
        "file:///original/victim.jpg",
    ],
)
def test_a_path_must_be_in_its_normal_form(queue, catalogue, path):
    accept_victims(catalogue)
    queue.redis.lpush(queue.wait_key, json.dumps({"imageId": "thief", "path": path}))
    take_in(queue, catalogue)
    assert catalogue.get("thief") is None
    assert len(queue.list_dead()) == 1


@pytest.mark.parametrize(
    "path",
    ["original/%76ictim.jpg", "original/VICTIM.jpg", "original/link.jpg", "original/vıctim.jpg"],
)
def test_a_path_that_resembles_anothers_original_finds_no_file(storage, path):
    storage.put_original("victim", CAT, "jpg")
    if isinstance(storage, FileStore):
        (storage.root / "original" / "link.jpg").symlink_to("victim.jpg")
    assert Upload("thief", path).path == path
    with pytest.raises(MissingOriginalError):
        storage.read(path)


@pytest.mark.parametrize("path", ["original/victim.jpg", "original/2026/theirs.jpg"])
def test_the_run_of_an_image_that_names_anothers_original_fails(run, catalogue, files, path):
    """The owner is known, or has read its file, only after the thief was accepted."""
    files.write(path, CAT)
    catalogue.accept([Upload("thief", path)])
    if "2026" in path:  # as an earlier version did, which did not check
        claim = catalogue.claim_anew("victim", "its run")
        with catalogue._database.transaction() as connection:
            catalogue._update(connection, claim, path=path)
    catalogue.accept([Upload("victim")])
    vision = CountingVision()
    run("thief", 1, vision=vision)
    row = catalogue.get("thief")
    assert (row["status"], row["reason"], vision.calls, row["path"]) == (
        "failed",
        "path_taken",
        0,
        None,
    )
    assert f"{path} is the original of victim, not of thief" in row["error"]


def test_an_id_equal_to_the_name_of_anothers_original_does_not_give_access(run, catalogue, files):
    files.write("original/IMG_1.jpg", CAT)
    catalogue.accept([Upload("abc", "original/IMG_1.jpg")])
    assert run("abc", 1).success
    catalogue.accept([Upload("IMG_1")])
    vision = CountingVision()
    run("IMG_1", 1, vision=vision)
    assert (catalogue.get("IMG_1")["reason"], vision.calls) == ("path_taken", 0)
    catalogue.accept([Upload("abc", "original/IMG_1.jpg")])  # its owner still has access
    assert run("abc", 2).success


def test_legitimate_pushes_are_accepted_again_and_again(run, queue, catalogue, files):
    files.write("original/2026/photo.jpg", CAT)
    files.write("original/IMG_7.jpg", BOAT)
    files.put_original("bare", CAT, "jpg")
    files.put_original("own", BOAT, "jpg")
    pushes = [
        ("a", "original/2026/photo.jpg"),
        ("b", "original/IMG_7.jpg"),
        ("bare", None),
        ("own", "original/own.jpg"),
    ]
    for generation in (1, 2):
        for push in pushes:
            queue.enqueue(*push)
            queue.enqueue(*push)  # a duplicate
        take_in(queue, catalogue)
        assert queue.list_dead() == []
        if generation == 1:
            assert all(run(image_id, 1).success for image_id in ("a", "b"))


def test_the_owner_of_a_path_is_found_by_a_database_index(catalogue, sqlite_catalogue_url):
    with sa.create_engine(sqlite_catalogue_url).connect() as connection:
        plan = connection.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT id FROM images "
            "WHERE requested_path IN ('a', 'b') OR path IN ('a', 'b')"
        ).all()
    assert all("SCAN" not in str(row) for row in plan)


def test_originals_in_a_bucket_are_found_by_their_exact_name(bucket_url):
    storage = open_storage(bucket_url)
    storage.put_original("victim", CAT, "jpg")
    assert storage.list_originals_of("victim") == ["original/victim.jpg"]
    assert storage.list_originals_of("VICTIM") == []


def test_unclassified_errors_are_stored_in_printable_form(run, catalogue, files, instance):
    files.put_original("cat", CAT, "jpg")
    catalogue.accept([Upload("cat")])
    evil = "\x1b[31m\u202e\x9b\u2028\ud83d"

    class Vision(LocalVision):
        def describe(self, preview, facts):
            raise KeyError(evil) from RuntimeError(evil)

    result = run("cat", 1, vision=Vision())
    assert not result.success
    row = catalogue.get("cat")
    assert row["error"].startswith("KeyError")
    assert row["error"].isprintable()
    written = "".join(str(entry.to_json()) for entry in instance.all_logs(result.run_id))
    assert not any(mark in written for mark in ("u001b", "u202e", "\x1b", "\u202e", "\x9b"))


def test_a_stored_variant_is_read_only_up_to_its_recorded_size(run, catalogue, files, monkeypatch):
    files.put_original("cat", CAT, "jpg")
    catalogue.accept([Upload("cat")])
    sizes = []
    read = files.read
    monkeypatch.setattr(
        files, "read", lambda path, most=None: sizes.append((path, most)) or read(path, most)
    )
    assert run("cat", 1).success
    assert all(most is not None for _, most in sizes)
    assert len([path for path, _ in sizes if path.startswith("variants/")]) >= 6


@pytest.mark.parametrize("path", [None, "original/victim.jpg"])
def test_an_owner_keeps_its_original_even_if_another_image_named_it_first(
    run, queue, catalogue, files, path
):
    files.put_original("victim", CAT, "jpg")
    queue.enqueue("thief", "original/victim.jpg")
    take_in(queue, catalogue)
    queue.enqueue("victim", path)
    take_in(queue, catalogue)
    assert queue.list_dead() == []
    run("thief", 1)
    assert run("victim", 1).success
    assert [catalogue.get(image_id)["reason"] for image_id in ("thief", "victim")] == [
        "path_taken",
        None,
    ]

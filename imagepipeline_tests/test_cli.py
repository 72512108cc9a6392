"""The command line, as used by people and by scripts."""

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from PIL import Image

from imagepipeline import cli
from imagepipeline.commands.events import follow_events
from imagepipeline.errors import StaleClaimError, list_reasons
from imagepipeline.models import (
    ASSETS,
    Claim,
    ImageMetadata,
    OriginalFacts,
    PaidCall,
    Recipe,
    Upload,
)
from imagepipeline.services.embedder import LocalEmbedder
from imagepipeline.stores import uploads
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline.stores.events import EventLog
from imagepipeline.stores.failures import FailedImages
from imagepipeline.stores.ledger import Ledger
from imagepipeline.stores.tables import images
from imagepipeline.stores.vectors import EmbeddingIndex
from imagepipeline_tests.conftest import PHOTOS


@pytest.fixture
def invoke(monkeypatch, capfd, tmp_path, redis_url, queue):
    """A function that runs a command and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REDIS_URL", redis_url)
    (tmp_path / "home").mkdir()

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["imagepipeline", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return invoke


@pytest.fixture
def catalogue(invoke, tmp_path, create_catalogue):
    return Catalogue(create_catalogue(tmp_path / "home" / "catalogue.sqlite"))


def complete(catalogue, image_id, description, home):
    claim = catalogue.claim_anew(image_id, "run")
    metadata = ImageMetadata(
        description=description, tags=["t"], category="c", dominant_colors=[], mood="calm"
    )
    catalogue.save_original(
        claim, OriginalFacts(f"original/{image_id}.jpg", 9, "0" * 64, 4, 3, "data:", "#000000")
    )
    catalogue.save_metadata(claim, metadata, Recipe("local", "m"), "0" * 64)
    EmbeddingIndex(str(home / "lancedb")).upsert(
        claim, LocalEmbedder().embed(metadata.embedding_text)
    )
    for asset in ASSETS:
        catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
    catalogue.finish(claim)


def test_every_command_has_help():
    groups = [[name] for name in cli.cli.commands if name != "failed"] + [
        ["failed", n] for n in cli.cli.commands["failed"].commands
    ]
    for words in groups:
        result = CliRunner().invoke(cli.cli, [*words, "--help"])
        assert result.exit_code == 0
        assert "Exit codes" in result.output
        assert "--json" in result.output


def test_the_command_line_does_not_import_heavy_packages():
    script = "import sys, imagepipeline.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "dagster",
        "lancedb",
        "pyarrow",
        "sqlalchemy",
        "openai",
        "numpy",
        "PIL",
        "redis",
        "rich.progress",
    ]
    shown = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[]"


def test_push_stores_the_original_and_enqueues_its_id(invoke, tmp_path, queue):
    code, out, _ = invoke("push", str(PHOTOS / "cat.jpg"), "--priority", "3", "--json")
    [row] = json.loads(out)
    assert code == 0
    assert row["image_id"] == "cat-07c5a883"
    stored = tmp_path / "home" / "storage" / "original" / "cat-07c5a883.jpg"
    assert stored.read_bytes() == (PHOTOS / "cat.jpg").read_bytes()
    [entry] = queue.read(9)
    assert json.loads(entry) == {
        "imageId": "cat-07c5a883",
        "path": "original/cat-07c5a883.jpg",
        "priority": 3,
    }


def test_push_uses_a_given_id_and_focus(invoke, queue):
    command = ("push", str(PHOTOS / "cat.jpg"), "--id", "tom", "--focus")
    assert invoke(*command, "0.2, 1") == (0, "tom\n", "")
    [entry] = queue.read(9)
    assert (json.loads(entry)["imageId"], json.loads(entry)["focus"]) == ("tom", [0.2, 1.0])
    for wrong in ("", "0.5", "0.5,1.01", "-0.1,0", "nan,0", "a,b", "0.1,0.1,0.1"):
        code, _, err = invoke(*command, wrong)
        assert code == 2
        assert f"{wrong!r} is not two numbers from 0 to 1" in err
    assert queue.count()["waiting"] == 1


def test_push_takes_the_images_of_a_folder(invoke, tmp_path, queue):
    (tmp_path / "site" / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/b.PNG", ".hidden.png")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "site" / name)
    (tmp_path / "site" / "note.txt").write_text("no image")
    code, out, err = invoke("push", str(tmp_path / "site"), str(PHOTOS / "cat.jpg"))
    assert code == 0
    assert [line[:2] for line in out.splitlines()] == ["a-", "b-", "ca"]
    assert "note.txt: the original is not a picture" in err
    assert queue.count()["waiting"] == 3
    assert invoke("push", str(tmp_path / "site" / "sub"), "--id", "tom")[1] == "tom\n"
    (tmp_path / "none").mkdir()
    code, _, err = invoke("push", str(tmp_path / "none"))
    assert (code, err) == (1, "Error: there is no image to push\n")


@pytest.mark.parametrize("options", [(), ("--id", "tom")])
def test_push_refuses_what_is_not_a_plain_file(invoke, queue, options):
    code, _, err = invoke("push", os.devnull, *options)  # others would block, or never end
    assert code == 1
    assert err == "Error: /dev/null is not a plain file: save it as one, and push that\n"
    assert queue.count()["waiting"] == 0


def test_import_says_what_it_does(invoke, tmp_path, catalogue):
    site = tmp_path / "site"
    site.mkdir()
    Image.new("RGB", (9, 9)).save(site / "a.png")
    (site / "empty.jpg").touch()
    code, out, err = invoke("import", str(site), "--dry-run")
    assert code == 1
    assert "2 files: 1 new, 1 empty" in out
    code, out, err = invoke("import", f"file://{site}/", "--link")
    assert (code, out.splitlines()[-1][:24]) == (1, "1 images were imported; ")
    assert "1/1" in err
    for source, word in (
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "home" / "storage" / "original", "`sweep` takes in"),
        (tmp_path, "the storage root"),
    ):
        code, _, err = invoke("import", str(source))
        assert (code, word in err) == (2, True), err
    assert invoke("import", "s3://bucket/prefix", "--link")[0] == 2


def test_push_with_another_extension_replaces_the_original(invoke, tmp_path, catalogue, queue):
    originals = tmp_path / "home" / "storage" / "original"
    invoke("push", str(PHOTOS / "cat.jpg"), "--id", "tom")
    complete(catalogue, "tom", "a cat", tmp_path / "home")
    png = tmp_path / "drawing.png"
    Image.new("RGB", (9, 9)).save(png)
    assert invoke("push", str(png), "--id", "tom") == (0, "tom\n", "")
    assert [path.name for path in originals.iterdir()] == ["tom.png"]


def test_push_keeps_an_original_that_a_run_may_be_reading(invoke, tmp_path, catalogue, queue):
    originals = tmp_path / "home" / "storage" / "original"
    invoke("push", str(PHOTOS / "cat.jpg"), "--id", "tom")
    catalogue.accept([Upload("tom")])
    png = tmp_path / "drawing.png"
    Image.new("RGB", (9, 9)).save(png)
    code, out, err = invoke("push", str(png), "--id", "tom")
    assert (code, out) == (0, "tom\n")
    assert "original/tom.jpg is kept, as a run may be reading it" in err
    assert sorted(path.name for path in originals.iterdir()) == ["tom.jpg", "tom.png"]
    assert Upload.from_entry(list(queue.read(9))[-1]).path == "original/tom.png"


def test_push_wait_waits_for_the_run_that_reads_the_pushed_bytes(
    invoke, catalogue, queue, tmp_path, monkeypatch
):
    """Plays the sensor and two runs: the first began before the push, the second sees it."""
    catalogue.accept([Upload("tom")])
    steps = iter(["push is taken in", "the first run ends", "the second begins", "it ends"])
    state = {"claim": catalogue.claim("tom", 1, "run1"), "ended": []}

    def finish(claim):
        catalogue.save_original(
            claim, OriginalFacts("original/tom.jpg", 9, "0" * 64, 4, 3, "data:", "#000000")
        )
        for asset in ASSETS:
            catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
        state["ended"].append(claim.generation)
        catalogue.finish(claim)

    def step(_):
        name = next(steps)
        if name == "push is taken in":
            entries = queue.read(9)
            catalogue.accept([Upload.from_entry(entry) for entry in entries])
            queue.acknowledge(entries)
        elif name == "the second begins":
            state["claim"] = catalogue.claim("tom", 2, "run2")
        else:
            finish(state["claim"])

    monkeypatch.setattr("imagepipeline.commands.images.time.sleep", step)
    assert invoke("push", str(PHOTOS / "cat.jpg"), "--id", "tom", "--wait")[0] == 0
    assert state["ended"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["push", "no-such-file.jpg"], 2, "does not exist"),
        (["push"], 2, "Missing argument"),
        (["push", str(PHOTOS / "cat.jpg"), "--id", "../x"], 2, "not an image ID"),
        (["push", str(PHOTOS / "cat.jpg"), "--id", "foo bar"], 2, "not an image ID"),
        (["limit", "20"], 2, "10/minute"),
        (["limit", "20/minute", "--reset"], 2, "--reset"),
        (["prioritize", "nobody", "3"], 1, "no image 'nobody'"),
        (["failed", "list", "--reason", "corupt"], 2, "corrupt"),
        (["failed", "retry", "--reason", "corupt"], 2, "corrupt"),
        (["failed", "retry", "a", "--all"], 2, "not both"),
        (["failed", "show", "nobody"], 1, "nobody"),
        (["failed", "show", "dead-0123"], 1, "dead-0123"),
        (
            ["push", str(PHOTOS / "cat.jpg"), str(PHOTOS / "coffee.jpg"), "--id", "x"],
            2,
            "one image",
        ),
        (["push", str(PHOTOS / "cat.jpg"), "--priority", "5000"], 2, "5000"),
        (["status", "nobody"], 1, "nobody"),
        (["search", "  "], 2, "empty"),
        (["erase", "good", "../x"], 2, "not an image ID"),
        (["erase"], 2, "Missing argument"),
    ],
)
def test_wrong_usage_prints_one_line_and_has_an_exit_code(
    invoke, catalogue, queue, arguments, code, message
):
    got, out, err = invoke(*arguments)
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert queue.count()["waiting"] == 0


def test_a_malformed_setting_has_exit_code_3(invoke, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    code, _, err = invoke("status")
    assert (code, "OPENAI_BASE_URL" in err) == (3, True)


def test_a_stack_that_does_not_run_has_exit_code_4(invoke, monkeypatch):
    code, _, err = invoke("status")
    assert (code, "imagepipeline up" in err) == (4, True)
    monkeypatch.setenv("REDIS_URL", "redis://:canary@127.0.0.1:9")
    code, _, err = invoke("push", str(PHOTOS / "cat.jpg"))
    assert (code, "does not answer" in err, "canary" in err) == (4, True, False)


READERS = [
    *(
        ["status"],
        ["status", "a"],
        ["list"],
        ["prioritize", "a", "1"],
        ["sweep"],
        ["pause"],
        ["resume"],
        ["cancel", "a"],
        ["erase", "a"],
        ["costs"],
        ["search", "x"],
    ),
    *(
        ["failed", "list"],
        ["failed", "show", "a"],
        ["failed", "retry", "--all"],
        ["failed", "discard", "a"],
    ),
    ["push", str(PHOTOS / "cat.jpg"), "--wait"],
]


@pytest.mark.parametrize("arguments", READERS)
def test_a_command_in_the_wrong_folder_names_it_and_creates_nothing(invoke, tmp_path, arguments):
    for extra in ([], ["--json"]):
        code, out, err = invoke(*arguments, *extra)
        assert (code, out) == (4, "")
        assert str(tmp_path / "home") in err
        assert "IMAGEPIPELINE_HOME" in err
    assert list((tmp_path / "home").iterdir()) == []


def test_a_push_that_cannot_reach_redis_stores_no_original(
    invoke, catalogue, monkeypatch, tmp_path
):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9")
    for extra in ([], ["--wait"]):
        assert invoke("push", str(PHOTOS / "cat.jpg"), *extra)[0] == 4
    assert not (tmp_path / "home" / "storage").exists()


@pytest.mark.parametrize("arguments", READERS)
def test_an_invalid_catalogue_file_is_reported_in_one_line(invoke, tmp_path, arguments):
    (tmp_path / "home" / "catalogue.sqlite").write_bytes(b"no database" * 1000)
    code, out, err = invoke(*arguments)
    assert (code, out) == (4, "")
    assert "the catalogue does not answer" in err


PROGRAM = Path(sys.executable).parent / "imagepipeline"


@pytest.mark.stack
def test_a_command_ends_silently_when_its_reader_has_gone(invoke, catalogue):
    for number in range(50):
        fail(catalogue, f"image-{number}")
    for arguments in (
        ["failed", "list"],
        ["list", "--json"],
        ["status", "--watch"],
        ["status", "--watch", "--json"],
    ):
        command = [PROGRAM, *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(30) == 1


def test_a_command_works_with_closed_streams(invoke, catalogue, queue):
    script = 'exec <&- >&- 2>&-; "$0" push "$1" --id closed'
    assert (
        subprocess.run(["sh", "-c", script, PROGRAM, PHOTOS / "cat.jpg"], check=False).returncode
        == 0
    )
    assert queue.count()["waiting"] == 1


@pytest.mark.stack
def test_a_full_disk_is_reported_in_one_line(invoke, catalogue):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        for arguments in (["status"], ["status", "--json"], ["limit"]):
            result = subprocess.run(
                [PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
            assert result.returncode == 4
            assert result.stderr == "Error: No space left on device\n"


def test_down_without_a_stack_succeeds(invoke):
    assert invoke("down", "--json") == (0, '{"was_running": false}\n', "")


def test_status_counts_images_by_status(invoke, catalogue, queue):
    queue.enqueue("a")
    catalogue.claim_anew("b", "run")
    code, out, _ = invoke("status", "--json")
    assert code == 0
    assert json.loads(out) == {
        "waiting": 1,
        "pending": 0,
        "processing": 1,
        "completed": 0,
        "failed": 0,
        "dead": 0,
        "images_per_minute": 0,
        "minutes_left": None,
        "failures": {},
    }
    assert "processing" in invoke("status")[1]


def test_status_counts_dropped_unreadable_entries(invoke, catalogue, queue, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_DEAD", 2)
    for number in range(5):
        queue.dead_letter(b"?%d" % number, 1, "why")
    counts = json.loads(invoke("status", "--json")[1])
    assert (counts["dead"], counts["dropped"]) == (2, 3)
    assert invoke("failed", "discard", "--reason", "unreadable")[0] == 0
    assert "dropped" not in json.loads(invoke("status", "--json")[1])


def test_status_counts_the_catalogue_even_without_redis(invoke, catalogue, monkeypatch):
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:9")
    code, out, err = invoke("status", "--json")
    assert (code, json.loads(out)["waiting"], "does not answer" in err) == (0, None, True)


def test_status_of_one_image_shows_all_details(invoke, catalogue, tmp_path):
    complete(catalogue, "a", "A [bold]cat[/bold]", tmp_path / "home")
    row = json.loads(invoke("status", "a", "--json")[1])
    assert {
        "status",
        "generation",
        "attempts",
        "metadata",
        "variants",
        "error",
        "updated_at",
    } <= row.keys()
    assert row["status"] == "completed"
    assert row["updated_at"].endswith("+00:00")
    assert "[bold]" in invoke("status", "a")[1]  # printed literally, not as markup


def test_search_finds_by_meaning(invoke, catalogue, tmp_path):
    complete(catalogue, "pet", "A kitten asleep on a sofa", tmp_path / "home")
    complete(catalogue, "space", "A rocket lifts off at night", tmp_path / "home")
    rows = json.loads(invoke("search", "a cat", "-k", "2", "--json")[1])
    assert [row["image_id"] for row in rows] == ["pet", "space"]
    assert rows[0].keys() == {"image_id", "score", "description"}
    assert rows[0]["score"] > rows[1]["score"]
    assert "kitten" in invoke("search", "a cat")[1]


def test_search_finds_no_image_that_the_catalogue_does_not_know(invoke, catalogue, tmp_path):
    complete(catalogue, "pet", "A kitten asleep on a sofa", tmp_path / "home")
    index = EmbeddingIndex(str(tmp_path / "home" / "lancedb"))
    for name in ("erased", "also-erased"):
        index.upsert(Claim(name, 1, 1, None), LocalEmbedder().embed("a cat"))
    rows = json.loads(invoke("search", "a cat", "-k", "1", "--json")[1])
    assert [row["image_id"] for row in rows] == ["pet"]
    rows = json.loads(invoke("search", "a cat", "--json")[1])
    assert [row["image_id"] for row in rows] == ["pet"]


def test_search_in_an_empty_index_says_so(invoke, catalogue):
    assert "This model has not embedded any image yet." in invoke("search", "a cat")[1]
    assert invoke("search", "a cat", "--json")[1] == "[]\n"


def fail(catalogue, image_id, reason="provider_unavailable"):
    catalogue.fail(catalogue.claim_anew(image_id, "run"), reason, f"why {image_id} failed")


def outcomes(answer):
    return {row["id"]: row["outcome"] for row in json.loads(answer[1])}


def test_failures_and_unreadable_entries_are_listed_and_filtered_by_reason(
    invoke, catalogue, queue
):
    fail(catalogue, "a")
    fail(catalogue, "b", "corrupt")
    queue.redis.lpush(queue.wait_key, b"../x\x00")
    queue.dead_letter(*queue.read(1).popitem(), "no ID")
    rows = json.loads(invoke("failed", "list", "--json")[1])
    assert [(row["id"], row["reason"]) for row in rows[:2]] == [
        ("b", "corrupt"),
        ("a", "provider_unavailable"),
    ]
    assert rows[2]["reason"] == "unreadable"
    assert rows[2]["error"] == r"no ID: ../x\x00"
    assert [
        row["id"]
        for row in json.loads(invoke("failed", "list", "--reason", "corrupt", "--json")[1])
    ] == ["b"]
    assert "corrupt" in invoke("failed", "list")[1]
    assert (
        json.loads(invoke("failed", "show", "a", "--json")[1])["history"][-1]["event"] == "failed"
    )


def test_a_retry_begins_a_new_generation_but_a_dry_run_does_not(invoke, catalogue):
    fail(catalogue, "a")
    fail(catalogue, "b", "limits")
    assert outcomes(invoke("failed", "retry", "--reason", "limits", "--dry-run", "--json")) == {
        "b": "would retry"
    }
    assert catalogue.count()["failed"] == 2
    assert outcomes(invoke("failed", "retry", "--reason", "limits", "--json")) == {"b": "retried"}
    assert (catalogue.get("b")["status"], catalogue.get("b")["generation"]) == ("pending", 2)
    assert catalogue.get("a")["status"] == "failed"


def test_failed_images_of_the_bulk_lane_can_be_retried(invoke, catalogue):
    catalogue.accept_imported([Upload("imported")])
    catalogue.fail(catalogue.claim_next("run"), "provider_unavailable", "it was down")
    answer = invoke("failed", "retry", "imported", "--json")
    assert outcomes(answer) == {"imported": "retried"}
    assert [one.image_id for one in catalogue.list_pending(9)] == ["imported"]


def test_failures_that_a_retry_cannot_help_are_left_alone(invoke, catalogue):
    for reason, can_be_retried in list_reasons().items():
        fail(catalogue, reason, reason)
        assert reason in catalogue.get(reason)["reason"]
        answer = invoke("failed", "retry", reason, "--json")
        [outcome] = outcomes(answer).values()
        assert (answer[0], outcome == "retried") == (0 if can_be_retried else 1, can_be_retried), (
            outcome
        )
        assert can_be_retried or f"left alone: {reason}" in outcome
    assert {reason for reason, can_be_retried in list_reasons().items() if not can_be_retried} == {
        *("corrupt", "empty", "invalid_id", "path_taken", "truncated", "unsupported"),
    }


@pytest.mark.stack
def test_all_includes_every_failure_however_many_there_are(invoke, catalogue, tmp_path):
    ids = [f"i{number:04}" for number in range(1010)]
    catalogue.accept([Upload(image_id) for image_id in ids])
    with catalogue._database.transaction() as connection:  # all at the same moment
        connection.exec_driver_sql(
            "UPDATE images SET status = 'failed', reason = 'provider_unavailable'"
        )
    rows = list(
        FailedImages(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}").iterate(page_rows=7)
    )
    assert sorted(row["id"] for row in rows) == ids
    code, out, err = invoke("failed", "list", "--json")
    assert (code, len(json.loads(out)), "only the newest 1000" in err) == (0, 1000, True)
    assert outcomes(invoke("failed", "retry", "--all", "--json")) == dict.fromkeys(ids, "retried")
    assert catalogue.count()["pending"] == 1010


def test_retries_are_counted_and_capped(invoke, catalogue):
    for _ in range(5):
        fail(catalogue, "a")
        assert outcomes(invoke("failed", "retry", "a", "--json")) == {"a": "retried"}
    fail(catalogue, "a")
    answer = invoke("failed", "retry", "--all", "--json")
    assert answer[0] == 1
    assert outcomes(answer) == {"a": "left alone: retried 5 times within a day"}
    assert catalogue.get("a")["status"] == "failed"


def test_a_dead_letter_can_be_retried_or_discarded(invoke, catalogue, queue):
    for entry in (b"'odd\xff\"", b"x" * 2000):
        queue.redis.lpush(queue.wait_key, entry)
        queue.dead_letter(*queue.read(1).popitem(), "why")
    long, short = (row["id"] for row in json.loads(invoke("failed", "list", "--json")[1]))
    answer = invoke("failed", "retry", "--all", "--json")
    assert outcomes(answer)[short] == "retried"
    assert "too long" in outcomes(answer)[long]
    assert queue.read(9) == {b"'odd\xff\"": 1}
    invoke("failed", "discard", long)
    assert queue.count()["dead"] == 0


def test_a_discarded_failure_is_listed_again_only_after_a_new_failure(invoke, catalogue):
    fail(catalogue, "a")
    assert outcomes(invoke("failed", "discard", "a", "--json")) == {"a": "discarded"}
    assert json.loads(invoke("failed", "list", "--json")[1]) == []
    assert catalogue.get("a")["status"] == "failed"
    fail(catalogue, "a")
    assert len(json.loads(invoke("failed", "list", "--json")[1])) == 1


@pytest.mark.parametrize("arguments", [["retry"], ["discard", "--dry-run"]])
def test_acting_without_a_selection_is_wrong_usage(invoke, catalogue, arguments):
    assert invoke("failed", *arguments)[0] == 2


def test_an_unknown_failure_is_named(invoke, catalogue):
    code, _, err = invoke("failed", "retry", "nobody")
    assert (code, "nobody" in err) == (1, True)


def test_finished_images_leave_the_list_after_a_while_but_are_kept(
    invoke, catalogue, tmp_path, monkeypatch
):
    complete(catalogue, "done", "A cat", tmp_path / "home")
    fail(catalogue, "lost")
    listed = json.loads(invoke("list", "--json")[1])
    assert [(row["id"], row["status"]) for row in listed] == [
        ("done", "completed"),
        ("lost", "failed"),
    ]
    monkeypatch.setenv("IMAGEPIPELINE_LIST_COMPLETED_HOURS", "1e-9")
    assert [row["id"] for row in json.loads(invoke("list", "--json")[1])] == ["lost"]
    assert len(json.loads(invoke("list", "--all", "--json")[1])) == 2


def test_what_waits_runs_and_has_ended_is_listed_by_status(invoke, catalogue, queue):
    def ids(status, *options):
        shown = invoke("list", "--status", status, "--json", *options)[1]
        return [row["id"] for row in json.loads(shown)]

    catalogue.accept([Upload("first"), Upload("second"), Upload("soon", priority=5)])
    catalogue.claim_anew("busy", "run")
    catalogue.fail(catalogue.claim_anew("bad", "run"), "corrupt", "why")
    for number in range(3):
        queue.enqueue(f"new{number}")
    queue.redis.lpush(queue.wait_key, b"../x")
    queue.dead_letter(b"?", 1, "not an ID")
    assert ids("waiting") == ["new0", "new1", "new2", None]
    assert ids("waiting", "--limit", "2") == ["new0", "new1"]
    assert ids("pending") == ["soon", "first", "second"]
    assert ids("processing") == ["busy"]
    assert ids("failed") == ["bad"]
    assert ids("completed") == []
    assert len(ids("dead")) == 1
    assert "not an image ID" in invoke("list", "--status", "waiting")[1]
    assert queue.count() == {"waiting": 4, "dead": 1}
    assert invoke("list", "--status", "failed", "--all")[0] == 2


def test_priorities_can_be_changed_while_an_image_waits(invoke, catalogue):
    catalogue.accept([Upload("a"), Upload("b")])
    assert invoke("prioritize", "b", "7")[0] == 0
    assert [image.image_id for image in catalogue.list_pending(9)] == ["b", "a"]
    catalogue.claim("b", 1, "run")
    assert invoke("prioritize", "b", "8")[0] == 1


def test_a_sweep_enqueues_lost_originals_and_deletes_leftovers(invoke, catalogue, queue, tmp_path):
    storage = tmp_path / "home" / "storage"
    (storage / "original" / "deep").mkdir(parents=True)
    (storage / "variants").mkdir()
    old = time.time() - 7200
    for name in (
        "original/lost.jpg",
        "original/known.jpg",
        "original/taken.png",
        "original/b d.jpg",
        "original/x",
    ):
        (storage / name).write_bytes(b"x")
        os.utime(storage / name, (old, old))
    (storage / "original" / "new.jpg").write_bytes(b"x")  # may still be being written
    (storage / "variants" / ".a.webp.0.tmp").write_bytes(b"x")
    os.utime(storage / "variants" / ".a.webp.0.tmp", (old, old))
    (storage / "variants" / ".b.webp.0.tmp").write_bytes(b"x")
    catalogue.accept([Upload("known"), Upload("other", "original/taken.png")])
    expected = {"enqueued": ["lost"], "deleted": [str(storage / "variants" / ".a.webp.0.tmp")]}

    assert json.loads(invoke("sweep", "--dry-run", "--json")[1]) == expected | {"dry_run": True}
    assert queue.count()["waiting"] == 0
    assert json.loads(invoke("sweep", "--json")[1]) == expected | {"dry_run": False}
    assert [Upload.from_entry(entry) for entry in queue.read(9)] == [
        Upload("lost", "original/lost.jpg")
    ]
    assert sorted(path.name for path in (storage / "variants").iterdir()) == [".b.webp.0.tmp"]


def test_a_sweep_enqueues_originals_that_were_replaced_after_the_last_push(
    invoke, catalogue, queue, tmp_path
):
    folder = tmp_path / "home" / "storage" / "original"
    folder.mkdir(parents=True)
    names = ("same", "longer", "later", "copied", "by_path", "elsewhere")
    catalogue.accept([Upload(name) for name in names[:-1]])
    catalogue.accept([Upload("elsewhere", "original/2026/a.jpg")])
    for name in names:
        path = "original/2026/b.jpg" if name == "by_path" else f"original/{name}.jpg"
        sha256 = hashlib.sha256(b"x").hexdigest() if name == "copied" else "a" * 64
        facts = OriginalFacts(path, 1, sha256, 8, 8, "data:", "#000000")
        catalogue.save_original(catalogue.claim(name, 1, "run"), facts)
        (folder / f"{name}.jpg").write_bytes(b"xx" if name == "longer" else b"x")
        at = time.time() + (-7200 if name in ("same", "longer") else -100)
        os.utime(folder / f"{name}.jpg", (at, at))
    with sa.create_engine(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}").begin() as writer:
        at = datetime.now(UTC) - timedelta(hours=1)
        writer.execute(sa.update(images).values(accepted_at=at, status="completed"))
    assert json.loads(invoke("sweep", "--json")[1])["enqueued"] == ["by_path", "later", "longer"]
    catalogue.accept([Upload.from_entry(entry) for entry in queue.read(9)])
    assert json.loads(invoke("sweep", "--json")[1])["enqueued"] == []


@pytest.fixture
def ledger(catalogue, tmp_path):
    with closing(Ledger(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}")) as ledger:
        yield ledger


def test_costs_are_summed_by_model_stage_and_day(invoke, ledger):
    ledger.record(
        PaidCall("a", 1, "metadata", "openai", "m", "answered", 800, 60, 0.0123456789, 1.0, 0.0)
    )
    [row] = json.loads(invoke("costs", "--json")[1])
    assert row == {
        "model": "m",
        "calls": 1,
        "answered": 1,
        "tokens_in": 800,
        "tokens_out": 60,
        "cost_usd": 0.012346,
        "unpriced": 0,
    }
    assert json.loads(invoke("costs", "--by", "day", "--since", "2999-01-01", "--json")[1]) == []
    assert "0.012346" in invoke("costs", "--by", "stage")[1]


def test_the_rate_limit_can_be_shown_changed_and_reset(invoke):
    assert invoke("limit") == (0, "10/minute\n", "")
    assert json.loads(invoke("limit", "metadata=20/minute", "--json")[1]) == {
        "rate_limit": "metadata=20/minute"
    }
    assert invoke("limit")[1] == "metadata=20/minute\n"
    code, _, err = invoke("limit", "fast")
    assert (code, "10/minute" in err) == (2, True)
    assert invoke("limit", "--reset")[1] == "10/minute\n"


def test_a_pause_is_shown_in_the_status_until_resume_ends_it(invoke, ledger):
    ledger.pause("auth", "the vision model answered 401", None)
    assert (
        json.loads(invoke("status", "--json")[1])["paused"] == "auth: the vision model answered 401"
    )
    assert "would resume (auth)" in invoke("resume", "--dry-run")[1]
    assert "resumed (auth)" in invoke("resume")[1]
    assert "paused" not in json.loads(invoke("status", "--json")[1])
    assert invoke("resume")[1] == "nothing is paused\n"


def test_images_are_cancelled_wherever_they_are(invoke, catalogue, queue):
    catalogue.accept([Upload("pending"), Upload("busy"), Upload("other")])
    claim = catalogue.claim("busy", 1, "run")
    catalogue.accept([Upload("busy")])  # cancelling covers this push, too
    fail(catalogue, "ended")
    for priority in range(30):  # more than are read at once
        queue.enqueue("waiting", priority=priority)
    queue.enqueue("stays")
    named = ("waiting", "pending", "busy", "ended", "nobody", "../x")

    def outcomes(*options):
        code, out, _ = invoke("cancel", *named, *options, "--json")
        assert code == 1
        return [row["outcome"] for row in json.loads(out)]

    assert outcomes("--dry-run")[:3] == [
        "would cancel (waiting)",
        "would cancel (pending)",
        "would cancel (processing)",
    ]
    assert queue.count()["waiting"] == 31
    assert outcomes("--reason", "wrong folder") == [
        "cancelled (waiting)",
        "cancelled (pending)",
        "cancelled (processing)",
        "left alone: it is failed already",
        "left alone: no such image waits or runs",
        "left alone: '../x' is not an image ID: 1 to 64 letters, digits, '-' or '_', the first a "
        "letter or digit",
    ]
    for image_id in named[:3]:
        row = catalogue.get(image_id)
        assert (row["status"], row["reason"], row["error"]) == (
            "failed",
            "cancelled",
            "a person cancelled it: wrong folder",
        )
    assert list(queue.read(99)) == [b"stays"]
    with pytest.raises(StaleClaimError):
        catalogue.beat(claim)
    assert catalogue.get_states(["other"])["other"].status == "pending"
    assert invoke("failed", "retry", "busy")[0] == 0
    assert catalogue.get_states(["busy"])["busy"].generation == 2


def test_a_person_can_pause_all_work_and_resume_it(invoke, ledger):
    ledger.pause("auth", "the vision model answered 401", None)
    assert "would be paused" in invoke("pause", "--dry-run")[1]
    assert ledger.find_full_pause() is None
    assert invoke("pause", "--reason", "moving the disk")[0] == 0
    paused = json.loads(invoke("status", "--json")[1])["paused"]
    assert paused.startswith("all work, by a person at ")
    assert paused.endswith(": moving the disk")
    assert [pause.reason for pause in ledger.list_pauses()] == ["auth"]  # runs go on
    assert json.loads(invoke("pause", "--json")[1])["was_paused"]
    assert [pause["reason"] for pause in json.loads(invoke("resume", "--json")[1])["pauses"]] == [
        "person",
        "auth",
    ]
    assert ledger.find_full_pause() is None


@pytest.mark.stack
def test_the_doctor_reports_problems_and_has_exit_code_1(invoke, catalogue, monkeypatch, tmp_path):
    (tmp_path / "home" / "storage").mkdir()
    code, out, _ = invoke("doctor")
    assert code == 1, out  # because no stack is running
    assert "✓ redis" in out
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("IMAGEPIPELINE_RATE_LIMIT", "off")
    code, out, _ = invoke("doctor", "--json")
    findings = [json.loads(line) for line in out.splitlines()]
    ill = [finding["name"] for finding in findings if not finding["is_well"]]
    assert (code, ill) == (
        1,
        [
            *("supervisor", "code server", "workers", "daemon", "sensors", "webserver"),
            "vision model",
        ],
    )


EVIL = (
    "\x1b]0;title\x07\x1b[2J\x9b31m\u202egpj\u2066\u200b\u2028\x7f\rforged [red]x[/red] :smile: \\"
)


@pytest.fixture
def hostile(catalogue, queue, tmp_path):
    """A catalogue with a good row, and rows that only other users of the database could make."""
    for image_id in ("bad", "json", "good"):
        fail(catalogue, image_id, "unexpected")
    with catalogue._database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE images SET error = ?, requested_path = ?, priority = 5000 WHERE id = 'bad'",
            (EVIL, EVIL),
        )
        connection.exec_driver_sql(
            "UPDATE images SET metadata = '{', flaw = ? WHERE id = 'json'", (EVIL,)
        )
        connection.exec_driver_sql(
            "UPDATE image_history SET detail = ? WHERE image_id = 'bad'", (EVIL,)
        )
    Ledger(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}").pause("auth", "x", 60)
    with catalogue._database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pauses SET message = ?", (EVIL,))
    letter = {"id": f"dead-{EVIL}", "entry": EVIL, "raw": None, "reason": EVIL}
    queue.redis.lpush(queue.dead_key, json.dumps(letter | {"copies": 1, "at": 0}))


SHOWN = [
    ("list", "--all"),
    ("failed", "list"),
    ("failed", "show", "bad"),
    ("status",),
    ("status", "bad"),
    ("status", "json"),
    ("status", EVIL),
    ("failed", "retry", "--all"),
    ("failed", "retry", EVIL),
    ("failed", "discard", "--all", "--dry-run"),
    ("resume", "--dry-run"),
    ("push", EVIL),
    ("limit", EVIL),
    ("prioritize", EVIL, "1"),
    ("status", "half \udcff"),
    ("failed", "show", "half \udcff"),
    ("prioritize", "half \udcff", "1"),
    ("limit", "half \udcff"),
    ("push", "half \udcff"),
]


@pytest.mark.parametrize("command", SHOWN, ids=lambda command: ascii("-".join(command))[1:24])
@pytest.mark.parametrize("is_json", [False, True])
def test_hostile_texts_do_not_affect_the_terminal_or_hide_other_output(
    invoke, hostile, command, is_json
):
    _, out, err = invoke(*command, *(["--json"] if is_json else []))
    for line in (out + err).split("\n"):
        assert line.isprintable(), ascii(line)
    assert "Traceback" not in err
    if command in (("list", "--all"), ("failed", "list"), ("failed", "retry", "--all")):
        assert "good" in out
    if is_json and command == ("failed", "show", "bad"):
        assert json.loads(out)["error"] == EVIL
    elif command == ("failed", "list") and not is_json:
        assert "[red]x[/red]" in "".join(out.split()).replace("│", "")


def test_an_invalid_row_is_left_alone_and_the_others_are_retried(invoke, hostile):
    outcome = outcomes(invoke("failed", "retry", "--reason", "unexpected", "--json"))
    assert outcome.pop("bad").startswith("left alone: ")
    assert outcome == {"good": "retried", "json": "retried"}


def test_a_sweep_skips_files_whose_names_are_invalid(invoke, catalogue, queue, tmp_path):
    folder = tmp_path / "home" / "storage" / "original"
    folder.mkdir(parents=True)
    for name in (b"good.jpg", b"odd.\xff", b"colored.\x1b[31m", b"\xff.jpg"):
        path = os.fsencode(folder) + b"/" + name
        with open(path, "wb"):
            os.utime(path, (0, 0))
    code, out, err = invoke("sweep")
    assert (code, out.splitlines()[0]) == (0, "good")
    assert err.count("is not the path of an original") == 2
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert [Upload.from_entry(entry).image_id for entry in queue.read(9)] == ["good"]


def test_a_photo_with_an_undecodable_name_can_be_pushed(invoke, catalogue, queue, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.jpg"
    with open(path, "wb") as photo:
        photo.write(b"x")
    code, out, err = invoke("push", os.fsdecode(path))
    assert (code, err) == (0, "")
    assert out.isascii()
    assert json.loads(invoke("push", os.fsdecode(path), "--json")[1])[0]["photo"] == os.fsdecode(
        path
    )


def test_events_are_shown_followed_and_sent_again(invoke, catalogue, tmp_path, monkeypatch):
    complete(catalogue, "a", "A cat sleeps.", tmp_path / "home")
    catalogue.fail(catalogue.claim_anew("b", "run"), "corrupt", "It cannot\x1b[31m be read.")
    code, out, err = invoke("events")
    assert (code, err) == (0, "")
    completed, failed = out.splitlines()
    assert "image.completed       a  generation 1  A cat sleeps." in completed
    assert "image.failed          b  generation 1  corrupt: It cannot [31m be read." in failed
    [line] = invoke("events", "--since", "1", "--json")[1].splitlines()
    assert json.loads(line)["event"]["imageId"] == "b"
    assert json.loads(line)["seq"] == 2
    assert "image.failed" not in invoke("events", "a")[1]

    # A follower also sees what was committed late, with a number below the last one.
    log = EventLog(f"sqlite:///{tmp_path / 'home' / 'catalogue.sqlite'}")
    following = follow_events(log, None, 2, {2})
    assert next(following).seq == 1
    catalogue.fail(catalogue.claim_anew("c", "run"), "corrupt", "x")
    assert next(following).image_id == "c"

    assert invoke("events", "--resend")[0] == 2
    assert invoke("events", "--dead", "a")[0] == 2
    code, _, err = invoke("events", "a", "--resend")
    assert (code, "no webhook for events is set" in err) == (1, True)
    log.open_webhook()
    assert log.list_owed(9) == []
    assert (
        invoke("events", "b", "--resend", "--dry-run")[2] == "Note: 1 events would be sent again\n"
    )
    assert log.list_owed(9) == []
    assert invoke("events", "b", "--resend")[2] == "Note: 1 events are sent again\n"
    assert [event.image_id for event in log.list_owed(9)] == ["b"]
    log.note_webhook_failure("the webhook answered 500")
    assert "the webhook has failed 1 times" in invoke("events", "--dead")[2]

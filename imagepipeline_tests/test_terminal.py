"""What people see: in terminals of 80 columns, without colour, and through pipes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagepipeline import display, overview
from imagepipeline.models import (
    ASSETS,
    ImageMetadata,
    OriginalFacts,
    Recipe,
    Upload,
    Variant,
    VariantSpec,
)
from imagepipeline.stores.applies import ApplyProgress
from imagepipeline.stores.catalogue import Catalogue
from imagepipeline_tests.conftest import PHOTOS

PROGRAM = Path(sys.executable).parent / "imagepipeline"
COLOR = re.compile(r"\x1b\[[349]\d")
LONG_ERROR = "the JPEG ends after 1,234 of 5,678 bytes: the upload was cut off, so send it again"


@pytest.fixture
def home(monkeypatch, tmp_path, redis_url, queue):
    monkeypatch.setenv("IMAGEPIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REDIS_URL", redis_url)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def catalogue(home, create_catalogue):
    with closing(Catalogue(create_catalogue(home / "catalogue.sqlite"))) as catalogue:
        yield catalogue


def show(*arguments, columns=80, **environment):
    """Runs a command in a terminal of that width; returns what it shows, as lines.

    Without colour, bold and dim are left out, too.
    """
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm-256color"} | os.environ | environment,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(terminal, 65_536):
                shown += part
        except OSError:  # the last process of the terminal has closed it
            pass
        os.close(terminal)
    assert process.returncode == 0, shown
    text = shown.decode()
    return (re.sub(r"\x1b\[[0-2]?m", "", text) if "NO_COLOR" in environment else text).splitlines()


def finish(catalogue, claim):
    """Plays the run of an image."""
    catalogue.save_original(
        claim,
        OriginalFacts(
            f"original/{claim.image_id}.jpg", 100_000, "0" * 64, 2000, 1500, "data:", "#000000"
        ),
    )
    metadata = ImageMetadata(
        description="Looks like cat (91% sure), most likely tiger cat: a landscape picture.",
        tags=["tiger cat", "cat"],
        category="cat",
        dominant_colors=["#aabbcc"],
        mood="warm",
    )
    catalogue.save_metadata(claim, metadata, Recipe("local", "m"), "0" * 64)
    variants = [
        Variant(VariantSpec(suffix, width, form, 80), width, width * 3 // 4, b"x" * size)
        for suffix, width, form, size in (
            ("sm", 640, "webp", 10_000),
            ("lg", 1920, "webp", 40_000),
            ("lg", 1920, "avif", 25_000),
        )
    ]
    path = f"original/{claim.image_id}.jpg"
    catalogue.save_variants(claim, [(one.spec.path_for(path), one) for one in variants])
    for asset in ASSETS:
        catalogue.record_result(claim, asset, Recipe("local", "m"), "0" * 64)
    catalogue.finish(claim)


def play_stack(catalogue, queue, count):
    """Plays the sensor and the runs of as many uploads."""
    while count:
        queue.wait(4)
        entries = queue.read(9)
        uploads = [Upload.from_entry(entry) for entry in entries]
        catalogue.accept(uploads)
        queue.acknowledge(entries)
        for upload in uploads:
            finish(catalogue, catalogue.claim(upload.image_id, 1, "run"))
            count -= 1


def test_push_shows_its_progress_and_the_saving_in_a_terminal(catalogue, queue):
    stack = threading.Thread(target=play_stack, args=(catalogue, queue, 2))
    stack.start()
    lines = show(
        "push", str(PHOTOS / "cat.jpg"), str(PHOTOS / "coffee.jpg"), "--wait", NO_COLOR="1"
    )
    stack.join()
    assert any("2/2" in line for line in lines)
    row = next(line for line in lines if line.startswith("cat-07c5a883  "))
    assert row.split()[1:6] == ["100", "kB", "25", "kB", "AVIF"]
    assert "75%" in row
    assert "2 of 2 completed" in lines[-1]


def test_the_status_of_an_image_is_a_dozen_lines(catalogue):
    finish(catalogue, catalogue.claim_anew("tom", "run"))
    lines = show("status", "tom", NO_COLOR="1")
    assert len(lines) <= 14  # one is long
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for expected in (
        "completed",
        "100 kB",
        "most likely tiger cat",
        "25 kB AVIF (75% saved)",
        "#aabbcc",
    ):
        assert expected in text
    assert not COLOR.search(text)
    assert "\x1b[32m" in "\n".join(show("status", "tom", columns=120))
    assert "original_sha256" in "\n".join(show("status", "tom", "--verbose"))


def test_a_failed_image_says_why_and_what_to_do(catalogue):
    for image_id, reason in (("bad", "truncated"), ("odd", "unexpected")):
        catalogue.fail(catalogue.claim_anew(image_id, "run"), reason, LONG_ERROR)
    lines = "\n".join(show("status", "bad", NO_COLOR="1"))
    assert "truncated" in lines
    assert "push a better file" in lines
    assert "imagepipeline failed retry odd" in "\n".join(show("status", "odd", NO_COLOR="1"))


def test_tables_keep_ids_whole_at_80_columns_and_rows_whole_in_a_pipe(catalogue):
    image_id = "holiday-in-norway-370adb9c"
    catalogue.fail(catalogue.claim_anew(image_id, "run"), "truncated", LONG_ERROR)
    for command in (("list",), ("failed", "list")):
        lines = show(*command, TERM="dumb")
        assert all(len(line) <= 80 for line in lines)
        assert any(image_id in line for line in lines)
        assert not COLOR.search("".join(lines))
        piped = subprocess.run([PROGRAM, *command], capture_output=True, text=True, check=True)
        [row] = [line for line in piped.stdout.splitlines() if image_id in line]
        assert LONG_ERROR in row


def test_what_an_encoding_lacks_does_not_stop_a_command(catalogue, home):
    (home / "storage").mkdir(exist_ok=True)
    result = subprocess.run(
        [PROGRAM, "doctor"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert "? redis            it answers" in result.stdout


def test_the_status_tells_throughput_time_left_and_failures_by_reason(sqlite_catalogue_url):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    moment = {"now": datetime.now(UTC) - timedelta(minutes=5)}
    with closing(Catalogue(sqlite_catalogue_url, lambda: moment["now"])) as catalogue:
        finish(catalogue, catalogue.claim_anew("old", "run"))
        moment["now"] = datetime.now(UTC)
        finish(catalogue, catalogue.claim_anew("new", "run"))
        for image_id, reason in (("a", "missing"), ("b", "corrupt"), ("c", "corrupt")):
            catalogue.fail(catalogue.claim_anew(image_id, "run"), reason, "why")
        catalogue.accept([Upload(f"image{number}") for number in range(9)])
        counts = {"waiting": 3, **catalogue.count(), "dead": 0}
        progress = overview.measure_progress(catalogue, counts)
    assert progress == {
        "images_per_minute": 4,
        "minutes_left": 3.0,
        "failures": {"corrupt": 2, "missing": 1},
    }
    lines = overview.describe_stack(counts | progress)
    assert lines["failed"] == "3 (corrupt 2, missing 1)"
    assert lines["time left"] == "about 3 minutes"
    assert overview.describe_age(now - timedelta(hours=30), now) == "1 d ago"
    assert [overview.count_bytes(size) for size in (999, 95_230, 999_600)] == [
        "999 B",
        "95.2 kB",
        "1 MB",
    ]


def test_who_waits_for_an_apply_that_stands_still_is_told_once_where_to_look(monkeypatch, capsys):
    now_seconds = [0.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now_seconds[0]))

    def stand_still(completed):
        for _ in range(5):
            yield ApplyProgress(9, completed, 0, 0.0)
            now_seconds[0] += display.STILL_SECONDS / 2

    def count_notes():
        return capsys.readouterr().err.count(display.STILL_NOTE)

    list(display.follow_apply([ApplyProgress(9, one, 0, 0.0) for one in range(9)], total=9))
    assert count_notes() == 0
    list(display.follow_apply(stand_still(completed=0), total=9))
    assert count_notes() == 1
    moving = (step for completed in (1, 2, 3) for step in stand_still(completed))
    list(display.follow_apply(moving, total=9))
    assert count_notes() == 3

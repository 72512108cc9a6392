"""Runs the kill matrix with each crash point once, and a batch of five.

Both signals on SQLite; on Postgres SIGKILL alone, because a signal does not reach the database.
"""

import json
import subprocess
import sys

import pytest

from imagepipeline_tests.end_to_end.test_crashes import ROOT

pytestmark = pytest.mark.drills


@pytest.mark.parametrize(
    ("options", "trials"),
    [([], 18), (["--postgres", "--signals", "SIGKILL"], 9)],
    ids=["sqlite", "postgres"],
)
def test_a_tick_killed_anywhere_loses_and_duplicates_nothing(options, trials):
    command = [
        sys.executable,
        "-m",
        "imagepipeline_tests.end_to_end.tick_crashes",
        "--batches",
        "5",
        "--json",
    ]
    result = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    totals = json.loads(result.stdout)
    assert (totals["trials"], totals["was_killed"]) == (trials, trials)
    assert totals["lost"] == totals["double"] == totals["left"] == 0

"""Runs the kill matrix with each crash point once, and a batch of five.

SIGTERM on SQLite and SIGKILL on Postgres; `tick_crashes` has all combinations.
"""

import json
import subprocess
import sys

import pytest

from imagepipeline_tests.end_to_end.composed import ROOT

pytestmark = pytest.mark.drills


@pytest.mark.parametrize(
    "options", [["--signals", "SIGTERM"], ["--postgres", "--signals", "SIGKILL"]], ids=" ".join
)
def test_a_tick_killed_anywhere_loses_and_duplicates_nothing(options):
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
    assert (totals["trials"], totals["was_killed"]) == (9, 9)
    assert totals["lost"] == totals["double"] == totals["left"] == 0

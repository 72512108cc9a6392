"""A short run of the fuzzer; the long one is a command (fuzz.py). What it found is in odd_files.py."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.stack


def test_every_bent_file_ends_within_bounds_and_nothing_dies():
    command = [
        sys.executable,
        "-m",
        "imagepipeline_tests.imaging.fuzz",
        "--cases",
        "300",
        "--seed",
        "2026",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300 files" in result.stdout
    for outcome in ("completed", "corrupt", "truncated"):
        assert outcome in result.stdout

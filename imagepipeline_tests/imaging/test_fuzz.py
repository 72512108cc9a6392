"""Runs the fuzzer briefly; fuzz.py is the command for long runs, odd_files.py has what it found."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.stack


def test_fuzzed_files_end_within_limits_and_crash_nothing():
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

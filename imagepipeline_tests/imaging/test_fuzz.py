"""A short run of the fuzzer; the long one is a command (fuzz.py). What it found is in odd_files.py."""

from imagepipeline_tests.imaging.fuzz import fuzz


def test_every_bent_file_ends_and_nothing_dies():
    results = [result for _, result, _ in fuzz(case_count=300, seed=2026)]
    outcomes = {result.outcome for result in results}
    assert outcomes <= {"completed", "corrupt", "truncated", "limits", "unsupported", "empty"}
    assert {"completed", "corrupt", "truncated"} <= outcomes
    assert max(result.peak_bytes for result in results) < 512_000_000

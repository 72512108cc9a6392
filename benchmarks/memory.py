"""Measures the memory of a stack: fresh, after some and after many images, and during an upload.

Also measures the same project in `dagster dev`.

python -m benchmarks.memory PHOTOS [--images 30 300]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.stack import (
    describe_machine,
    list_tree,
    read_pss_bytes,
    run_provider,
    run_stack,
    wait_for,
)
from benchmarks.throughput import collect

REST_SECONDS = 20  # until used children have been replaced


def measure(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Returns the memory in MB by process, with shared pages counted once (PSS).

    `after` has it at rest after so many images in all.
    """
    machine, done, after, at_once = describe_machine(), 0, {}, {}
    with run_provider(1, 0) as provider, run_stack(provider) as stack:
        fresh = stack.measure_memory_bytes()
        for count in counts:
            photos = sorted(collect(folder, count - done).iterdir())
            stack.wait(stack.push(photos), seconds=1800)
            at_once[count] = _show(stack.measure_memory_bytes())
            time.sleep(REST_SECONDS)
            after[count], done = stack.measure_memory_bytes(), count
        idle_bytes = sum(stack.measure_memory_bytes().values())
        pushed = stack.push(photos[:1])
        peak_bytes, deadline = 0, time.monotonic() + 4
        while time.monotonic() < deadline:
            peak_bytes = max(peak_bytes, sum(stack.measure_memory_bytes().values()))
        stack.wait(pushed)
    return {
        "machine": machine,
        "fresh_mb": _show(fresh),
        "at_once_mb": at_once,
        "after_mb": {count: _show(used) for count, used in after.items()},
        "one_upload_mb": (peak_bytes - idle_bytes) // 1_000_000,
        "dagster_dev_mb": measure_dagster_dev() // 1_000_000,
    }


def _show(used: dict[str, int]) -> dict[str, int]:
    return {name: one // 1_000_000 for name, one in {"all": sum(used.values()), **used}.items()}


def measure_dagster_dev() -> int:
    """Returns the bytes of `dagster dev` with the same definitions, 20 s after its UI answers."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "DAGSTER_HOME": home, "IMAGEPIPELINE_HOME": home}
        command = [
            sys.executable,
            "-m",
            "dagster",
            "dev",
            "-m",
            "imagepipeline.definitions",
            "-p",
            "3777",
        ]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_for("http://127.0.0.1:3777/server_info", 120)
            time.sleep(20)
            return sum(read_pss_bytes(pid) for pid in list_tree(process.pid))
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[30, 300])
    options = parser.parse_args()
    print(json.dumps(measure(options.photos, options.images), indent=2))

"""Measures the memory of the idle stack, of one upload, and of the same project in `dagster dev`.

python -m benchmarks.memory PHOTOS
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.stack import (
    describe_machine,
    list_tree,
    name_process,
    read_pss_bytes,
    run_provider,
    run_stack,
    wait_for,
)
from benchmarks.throughput import collect


def measure(folder: Path) -> dict[str, Any]:
    """Returns the memory in bytes, with shared pages counted once."""
    machine, photos = describe_machine(), collect(folder, 5)
    with run_provider(1, 0) as provider, run_stack(provider) as stack:
        fresh = stack.measure_memory_bytes()
        stack.wait(stack.push(sorted(photos.iterdir())))
        time.sleep(3)
        idle = stack.measure_memory_bytes()
        by_process: dict[str, int] = {}
        for pid in list_tree(stack.pid):
            by_process[name_process(pid)] = by_process.get(name_process(pid), 0) + read_pss_bytes(
                pid
            )
        pushed = stack.push([sorted(photos.iterdir())[0]])
        peak, deadline = 0, time.monotonic() + 4
        while time.monotonic() < deadline:
            peak = max(peak, stack.measure_memory_bytes())
        stack.wait(pushed)
    return {
        "machine": machine,
        "fresh_bytes": fresh,
        "idle_bytes": idle,
        "idle_bytes_by_process": by_process,
        "one_upload_bytes": peak - idle,
        "dagster_dev_idle_bytes": measure_dagster_dev(),
    }


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
    print(json.dumps(measure(parser.parse_args().photos), indent=2))

"""Measures the time from push to completion of single photos on an idle stack.

The provider answers at once.

python -m benchmarks.latency PHOTOS [--count 30]
"""

import argparse
import json
import statistics
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.stack import describe_machine, run_provider, run_stack
from benchmarks.throughput import collect


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Returns the seconds from push to completion: median, 95th percentile, and all values."""
    machine, photos = describe_machine(), collect(folder, 20)
    seconds = []
    with run_provider(0, 0) as provider, run_stack(provider) as stack:
        for photo in islice(cycle(sorted(photos.iterdir())), count):
            seconds.append(max(stack.wait(stack.push([photo])).values()))
            time.sleep(1.3)  # so that pushes arrive at different points of the daemon's loops
    ordered = sorted(seconds)
    return {
        "machine": machine,
        "p50_seconds": statistics.median(ordered),
        "p95_seconds": ordered[max(0, round(0.95 * count) - 1)],
        "seconds": [round(value, 2) for value in seconds],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=30)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.photos, arguments.count), indent=2))

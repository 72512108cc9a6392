"""Measures and plots how long each stage of one upload takes.

python -m benchmarks.breakdown PHOTOS PICTURE.png; needs the package matplotlib.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.stack import Stack, describe_machine, run_provider, run_stack
from benchmarks.throughput import CHAT_SECONDS, EMBED_SECONDS, collect

STAGES = (
    ("taken in by the sensor", "pushed", "accepted"),
    ("run requested", "accepted", "PIPELINE_ENQUEUED"),
    ("waits in the queue", "PIPELINE_ENQUEUED", "PIPELINE_STARTING"),
    ("taken by a worker", "PIPELINE_STARTING", "PIPELINE_START"),
    ("Dagster prepares the run", "PIPELINE_START", "STEP_START metadata"),
    ("metadata: decode, ask the model", "STEP_START metadata", "STEP_SUCCESS metadata"),
    ("variants: store what was made meanwhile", "STEP_SUCCESS metadata", "STEP_SUCCESS variants"),
    ("embedding: ask, store", "STEP_SUCCESS variants", "STEP_SUCCESS embedding"),
    ("Dagster ends the run", "STEP_SUCCESS embedding", "PIPELINE_SUCCESS"),
)


def measure(folder: Path) -> dict[str, Any]:
    """Returns the seconds per stage of the third of three uploads on an idle stack."""
    machine, photos = describe_machine(), sorted(collect(folder, 3).iterdir())
    with run_provider(CHAT_SECONDS, EMBED_SECONDS) as provider, run_stack(provider) as stack:
        for photo in photos:
            image_id = stack.push([photo])[0]
            stack.wait([image_id])
        times = read_times(stack, image_id)
    return {
        "machine": machine,
        "seconds": {name: round(times[end] - times[start], 3) for name, start, end in STAGES},
    }


def read_times(stack: Stack, image_id: str) -> dict[str, float]:
    """Returns the times, in Unix seconds, of the image's events in the catalogue and in Dagster."""
    import dagster as dg

    from imagepipeline.stores.catalogue import Catalogue

    history = Catalogue(stack.settings.database_url).get(image_id)["history"]
    times = {
        "pushed": int(image_id.rpartition("-")[2]) / 1e9,
        "accepted": history[0]["at"].timestamp(),
    }
    with dg.DagsterInstance.from_config(str(stack.settings.home / "dagster")) as instance:
        run = instance.get_runs(dg.RunsFilter(tags={"dagster/partition": image_id}))[0]
        for entry in instance.all_logs(run.run_id):
            if entry.dagster_event:
                name = f"{entry.dagster_event.event_type_value} {entry.step_key or ''}".strip()
                times.setdefault(name, entry.timestamp)
    return times


def draw(seconds: dict[str, float], picture: Path) -> None:
    """Plots the stages as a waterfall chart: each bar begins where the one above ends."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    start = 0.0
    for row, (name, length) in enumerate(seconds.items()):
        axes.barh(row, length, left=start, color="#2e6fb0" if "ask" in name else "#8fb8de")
        axes.text(start + length + 0.03, row, f"{length:.2f} s", va="center", fontsize=8)
        start += length
    axes.set_yticks(range(len(seconds)), list(seconds), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, start * 1.12)
    axes.set_xlabel(
        "seconds since the push; "
        f"the provider takes {CHAT_SECONDS:g} s and {EMBED_SECONDS:g} s of them"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    os.umask(0o022)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.photos)
    draw(figures["seconds"], arguments.picture)
    print(json.dumps(figures, indent=2))

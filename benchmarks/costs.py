"""Plots where the CPU time of an image goes, from what `benchmarks.throughput` has printed.

python -m benchmarks.costs PICTURE.svg LABEL=RESULTS.json [...]; needs the package matplotlib.
"""

import argparse
import json
import statistics
from pathlib import Path

CODEC, DECODERS, OTHERS = "decode, scale, encode, check", "decoders' processes", "others"
SHOWN = {
    CODEC: "#2e6fb0",
    DECODERS: "#8fb8de",
    "runs": "#c05020",
    "daemon": "#e0a030",
    "code server": "#f0d080",
    "resident": "#7a9a50",
    OTHERS: "#bbbbbb",
}


def summarize(results: Path) -> dict[str, float]:
    """Returns CPU seconds an image by process, the medians of all bursts of uploads."""
    bursts = [
        burst
        for of_runs in json.loads(results.read_text())["ours_by_runs"].values()
        for burst in of_runs
    ]
    processes = {name for burst in bursts for name in burst["cpu_seconds_by_process"]}
    used = {
        name: statistics.median(burst["cpu_seconds_by_process"].get(name, 0) for burst in bursts)
        for name in processes
    }
    codec = statistics.median(burst["codec_cpu_seconds"] for burst in bursts)
    used |= {CODEC: codec, DECODERS: used.pop("decoders") - codec}
    summary = {name: used.pop(name, 0.0) for name in SHOWN}
    return summary | {OTHERS: sum(used.values())}


def draw(rows: dict[str, dict[str, float]], picture: Path) -> None:
    """Plots a stacked bar for each set of results."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.6 * len(rows)), layout="constrained")
    starts = [0.0] * len(rows)
    for name, color in SHOWN.items():
        lengths = [row[name] for row in rows.values()]
        axes.barh(range(len(rows)), lengths, left=starts, color=color, label=name)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for number, total in enumerate(starts):
        axes.text(total + 0.02, number, f"{total:.2f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(starts) * 1.1)
    axes.set_xlabel("CPU seconds an image")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(SHOWN), fontsize=8, frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", nargs="+", metavar="LABEL=RESULTS.json")
    arguments = parser.parse_args()
    named = dict(result.split("=", 1) for result in arguments.results)
    draw({label: summarize(Path(path)) for label, path in named.items()}, arguments.picture)

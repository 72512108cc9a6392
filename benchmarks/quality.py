"""Compares our encoders with sharp's on the same pixels: SSIMULACRA2 score, bytes and CPU time.

Compares them at the same quality setting, and at settings that give the same score.

python -m benchmarks.quality PHOTOS [--count 6] [--frontier] [--picture PICTURE.svg]; needs the
packages pyvips[binary] and ssimulacra2, and matplotlib for the picture.
"""

import argparse
import functools
import io
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyvips
import ssimulacra2
from PIL import Image

from benchmarks.stack import FOLDER, describe_machine
from imagepipeline.output_formats import OUTPUT_FORMATS

WIDTHS_PX = (640, 1024)
QUALITIES = range(76, 88)
TOLERANCE = 0.3  # difference in SSIMULACRA2 points up to which scores count as equal
FRONTIER = {
    "avif": {
        "speed 8": {"speed": 8, "subsampling": "4:4:4"},
        "speed 9": {"speed": 9, "subsampling": "4:4:4"},
        "speed 9, 4:2:0": {"speed": 9, "subsampling": "4:2:0"},
        "speed 9, no trellis": {
            "speed": 9,
            "subsampling": "4:4:4",
            "advanced": {"disable-trellis-quant": "1"},
        },
        "speed 9, even quantiser": {
            "speed": 9,
            "subsampling": "4:4:4",
            "advanced": {"deltaq-mode": "0"},
        },
        "speed 9, tune psnr": {"speed": 9, "subsampling": "4:4:4", "advanced": {"tune": "psnr"}},
    },
    "webp": {f"method {method}": {"method": method} for method in (1, 2, 3, 4)},
}


def prepare(folder: Path, count: int, target: Path) -> list[Path]:
    """Writes PNGs of photos that need no rotation, scaled by libvips, which sharp uses, too."""
    photos = [
        path for path in sorted(folder.glob("*.jpg")) if Image.open(path).getexif().get(274, 1) == 1
    ]
    made = []
    for photo in photos[:: max(1, len(photos) // count)][:count]:
        full = pyvips.Image.new_from_file(str(photo))
        for width_px in WIDTHS_PX:
            scaled = full.resize(min(1, width_px / full.width), kernel="lanczos3")
            made.append(target / f"{photo.stem}-{width_px}.png")
            scaled.write_to_file(str(made[-1]), compression=0, strip=True)
    return made


def encode_with_sharp(pngs: list[Path], effort: int) -> dict[str, dict[str, Any]]:
    """Returns the mean score, total bytes and CPU seconds, by format."""
    with tempfile.TemporaryDirectory() as out:
        command = ["node", "encode.mjs", out, str(effort), *map(str, pngs)]
        done = subprocess.run(
            command, cwd=FOLDER / "peer", capture_output=True, text=True, check=True
        )
        seconds = json.loads(done.stdout)
        return {
            name: summarize(
                pngs, [Path(out, f"{png.stem}.{name}").read_bytes() for png in pngs], seconds[name]
            )
            for name in ("avif", "webp")
        }


def encode_with_pillow(
    pngs: list[Path], name: str, quality: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Returns the mean score, total bytes and CPU seconds."""
    contents, seconds = [], 0.0
    for png in pngs:
        image = Image.open(png).convert("RGB")
        image.load()
        buffer, started = io.BytesIO(), time.process_time()
        image.save(
            buffer,
            name,
            quality=quality,
            **({"max_threads": 1} if name == "avif" else {}),
            **options,
        )
        seconds += time.process_time() - started
        contents.append(buffer.getvalue())
    return summarize(pngs, contents, seconds)


def summarize(pngs: list[Path], contents: list[bytes], seconds: float) -> dict[str, Any]:
    """Returns the mean SSIMULACRA2 score against the PNGs, total bytes and CPU seconds."""
    scores = list(_start_scorers().map(score, pngs, contents))
    return {
        "score": statistics.mean(scores),
        "bytes": sum(map(len, contents)),
        "cpu_seconds": seconds,
    }


@functools.cache
def _start_scorers() -> ProcessPoolExecutor:
    # Spawned: libvips has threads by now, and in forked processes it would wait for them for ever.
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def score(png: Path, content: bytes) -> float:
    """Returns the SSIMULACRA2 score of an encoded picture against its PNG; 100 is the same."""
    with tempfile.NamedTemporaryFile(suffix=".png") as decoded:
        pyvips.Image.new_from_buffer(content, "").write_to_file(decoded.name, compression=0)
        return float(ssimulacra2.compute_ssimulacra2(str(png), decoded.name))


def match(pngs: list[Path], name: str, options: dict[str, Any], wanted: float) -> dict[str, Any]:
    """Finds the lowest quality setting that reaches a score, by bisection."""

    @functools.cache
    def encode(quality: int) -> dict[str, Any]:
        return encode_with_pillow(pngs, name, quality, options)

    low, high = QUALITIES.start, QUALITIES.stop - 1
    while low < high:
        middle = (low + high) // 2
        reached = encode(middle)["score"] >= wanted - TOLERANCE
        low, high = (low, middle) if reached else (middle + 1, high)
    return {"quality": low} | encode(low)


def measure(folder: Path, count: int, has_frontier: bool) -> dict[str, Any]:
    """Measures our encoders, at quality 80 and at the quality that matches sharp's at effort 0.

    All ratios are relative to sharp at effort 0. With `has_frontier`, also measures other encoder
    options.
    """
    result: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder_of_pngs:
        pngs = prepare(folder, count, Path(folder_of_pngs))
        tuned, as_written = encode_with_sharp(pngs, 0), encode_with_sharp(pngs, 4)
        for name in ("avif", "webp"):
            options = {
                key: value
                for key, value in OUTPUT_FORMATS[name].encoder_options.items()
                if key != "max_threads"
            }
            rows = {
                "sharp, effort 0": tuned[name],
                "sharp, effort 4": as_written[name],
                "ours at 80": encode_with_pillow(pngs, name, 80, options),
                "ours, matched": match(pngs, name, options, tuned[name]["score"]),
            }
            if has_frontier:
                for label, tried in FRONTIER[name].items():
                    rows[f"{label}, matched"] = match(pngs, name, tried, tuned[name]["score"])
            for row in rows.values():
                row["bytes_ratio"] = row["bytes"] / tuned[name]["bytes"]
                row["cpu_ratio"] = row["cpu_seconds"] / tuned[name]["cpu_seconds"]
            result[name] = rows
    return result


def draw(result: dict[str, Any], picture: Path) -> None:
    """Plots bytes over CPU time at matched quality; below and to the left is better."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, plot in zip(("avif", "webp"), plots, strict=True):
        for number, (label, row) in enumerate(result[name].items()):
            if label == "ours at 80":  # not at matched quality
                continue
            is_ours = label == "ours, matched"
            plot.plot(
                row["cpu_ratio"],
                row["bytes_ratio"],
                "*" if is_ours else "osD^vPX"[number % 7],
                color=f"C{number}",
                markersize=12 if is_ours else 8,
                zorder=3 if is_ours else 2,
                label=label,
            )
        plot.legend(fontsize=8, frameon=False)
        plot.set(
            title=name.upper(),
            xscale="log",
            xlabel="CPU time (sharp at effort 0 = 1)",
            ylabel="bytes (sharp at effort 0 = 1)",
        )
        plot.margins(0.15)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--frontier", action="store_true")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    measured = measure(arguments.photos, arguments.count, arguments.frontier)
    if arguments.picture:
        draw(measured, arguments.picture)
    print(json.dumps(measured, indent=2))

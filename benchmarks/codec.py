"""Measures the CPU time of decoding, scaling, encoding and inspecting photos, in one process.

python -m benchmarks.codec PHOTOS [--count 10] [--picture PICTURE.svg]; --picture needs matplotlib.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.stack import describe_machine
from imagepipeline.imaging import variants
from imagepipeline.imaging.decoding import Rules, decode
from imagepipeline.imaging.inspection import choose_compared, inspect
from imagepipeline.imaging.preparation import prepare
from imagepipeline.models import build_variant_specs

CODECS = ("decode", "scale", "encode webp", "encode avif")  # what the reference worker does, too
OURS = ("facts, small copies", "inspect", "inspect all")


def measure(photos: list[Path], avif_quality: int) -> dict[str, float]:
    """Returns the mean CPU milliseconds per photo and stage."""
    seconds: Counter[str] = Counter()

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        result = call(*arguments)
        seconds[name] += time.process_time() - started
        return result

    specs = build_variant_specs(80, avif_quality)
    encode, scale = variants._encode, variants._scale_to_width
    vars(variants)["_encode"] = lambda frames, spec, options: timed(
        f"encode {spec.format}", encode, frames, spec, options
    )
    vars(variants)["_scale_to_width"] = lambda image, width_px: timed(
        "scale", scale, image, width_px
    )
    for number, photo in enumerate([photos[0], *photos]):
        if number == 1:
            seconds.clear()  # the first one warms up
        decoded = timed("decode", decode, photo.read_bytes(), Rules())
        timed("facts, small copies", prepare, decoded, 1024)
        contents = [variant.content for variant in variants.render(decoded, specs)]
        timed("inspect", inspect, decoded, contents, choose_compared(specs))
        timed("inspect all", inspect, decoded, contents)
    return {name: 1000 * seconds[name] / len(photos) for name in (*CODECS, *OURS)}


def draw(milliseconds: dict[str, float], picture: Path) -> None:
    """Plots the stages as one bar."""
    import matplotlib

    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.8), layout="constrained")
    start = 0.0
    for name, length in milliseconds.items():
        axes.barh(0, length, left=start, label=f"{name} {length:.0f} ms")
        start += length
    axes.set_yticks([])
    axes.set_xlabel("CPU milliseconds per photo")
    axes.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.8))
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    os.umask(0o022)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--avif-quality", type=int, default=83)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = sorted(
        path for path in arguments.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
    )
    chosen = found[:: max(1, len(found) // arguments.count)][: arguments.count]
    figures = measure(chosen, arguments.avif_quality)
    if arguments.picture:
        draw({name: figures[name] for name in figures if name != "inspect all"}, arguments.picture)
    print(json.dumps({"machine": describe_machine(), "milliseconds": figures}, indent=2))

"""Compares a burst of photos with the reference worker.

Measures images per minute, the time to the first result, and CPU time by process.

python -m benchmarks.throughput PHOTOS [--count 60] [--rounds 3] [--runs 5 10]
    [--peer-concurrency 5 20] [--bulk] [--as-written]
python -m benchmarks.throughput PHOTOS --runs --peer-concurrency --workers 1 2

With `--workers`, it compares one worker with several on this machine, which share the same slots.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from PIL import Image, JpegImagePlugin

from benchmarks.machines import run_machines
from benchmarks.stack import Stack, describe_machine, run_peer, run_provider, run_stack

CHAT_SECONDS, EMBED_SECONDS = 2.0, 0.3
# At this quality, our AVIF matches sharp's at quality 80, effort 0 (benchmarks/quality.py). WebP
# matches at 80.
MATCHED = {"IMAGEPIPELINE_AVIF_QUALITY": "83"}
SLOTS = 6  # of all workers together
FLIPS = (None, *Image.Transpose)


def measure_burst(stack: Stack, photos: list[Path], is_bulk: bool = False) -> dict[str, Any]:
    """Measures one burst, of uploads or in the bulk lane; CPU seconds are per image."""
    before = stack.measure_cpu_seconds()
    ended = stack.wait(stack.push(photos, is_bulk))
    after = stack.measure_cpu_seconds()
    count, wall_seconds = len(photos), max(ended.values())
    cpu = {name: (seconds - before.get(name, 0)) / count for name, seconds in after.items()}
    codec = read_codec_seconds(stack, count)
    return {
        "images_per_minute": 60 * count / wall_seconds,
        "first_seconds": min(ended.values()),
        "cpu_seconds": sum(cpu.values()),
        "codec_cpu_seconds": codec,
        "other_cpu_seconds": sum(cpu.values()) - codec,
        "cpu_seconds_by_process": {
            name: round(seconds, 3) for name, seconds in sorted(cpu.items())
        },
    }


def read_codec_seconds(stack: Stack, count: int) -> float:
    """Returns the CPU seconds per image spent in the sandbox, as recorded by the runs.

    The sandbox decodes, scales, encodes and checks images.

    Raises:
        RuntimeError: A run did not record them for one of the images.
    """
    database_url = stack.settings.dagster_database_url
    path = stack.settings.home / "dagster" / "storage" / "event_log.db"
    url = database_url.get_secret_value() if database_url else f"sqlite:///{path}"
    query = (
        "SELECT event FROM event_logs WHERE dagster_event_type = 'ASSET_MATERIALIZATION' AND "
        """asset_key IN ('["metadata"]', '["variants"]') ORDER BY id DESC LIMIT :count"""
    )
    with sa.create_engine(url).connect() as connection:
        rows = connection.execute(sa.text(query), {"count": 2 * count}).fetchall()
    seconds = list[float]()
    for (event,) in rows:
        entries = json.loads(event)["dagster_event"]["event_specific_data"]["materialization"][
            "metadata_entries"
        ]
        seconds += [
            entry["entry_data"]["value"] for entry in entries if entry["label"] == "cpu_seconds"
        ]
    if len(seconds) != 2 * count:
        raise RuntimeError(f"only {len(seconds)} of {2 * count} results have their CPU seconds")
    return sum(seconds) / count


def collect(folder: Path, count: int) -> Path:
    """Returns a new folder with `count` photos of a folder, repeated as needed, each time flipped.

    Up to eight pictures for each photo are all different: a run would take over the answer to the
    same question.
    """
    photos = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    target = Path(tempfile.mkdtemp())
    for number, photo in enumerate(islice(cycle(photos), count)):
        copy = target / f"{number:03d}-{photo.stem}.jpg"
        flip = FLIPS[number // len(photos) % len(FLIPS)]
        if flip is None:
            shutil.copy(photo, copy)
        else:
            _flip(photo, copy, flip)
    return target


def _flip(photo: Path, copy: Path, how: Image.Transpose) -> None:
    """Writes a flipped copy of a JPEG, compressed like the original."""
    with Image.open(photo) as opened:
        opened.transpose(how).save(
            copy,
            "JPEG",
            qtables=cast(JpegImagePlugin.JpegImageFile, opened).quantization,
            subsampling=JpegImagePlugin.get_sampling(opened),
            progressive=bool(opened.info.get("progressive")),
            exif=opened.info.get("exif", b""),
            icc_profile=opened.info.get("icc_profile"),
        )


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Alternates between the reference worker, at each concurrency, and our stack."""
    machine, photos = describe_machine(), collect(folder, options.count)
    peer: dict[int, list[Any]] = {concurrency: [] for concurrency in options.peer_concurrency}
    ours: dict[int, list[Any]] = {runs: [] for runs in options.runs}
    by_workers: dict[int, list[Any]] = {workers: [] for workers in options.workers}
    as_written, bulk = None, list[dict[str, Any]]()
    with run_provider(CHAT_SECONDS, EMBED_SECONDS) as provider:
        url = provider["OPENAI_BASE_URL"]
        for _ in range(options.rounds):
            for concurrency, bursts in peer.items():
                bursts.append(run_peer(photos, options.count, 0, url, concurrency))
            for runs, bursts in ours.items():
                changes = {"IMAGEPIPELINE_MAX_RUNS": str(runs)}
                with run_stack(provider | MATCHED | changes) as stack:
                    bursts.append(measure_burst(stack, sorted(photos.iterdir())))
            for workers, bursts in by_workers.items():
                with run_machines(provider | MATCHED | share_slots(workers), workers) as stack:
                    bursts.append(measure_burst(stack, sorted(photos.iterdir())))
            if options.bulk:
                with run_stack(provider | MATCHED) as stack:
                    bulk.append(measure_burst(stack, sorted(photos.iterdir()), is_bulk=True))
        if options.as_written:
            as_written = run_peer(photos, options.count, 4, url)
    shutil.rmtree(photos)
    return {
        "machine": machine,
        "images": options.count,
        "ours_by_runs": ours,
        "ours_by_workers": by_workers,
        "bulk": bulk,
        "peer_by_concurrency": peer,
        "peer_as_written": as_written,
        "images_per_minute": {
            "ours": {runs: _median(bursts) for runs, bursts in ours.items()},
            "workers": {workers: _median(bursts) for workers, bursts in by_workers.items()},
            "peer": {concurrency: _median(bursts) for concurrency, bursts in peer.items()},
        },
    }


def share_slots(workers: int, slots: int = SLOTS) -> dict[str, str]:
    """Returns the settings of workers that together execute `slots` runs at a time."""
    return {
        "IMAGEPIPELINE_MAX_RUNS": str(slots),
        "IMAGEPIPELINE_WORKER_SLOTS": str(slots // workers),
    }


def _median(bursts: list[dict[str, Any]]) -> float:
    return statistics.median(burst["images_per_minute"] for burst in bursts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, nargs="*", default=[5])
    parser.add_argument("--peer-concurrency", type=int, nargs="*", default=[5, 20])
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="on simulated machines")
    parser.add_argument("--bulk", action="store_true", help="also measure the bulk lane")
    parser.add_argument("--as-written", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.photos, arguments), indent=2))

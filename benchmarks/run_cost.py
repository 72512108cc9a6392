"""What a run itself takes: CPU of forked runs one after the other, without their sandboxes and waits.

python -m benchmarks.run_cost PHOTO [--count 8] [--profile FILE]

Each forked process does two uploads: what the second saves, a better rehearsal (runtime/rehearsal.py) could save at
most. With --profile, the first run of the last process is profiled, for `python -m pstats FILE`.
"""

import argparse
import cProfile
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.stack import describe_machine, run_provider
from imagepipeline.models import Upload
from imagepipeline.runtime import processes, services, valkey
from imagepipeline.runtime.code_server import keep_resident, prepare_context
from imagepipeline.settings import Settings
from imagepipeline.storage import open_storage
from imagepipeline.stores.catalogue import Catalogue


def measure(photo: Path, count: int, profile: Path | None) -> dict[str, Any]:
    """Milliseconds of CPU of first and second runs, and their page faults; means over `count` processes."""
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as home, run_provider(0.2, 0.1) as provider:
        os.environ.update(provider | {"IMAGEPIPELINE_HOME": home, "IMAGEPIPELINE_RATE_LIMIT": "off"})
        settings = Settings.load()
        services.migrate(settings)
        os.environ.update(services.prepare(settings))
        server = valkey.start_server(Path(home, "valkey"), settings.socket_folder / "valkey.sock", Path(home, "log"))
        settings.publish_resident_socket()
        context = prepare_context()
        ended = threading.Event()
        threading.Thread(target=keep_resident, args=(settings, ended), daemon=True).start()
        while not services.answers_socket(Path(settings.resident_address)):
            time.sleep(0.05)
        image_ids = store_uploads(settings, photo, 2 * count)
        results: Any = context.Queue()  # type: ignore[attr-defined]
        runs = []
        for number in range(count):
            pair = image_ids[2 * number : 2 * number + 2]
            target = str(profile) if profile and number == count - 1 else None
            process = context.Process(target=do_uploads, args=(home, pair, target, results))  # type: ignore[attr-defined]
            process.start()
            runs.append(results.get(timeout=60))
            process.join()
        ended.set()
        for child in multiprocessing.active_children():
            child.kill()
        processes.stop(server, patience_seconds=10)
    if profile:  # it slows its run down
        del runs[-1]
    return {"machine": machine, "first": average([run[0] for run in runs]), "second": average([run[1] for run in runs])}


def average(runs: list[dict[str, float]]) -> dict[str, int]:
    """The mean of each figure."""
    return {name: round(statistics.mean(run[name] for run in runs)) for name in runs[0]}


def store_uploads(settings: Settings, photo: Path, count: int) -> list[str]:
    """Originals with their rows in the catalogue, pending; gives their IDs."""
    image_ids = [f"photo-{number}" for number in range(count)]
    files = open_storage(settings.storage)
    for image_id in image_ids:
        files.put_original(image_id, photo.read_bytes(), photo.suffix[1:])
    with closing(Catalogue(settings.database_url)) as catalogue:
        catalogue.accept([Upload(image_id) for image_id in image_ids])
    return image_ids


def do_uploads(home: str, image_ids: list[str], profile: str | None, results: Any) -> None:
    """In a forked process: one run after the other, as Dagster's server does them."""
    import dagster as dg
    from dagster._core.code_pointer import ModuleCodePointer
    from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
    from dagster._grpc.impl import core_execute_run

    import imagepipeline.definitions
    from imagepipeline.defs.failures import GENERATION_TAG

    pointer = ModuleCodePointer("imagepipeline.definitions", "defs", None)
    job = ReconstructableJob(ReconstructableRepository(pointer), "process_upload")
    taken = []
    for image_id in image_ids:
        with dg.DagsterInstance.from_config(str(Path(home, "dagster"))) as instance:
            instance.add_dynamic_partitions("uploads", [image_id])
            definition = imagepipeline.definitions.defs.resolve_job_def("process_upload")
            run = instance.create_run_for_job(definition, tags={GENERATION_TAG: "1", "dagster/partition": image_id})
            before = resource.getrusage(resource.RUSAGE_SELF)
            with cProfile.Profile() if profile and not taken else open(os.devnull) as profiler:
                for _ in core_execute_run(job, run, instance, inject_env_vars=False):
                    pass
            after = resource.getrusage(resource.RUSAGE_SELF)
            if isinstance(profiler, cProfile.Profile):
                profiler.dump_stats(profile or "")
            if instance.get_run_by_id(run.run_id).status != dg.DagsterRunStatus.SUCCESS:
                raise RuntimeError(f"the run of {image_id} failed")
        cpu_ms = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        taken.append({"cpu_ms": cpu_ms, "page_faults": after.ru_minflt - before.ru_minflt})
    results.put(taken)


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.photo, arguments.count, arguments.profile), indent=2))

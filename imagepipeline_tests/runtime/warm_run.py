"""One upload `cat` in a process forked as the code server forks its runs: FOLDER [PRELOAD]; prints JSON.

`status`, the `modules` that the run still had to import, and whether it `is_shared`: the zygote its decoder came from.
With the name of another preload: `error`.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from imagepipeline.runtime import code_server
from imagepipeline.runtime.code_server import WarmStartError, prepare_context


def process_cat(folder: str, results: "multiprocessing.Queue[dict[str, object]]") -> None:
    """Runs the upload job and puts what is printed."""
    before = set(sys.modules)

    import dagster as dg

    import imagepipeline.definitions
    from imagepipeline.defs.failures import GENERATION_TAG
    from imagepipeline.imaging.sandbox import DECODERS

    with dg.DagsterInstance.from_config(folder) as instance:
        instance.add_dynamic_partitions("uploads", ["cat"])
        job = imagepipeline.definitions.defs.get_job_def("process_upload")
        result = job.execute_in_process(instance=instance, partition_key="cat", tags={GENERATION_TAG: "1"})
    status = "completed" if result.success else "failed"
    is_shared = DECODERS.descriptor is not None and DECODERS._starter != os.getpid()
    results.put({"status": status, "modules": sorted(set(sys.modules) - before), "is_shared": is_shared})


def main() -> None:
    """Prepares the context and runs the upload in it."""
    if len(sys.argv) > 2:
        code_server.PRELOAD = sys.argv[2]
    try:
        context = prepare_context()
    except WarmStartError as error:
        print(json.dumps({"error": str(error)}))
        return
    results = context.Queue()
    run = context.Process(target=process_cat, args=(str(Path(sys.argv[1], "dagster")), results))
    run.start()
    print(json.dumps(results.get(timeout=60)))
    run.join()


if __name__ == "__main__":
    main()

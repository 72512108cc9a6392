"""What every run needs, imported and built once by the code server, from which the process is forked that runs are.

Children get a copy of all there is, so there must be no thread, connection, model or open file here; but for the
socket on which they ask one zygote for children that decode. pyarrow,
LanceDB and onnxruntime start threads when they are imported, and are left to `imagepipeline.resident`.
"""

import gc
import importlib
import os
from pathlib import Path

import imagepipeline.definitions
from imagepipeline.imaging.sandbox import DECODERS
from imagepipeline.runtime.rehearsal import rehearse

# What a run imports late, and the rehearsal does not; a test compares it with a run.
MODULES = (
    "dagster._core.utility_ops",
    "dagster._core.workspace.autodiscovery",
    "dagster._grpc.impl",
    "dagster._utils.test.definitions",
    "dagster_postgres",
    "encodings.idna",
    "multiprocessing.popen_forkserver",
    "multiprocessing.queues",
    "psycopg2",
)

for module in MODULES:
    importlib.import_module(module)
# Runs look the definitions up in their module, and find them made.
made = imagepipeline.definitions.defs()
made.get_repository_def().load_all_definitions()
vars(imagepipeline.definitions)["defs"] = made
DECODERS.prepare()
rehearse()

PRELOADED_BY = os.getpid()
THREADS = len(list(Path("/proc/self/task").iterdir()))
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, all of it
gc.set_threshold(50_000)  # a run ends after seconds: what it leaves in cycles is small


def explain_unfitness() -> str | None:
    """Called in a child: why runs cannot be forked from here, or None if they can."""
    if os.getpid() == PRELOADED_BY:
        return "the preload was not imported before the fork"
    if THREADS > 1:
        return f"the preload left {THREADS - 1} threads behind"
    return None

"""Imports what all services need, once, in the forkserver, so that they share the memory."""

import gc
import importlib

for module in (
    *("dagster._cli", "dagster._daemon.cli", "dagster_webserver.app", "dagster_webserver.cli"),
    *(
        "dagster._grpc.client",
        "dagster._grpc.server",
        "dagster_postgres",
    ),
    *("fsspec", "grpc_health.v1.health_pb2_grpc", "upath", "uvicorn", "websockets"),
    *("imagepipeline.cli", "imagepipeline.definitions"),
    *("imagepipeline.runtime.launcher", "imagepipeline.instance.sqlite_storage"),
):
    importlib.import_module(module)
gc.collect()
gc.freeze()  # otherwise garbage collection in a child would copy the shared memory pages

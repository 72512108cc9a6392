"""Dagster's own code server, which evaluates the sensors, once the catalogue is known to be this Dagster's.

    python -m imagepipeline.runtime.code_server --socket PATH -m imagepipeline.definitions

Takes the arguments of `dagster api grpc`.
"""

import runpy
import sys

from imagepipeline.runtime.migration import bind_catalogue
from imagepipeline.settings import Settings


def main() -> None:
    """Serves until it is stopped."""
    bind_catalogue(Settings.load())
    sys.argv = ["dagster", "api", "grpc", *sys.argv[1:]]
    runpy.run_module("dagster", run_name="__main__")


if __name__ == "__main__":
    main()

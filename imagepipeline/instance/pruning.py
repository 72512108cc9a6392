"""Prunes what is old, as the prune sensor does, at once.

    python -m imagepipeline.instance.pruning [--dry-run]

Prints one line of JSON: what was pruned, or would be. This is a separate process so that the
command line need not import Dagster.
"""

import json
import sys
from dataclasses import asdict

import dagster as dg

from imagepipeline.definitions import build_pruner
from imagepipeline.errors import ImagePipelineError
from imagepipeline.settings import Settings


def main() -> None:
    """Prunes by the settings.

    Raises:
        SystemExit: not all could be pruned.
    """
    pruner = build_pruner(Settings.load())
    with dg.DagsterInstance.get() as instance:
        try:
            act = pruner.plan if "--dry-run" in sys.argv else pruner.prune
            pruned = act(instance)
        except ImagePipelineError as error:
            sys.exit(str(error))
    print(json.dumps(asdict(pruned)))


if __name__ == "__main__":
    main()

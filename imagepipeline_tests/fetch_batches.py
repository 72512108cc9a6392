"""Fetches what is planned in batches, in processes that can be killed; waits for nothing.

For each pair of lines on stdin it starts a process: it prints the process's ID, lets it begin at
the second line, and prints its exit code. The processes are forked, so nothing is imported again.
"""

import os
import sys

from imagepipeline import batch_calls
from imagepipeline.providers import build_recipes
from imagepipeline.settings import Settings
from imagepipeline.stores.catalogue import Catalogue


def fetch() -> None:
    batch_calls.POLL_SECONDS = 0
    settings = Settings.load()
    with batch_calls.open_batch_calls(settings, Catalogue(settings.database_url)) as calls:
        *_, _last = calls.fetch(build_recipes(settings))


if __name__ == "__main__":
    import imagepipeline.services.openai_client  # noqa: F401, before the first fork

    for _ in sys.stdin:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.read(reader, 1)
            fetch()
            os._exit(0)
        print(pid, flush=True)
        sys.stdin.readline()
        os.write(writer, b"!")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

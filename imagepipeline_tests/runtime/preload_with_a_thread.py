"""A preload that is not fit to be forked."""

import threading
import time

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

from imagepipeline.runtime.preload import explain_unfitness  # noqa: E402, F401

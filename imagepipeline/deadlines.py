"""A deadline for a whole network exchange.

A socket's timeout starts again with every byte received, so a slow peer can stretch an exchange
without limit.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def call_within(
    seconds: float, work: Callable[[], T], on_timeout: Callable[[], object] = lambda: None
) -> T:
    """Runs `work` in a separate thread and returns its result, if it ends in time.

    A late thread is abandoned. It ends with its process at the latest; `on_timeout` may make it end
    sooner.

    Raises:
        TimeoutError: `work` did not end within `seconds`.
        BaseException: Whatever `work` raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="call with a deadline", daemon=True).start()
    wait([result], seconds)
    if not result.done():
        on_timeout()
        raise TimeoutError(f"not done within {seconds:g} s")
    return result.result()

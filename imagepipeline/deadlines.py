"""A deadline for a whole conversation: timeouts of sockets begin anew with every byte, and a peer may send just one."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def call_within(
    seconds: float, work: Callable[[], T], give_up: Callable[[], object] = lambda: None
) -> T:
    """What `work` gives or raises, if it ends in time. It runs in a thread of its own.

    A thread that is late is left behind, and dies with its process at the latest; `give_up` may have it end sooner.

    Raises:
        TimeoutError: it did not end in time.
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
        give_up()
        raise TimeoutError(f"not done within {seconds:g} s")
    return result.result()

"""Whatever is called in a sandbox, its caller lives on and learns what happened."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from imagepipeline.errors import LimitError, SandboxLostError, UnreadableImageError
from imagepipeline.imaging.sandbox import Sandbox


def test_the_value_comes_back_with_what_it_took():
    (value, process), usage = Sandbox().call(lambda a, b: (a + b, os.getpid()), 1, b=2)
    assert value == 3
    assert process != os.getpid()
    assert 0 <= usage.cpu_seconds <= usage.wall_seconds + 0.1
    assert 5_000_000 < usage.peak_bytes < 2_000_000_000


def test_an_exception_comes_back_as_it_was():
    def fail():
        raise UnreadableImageError("no")

    with pytest.raises(UnreadableImageError, match="no"):
        Sandbox().call(fail)


def test_too_much_memory_is_a_limit_and_names_its_setting():
    sandbox = Sandbox(memory_bytes=200_000_000)
    assert sandbox.call(lambda: np.ones(10_000_000, dtype=np.uint8).sum())[0] == 10_000_000
    with pytest.raises(LimitError, match=r"200 MB.*IMAGEPIPELINE_MAX_MEMORY_BYTES"):
        sandbox.call(lambda: np.ones(300_000_000, dtype=np.uint8).sum())


def test_too_much_cpu_time_is_a_limit_and_names_its_setting():
    def spin():
        while True:
            pass

    with pytest.raises(LimitError, match=r"1 s of CPU time.*IMAGEPIPELINE_MAX_CPU_SECONDS"):
        Sandbox(cpu_seconds=1).call(spin)


def test_too_long_by_the_clock_may_go_well_next_time():
    with pytest.raises(SandboxLostError, match=r"longer than 0\.2 s"):
        Sandbox(wall_seconds=0.2).call(time.sleep, 60)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_crash_is_told_by_the_name_of_its_signal(number):
    with pytest.raises(SandboxLostError, match=number.name):
        Sandbox().call(lambda: os.kill(os.getpid(), number))


def test_an_exit_is_a_crash_too():
    with pytest.raises(SandboxLostError, match="exit code 3"):
        Sandbox().call(os._exit, 3)


def test_a_value_that_cannot_be_sent_is_an_error():
    with pytest.raises(RuntimeError, match="could not be sent"):
        Sandbox().call(lambda: threading.Lock())


def test_what_is_printed_in_it_goes_nowhere(capfd):
    Sandbox().call(lambda: (os.write(1, b"x"), os.write(2, b"y")))
    assert capfd.readouterr() == ("", "")


def test_no_child_and_no_pipe_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Sandbox().call(int)
        with pytest.raises(SandboxLostError):
            Sandbox(wall_seconds=0.05).call(time.sleep, 60)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_it_works_beside_threads_that_hold_locks():
    lock, is_over = threading.Lock(), threading.Event()

    def hold():
        with lock:
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert all(Sandbox().call(sum, range(1000))[0] == 499_500 for _ in range(20))
    finally:
        is_over.set()
        thread.join()

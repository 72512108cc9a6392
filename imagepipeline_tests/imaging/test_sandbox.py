"""Whatever is done in a sandbox, its caller lives on and learns what happened."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from imagepipeline.errors import LimitError, SandboxLostError, UnreadableImageError
from imagepipeline.imaging.sandbox import Sandbox


def identity(value):
    return value


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


class Holder:
    """Holds functions for the child to call; only the name of the call is sent."""

    def __init__(self, function):
        self.function = function


def run(holder, *args):
    return holder.function(*args)


def in_sandbox(function, *args, sandbox=Sandbox()):  # noqa: B008
    with sandbox.open(Holder, function) as session:
        return session.call(run, *args)


def test_a_value_is_made_and_worked_on_in_one_other_process():
    with Sandbox().open(lambda: [os.getpid()]) as session:
        (process,), usage = session.call(identity)
        assert session.call(list.__len__)[0] == 1
        assert session.call(list.__getitem__, 0)[0] == process != os.getpid()
    assert 0 <= usage.cpu_seconds <= usage.wall_seconds + 0.1
    assert 5_000_000 < usage.peak_bytes < 2_000_000_000


def test_a_call_that_was_begun_is_answered_when_it_is_made():
    with Sandbox().open(lambda: []) as session:
        session.begin(list.append, 1)
        session.begin(list.append, 2)  # one at a time: the first stays the one begun
        assert session.call(list.append, 1)[0] is None
        assert session.call(identity)[0] == [1]
        session.begin(list.append, 3)
        assert session.call(list.__len__)[0] == 2  # another call: that of the one begun is dropped
        assert session.call(identity)[0] == [1, 3]


def test_what_went_wrong_in_a_call_that_was_begun_is_told_when_it_is_made():
    with Sandbox().open(lambda: [1]) as session:
        session.begin(list.__getitem__, 5)
        with pytest.raises(IndexError):
            session.call(list.__getitem__, 5)
        session.begin(list.__getitem__, 7)
        assert session.call(identity)[0] == [1]
    with Sandbox().open(Holder, os.getpid) as session:
        os.kill(session.call(run)[0], signal.SIGKILL)
        time.sleep(0.1)
        session.begin(run)
        with pytest.raises(SandboxLostError):
            session.call(run)


def test_an_exception_comes_back_as_it_was_and_the_session_goes_on():
    with Sandbox().open(lambda: [1]) as session:
        with pytest.raises(IndexError):
            session.call(list.__getitem__, 5)
        assert session.call(list.__getitem__, 0)[0] == 1


def test_a_value_that_cannot_be_made_leaves_nothing_behind():
    def fail():
        raise UnreadableImageError("no")

    before = children()
    with pytest.raises(UnreadableImageError, match="no"):
        Sandbox().open(fail)
    assert children() == before


def test_too_much_memory_is_a_limit_and_names_its_setting():
    sandbox = Sandbox(memory_bytes=200_000_000)
    assert in_sandbox(lambda: np.ones(10_000_000, dtype=np.uint8).sum(), sandbox=sandbox)[0] == 10_000_000
    with pytest.raises(LimitError, match=r"200 MB.*IMAGEPIPELINE_MAX_MEMORY_BYTES"):
        in_sandbox(lambda: np.ones(300_000_000, dtype=np.uint8).sum(), sandbox=sandbox)


def test_too_much_cpu_time_is_a_limit_and_names_its_setting():
    def spin():
        while True:
            pass

    with pytest.raises(LimitError, match=r"1 s of CPU time.*IMAGEPIPELINE_MAX_CPU_SECONDS"):
        in_sandbox(spin, sandbox=Sandbox(cpu_seconds=1))


def test_too_long_by_the_clock_may_go_well_next_time():
    with Sandbox(wall_seconds=0.2).open(Holder, time.sleep) as session:
        with pytest.raises(SandboxLostError, match=r"longer than 0\.2 s"):
            session.call(run, 60)
        assert not session.is_open


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_crash_is_told_by_the_name_of_its_signal(number):
    with Sandbox().open(Holder, lambda: os.kill(os.getpid(), number)) as session:
        with pytest.raises(SandboxLostError, match=number.name):
            session.call(run)
        assert not session.is_open


def test_a_crash_between_two_calls_is_told_by_the_second():
    with Sandbox().open(os.getpid) as session:
        os.kill(session.call(identity)[0], signal.SIGKILL)
        time.sleep(0.05)
        with pytest.raises(SandboxLostError, match="SIGKILL"):
            session.call(identity)


def test_an_exit_is_a_crash_too():
    with pytest.raises(SandboxLostError, match="exit code 3"):
        in_sandbox(os._exit, 3)


def test_a_value_that_cannot_be_sent_is_an_error():
    with pytest.raises(RuntimeError, match="could not be sent"):
        in_sandbox(threading.Lock)


def test_what_is_printed_in_it_goes_nowhere(capfd):
    in_sandbox(lambda: (os.write(1, b"x"), os.write(2, b"y")))
    assert capfd.readouterr() == ("", "")


def test_no_child_and_no_pipe_is_left_behind():
    before = children(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        in_sandbox(int)
        with pytest.raises(SandboxLostError):
            in_sandbox(time.sleep, 60, sandbox=Sandbox(wall_seconds=0.05))
    assert (children(), len(os.listdir("/proc/self/fd"))) == before


def test_the_child_ends_with_its_parent():
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        session = Sandbox().open(os.getpid)
        os.write(writer, str(session.call(identity)[0]).encode())
        time.sleep(60)
    child = int(os.read(reader, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}"):
            return
        with open(f"/proc/{child}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":  # ended, nobody's child yet
                return
        time.sleep(0.05)
    pytest.fail("the child outlives its parent")


def test_it_works_beside_threads_that_hold_locks():
    lock, is_over = threading.Lock(), threading.Event()

    def hold():
        with lock:
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert all(in_sandbox(sum, range(1000))[0] == 499_500 for _ in range(20))
    finally:
        is_over.set()
        thread.join()

"""Whatever happens in a sandbox, the caller survives and learns what it was."""

import os
import signal
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from imagepipeline.errors import (
    LimitError,
    SandboxDownError,
    SandboxLostError,
    UnreadableImageError,
)
from imagepipeline.imaging.sandbox import Sandbox, Zygote
from imagepipeline_tests.imaging import sandbox_operations as ops

OPERATIONS = "imagepipeline_tests.imaging.sandbox_operations"
SECONDS = 10


@pytest.fixture(scope="module")
def zygote():
    with closing(Zygote(OPERATIONS)) as zygote:
        yield zygote


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_reaped(process):
    return not Path(f"/proc/{process}").exists()


def assert_ends(process, is_gone=has_ended):
    deadline = time.monotonic() + SECONDS
    while not is_gone(process):
        assert time.monotonic() < deadline, f"process {process} is still there"
        time.sleep(0.01)


def children_of(process):
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def open_session(zygote, numbers=(), **limits):
    return Sandbox(zygote=zygote, **limits).open(ops.make_list, list(numbers))


def do(zygote, function, *args, **limits):
    with open_session(zygote, **limits) as session:
        return session.call(function, *args)


def test_a_value_is_made_and_used_in_one_child_process(zygote):
    with open_session(zygote, [5, 6]) as session:
        session.call(ops.append, 7)
        value, usage = session.call(ops.identity)
    assert value == [5, 6, 7]
    assert session.process_id != os.getpid()
    assert 0 <= usage.cpu_seconds <= usage.wall_seconds + 0.1
    assert 5_000_000 < usage.peak_bytes < 2_000_000_000


def test_bytes_arrive_unchanged(zygote):
    content = os.urandom(3_000_000)
    assert do(zygote, ops.echo, content)[0] == content
    assert do(zygote, ops.echo, b"")[0] == b""


def test_a_begun_call_is_answered_by_the_later_call(zygote):
    with open_session(zygote) as session:
        session.begin(ops.append, 1)
        session.begin(ops.append, 2)  # ignored, because one has begun
        assert session.call(ops.append, 1)[0] is None
        assert session.call(ops.identity)[0] == [1]
        session.begin(ops.append, 3)
        assert session.call(ops.get, 0)[0] == 1  # a different call: the begun one is discarded
        assert session.call(ops.identity)[0] == [1, 3]


def test_the_error_of_a_begun_call_is_raised_by_the_later_call(zygote):
    with open_session(zygote, [1]) as session:
        session.begin(ops.get, 5)
        with pytest.raises(RuntimeError, match="IndexError"):
            session.call(ops.get, 5)
        session.begin(ops.get, 7)
        assert session.call(ops.identity)[0] == [1]
        os.kill(session.process_id, signal.SIGKILL)
        assert_ends(session.process_id)
        session.begin(ops.identity)
        with pytest.raises(SandboxLostError):
            session.call(ops.identity)


def test_other_errors_are_named_and_the_session_continues(zygote):
    with open_session(zygote, [1]) as session:
        with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
            session.call(ops.get, 5)
        assert session.call(ops.get, 0)[0] == 1


def test_a_failed_maker_leaves_nothing_behind(zygote):
    zygote.prepare()  # it keeps a socket
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnreadableImageError, match="no"):
        Sandbox(zygote=zygote).open(ops.fail, "no")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_error_for_too_much_memory_names_its_setting(zygote):
    assert do(zygote, ops.allocate, 10_000_000, memory_bytes=200_000_000)[0] == 10_000_000
    with pytest.raises(LimitError, match=r"200 MB.*IMAGEPIPELINE_MAX_MEMORY_BYTES"):
        do(zygote, ops.allocate, 300_000_000, memory_bytes=200_000_000)


def test_the_error_for_too_much_cpu_time_names_its_setting(zygote):
    with pytest.raises(LimitError, match=r"1 s of CPU time.*IMAGEPIPELINE_MAX_CPU_SECONDS"):
        do(zygote, ops.spin, cpu_seconds=1)


def test_a_call_that_takes_too_long_may_be_retried(zygote):
    with open_session(zygote, wall_seconds=2) as session:
        with pytest.raises(SandboxLostError, match="longer than 2 s"):
            session.call(ops.sleep, 60.0)
        assert not session.is_open
        assert_ends(session.process_id)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_the_error_for_a_crash_names_the_signal(zygote, number):
    with open_session(zygote) as session:
        with pytest.raises(SandboxLostError, match=number.name):
            session.call(ops.die, int(number))
        assert not session.is_open


def test_a_crash_between_two_calls_is_reported_by_the_second(zygote):
    with open_session(zygote) as session:
        os.kill(session.process_id, signal.SIGKILL)
        assert_ends(session.process_id)
        with pytest.raises(SandboxLostError, match="SIGKILL"):
            session.call(ops.identity)


def test_an_exit_counts_as_a_crash(zygote):
    with pytest.raises(SandboxLostError, match="exit code 3"):
        do(zygote, ops.leave, 3)


def test_a_value_that_cannot_be_sent_is_an_error(zygote):
    with pytest.raises(RuntimeError, match="could not be sent"):
        do(zygote, ops.give_lock)


def test_only_listed_operations_can_be_called(zygote):
    for function in (ops.make_list, ops.must_succeed):  # a maker and a helper
        with pytest.raises(RuntimeError, match="KeyError"), open_session(zygote) as session:
            session.ask(function, (), None)


def test_output_of_a_child_is_discarded(zygote, capfd):
    assert do(zygote, ops.shout)[0] == 2
    assert capfd.readouterr() == ("", "")


def test_no_child_or_descriptor_is_left_behind(zygote):
    zygote.prepare()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        do(zygote, ops.identity)
        with pytest.raises(SandboxLostError):
            do(zygote, ops.sleep, 60.0, wall_seconds=0.05)
    assert len(os.listdir("/proc/self/fd")) == before
    with open_session(zygote) as session:
        parent = int(
            Path(f"/proc/{session.process_id}/stat").read_text().rpartition(")")[2].split()[1]
        )
    deadline = time.monotonic() + SECONDS
    while children_of(parent):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def forked(work):
    """Forks a process that works, then sleeps; yields its process ID and the work's result."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writer, str(work()).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    try:
        yield process, int(os.read(reader, 20))
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


kept = []


def start_spinning(zygote):
    """Starts a child that stays busy for the whole test; runs in a forked process."""
    kept.append(open_session(zygote))
    kept[-1].begin(ops.spin)
    return kept[-1].process_id


def test_a_busy_child_ends_with_its_run_and_no_other_child_does(zygote):
    zygote.prepare()
    with open_session(zygote, [1]) as other:
        with forked(lambda: start_spinning(zygote)) as (_, child):
            assert not has_ended(child)
        assert_ends(child)
        assert other.call(ops.get, 0)[0] == 1


def test_children_yield_the_cpu_to_older_ones_and_never_as_far_as_the_bulk_lane():
    def open_child(**limits):
        return stack.enter_context(open_session(zygote, **limits))

    def list_niceness(sessions):
        for session in sessions:
            session.call(ops.identity)  # a child yields before it answers
        return [os.getpriority(os.PRIO_PROCESS, session.process_id) - own for session in sessions]

    own = os.getpriority(os.PRIO_PROCESS, 0)
    with closing(Zygote(OPERATIONS)) as zygote, ExitStack() as stack:
        bulk = [open_child(niceness=19) for _ in range(2)]
        uploads = [open_child() for _ in range(6)]
        assert list_niceness(uploads) == [0, 4, 8, 8, 8, 8]
        assert list_niceness(bulk) == [19 - own, 19 - own]
        for session in uploads[:5]:
            session.close()
            assert_ends(session.process_id, is_reaped)
        assert list_niceness([open_child()]) == [4]


def test_a_stopped_run_does_not_hold_up_others(zygote):
    zygote.prepare()
    with forked(lambda: start_spinning(zygote)) as (run, child):
        os.kill(run, signal.SIGSTOP)
        assert do(zygote, ops.echo, b"x")[0] == b"x"
        assert not has_ended(child)


def test_children_end_with_the_zygote_and_the_next_session_starts_another():
    with closing(Zygote(OPERATIONS)) as zygote, open_session(zygote) as session:
        session.begin(ops.spin)
        parent = int(
            Path(f"/proc/{session.process_id}/stat").read_text().rpartition(")")[2].split()[1]
        )
        os.kill(parent, signal.SIGKILL)
        assert_ends(session.process_id)
        with pytest.raises(SandboxLostError):
            session.call(ops.spin)
        assert do(zygote, ops.echo, b"x")[0] == b"x"


def test_a_stopped_zygote_is_replaced(monkeypatch):
    monkeypatch.setattr("imagepipeline.imaging.sandbox.FORK_SECONDS", 0.2)
    with closing(Zygote(OPERATIONS)) as zygote:
        zygote.prepare()
        first = zygote._process
        first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(zygote, "_start", restore_patience(monkeypatch, zygote._start))
        assert do(zygote, ops.echo, b"x")[0] == b"x"
        assert first.poll() == -signal.SIGKILL


def restore_patience(monkeypatch, start):
    def patient_start():
        monkeypatch.setattr("imagepipeline.imaging.sandbox.FORK_SECONDS", SECONDS)
        start()

    return patient_start


def test_a_zygote_serves_forked_processes_and_ends_with_the_last():
    zygote = Zygote(OPERATIONS)
    zygote.prepare()
    with forked(lambda: zygote._process.pid if do(zygote, ops.echo, b"x") else 0) as (_, process):
        zygote._control.close()  # as if this process had ended
        assert not has_ended(process)
    assert_ends(process)
    zygote._process.wait()


def test_a_zygote_that_cannot_start_says_why():
    with pytest.raises(SandboxDownError, match="ModuleNotFoundError: No module named 'nothing'"):
        Zygote("nothing").prepare()


def test_threads_that_hold_locks_do_not_block_the_sandbox(zygote):
    lock, is_over = threading.Lock(), threading.Event()

    def hold():
        with lock:
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert all(do(zygote, ops.echo, b"x")[0] == b"x" for _ in range(20))
    finally:
        is_over.set()
        thread.join()

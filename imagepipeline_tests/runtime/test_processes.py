"""Services run as child processes with rotated logs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagepipeline.runtime import processes

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[2]

PARENT = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from imagepipeline.runtime.processes import Service

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context(sys.argv[2])
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH")}
    environment["PASSWORD"] = "canary"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child must not inherit this
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(lock, True)

    def start(name, *arguments):
        return Service(context, name, ["child", *arguments], folder / f"{name}.log", environment)

    done = start("one", "7")
    assert done.wait(30) == done.returncode == done.poll() == 7, done.returncode
    told = start("one", "why")
    assert told.wait(30) == 1, told.returncode
    lasting = start("two")
    while "True" not in ((folder / "two.log").read_text() if (folder / "two.log").exists() else ""):
        time.sleep(0.01)
    assert lasting.poll() is None
    try:
        lasting.wait(0.01)
    except subprocess.TimeoutExpired:
        pass
    else:
        raise AssertionError("wait did not time out")
    assert b"canary" not in Path(f"/proc/{lasting.pid}/environ").read_bytes()
    assert b"canary" not in Path(f"/proc/{lasting.pid}/cmdline").read_bytes()
    descriptors = Path(f"/proc/{lasting.pid}/fd").iterdir()
    assert folder / "lock" not in {path.readlink() for path in descriptors}
    lasting.terminate()
    assert lasting.wait(30) == -signal.SIGTERM
    left = start("three")
    while not (folder / "three.log").exists() or not (folder / "three.log").read_text():
        time.sleep(0.01)
    print(left.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
CHILD = """
import os, sys, time
print(__name__, sys.argv[1:], open('/proc/self/comm').read().strip(), end=' ')
print(os.getsid(0) == os.getpid(), end=' ')
print(os.environ.get("HOME"), os.environ["PASSWORD"], sys.stdin.read() == "", flush=True)
if len(sys.argv) > 1: sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_service_runs_like_python_m_and_ends_with_its_parent(tmp_path, method):
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
        "HOME": "/nowhere",
    }
    command = [sys.executable, tmp_path / "parent.py", tmp_path, method]
    parent = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert parent.returncode == -9, parent.stderr
    seen = "one True None canary True"
    assert (
        tmp_path / "one.log"
    ).read_text() == f"__main__ ['7'] {seen}\n__main__ ['why'] {seen}\nwhy\n"
    orphan = Path(f"/proc/{int(parent.stdout)}/status")
    deadline = time.monotonic() + 10
    while orphan.exists() and "State:\tZ" not in orphan.read_text():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.01)


def test_a_log_is_rotated_while_a_process_writes_to_it(tmp_path):
    log = tmp_path / "one.log"
    script = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with open(log, "ab") as output:
        command = [sys.executable, "-c", script]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, text=True)

    def write(line):
        size = log.stat().st_size
        writer.stdin.write(line + "\n")
        writer.stdin.flush()
        deadline = time.monotonic() + 10
        while log.stat().st_size != size + len(line) + 1:
            assert time.monotonic() < deadline, "the log does not have the expected size"
            time.sleep(0.01)

    write("a" * 100)
    processes.rotate(log, 200)
    assert log.stat().st_size == 101
    write("b" * 100)
    processes.rotate(log, 200)
    assert log.stat().st_size == 0
    write("c")
    assert log.read_text() == "c\n"
    assert (tmp_path / "one.old.log").read_text() == "a" * 100 + "\n" + "b" * 100 + "\n"
    writer.stdin.close()
    assert writer.wait(10) == 0


def test_a_log_that_cannot_be_copied_is_truncated_anyway(tmp_path):
    log = tmp_path / "one.log"
    log.write_text("x" * 300)
    (tmp_path / "one.old.log").mkdir()
    processes.rotate(log, 200)
    assert os.path.getsize(log) == 0


def test_a_program_started_by_a_background_job_can_be_interrupted():
    code = (
        "import os, signal, sys; from imagepipeline.runtime import processes\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell does for `command &`
        "processes.reset_signals()\n"
        "program = 'import signal; print(signal.getsignal(signal.SIGINT).__name__)'\n"
        "os.execv(sys.executable, [sys.executable, '-c', program])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "default_int_handler"

"""Children that are forked instead of started anew."""

import os
import subprocess
import sys
import time
from pathlib import Path

from imagepipeline.runtime import processes

PARENT = """
import os, signal, sys, time
from pathlib import Path
from imagepipeline.runtime.processes import Forked

folder = Path(sys.argv[1])
(folder / "child.py").write_text(
    "import os, sys, time\\n"
    "print(__name__, sys.argv[1:], open('/proc/self/comm').read().strip(), os.getsid(0) == os.getpid(), flush=True)\\n"
    "if len(sys.argv) > 1: sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])\\n"
    "time.sleep(600)\\n"
)
sys.path.insert(0, str(folder))
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the child must not inherit that
lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
done = Forked("one", ["child", "7"], folder / "one.log", lambda: os.close(lock))
assert done.wait(30) == done.returncode == done.poll() == 7, done.returncode
told = Forked("one", ["child", "why"], folder / "one.log", lambda: os.close(lock))
assert told.wait(30) == 1, told.returncode
lasting = Forked("two", ["child"], folder / "two.log", lambda: os.close(lock))
while not (folder / "two.log").exists() or not (folder / "two.log").read_text():
    time.sleep(0.01)
assert lasting.poll() is None
assert not Path(f"/proc/{lasting.pid}/fd/{lock}").exists()
lasting.terminate()
assert lasting.wait(30) == -signal.SIGTERM
left = Forked("three", ["child"], folder / "three.log", lambda: None)
print(left.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_module_runs_as_if_started_by_python_m_and_ends_with_its_parent(tmp_path):
    parent = subprocess.run([sys.executable, "-c", PARENT, tmp_path], capture_output=True, text=True, check=False)
    assert parent.returncode == -9, parent.stderr
    assert (tmp_path / "one.log").read_text() == "__main__ ['7'] one True\n__main__ ['why'] one True\nwhy\n"
    orphan = Path(f"/proc/{int(parent.stdout)}/status")
    deadline = time.monotonic() + 10
    while orphan.exists() and "State:\tZ" not in orphan.read_text():
        assert time.monotonic() < deadline, "the child has outlived its parent"
        time.sleep(0.01)


def test_a_log_is_rotated_while_its_process_writes(tmp_path):
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
            assert time.monotonic() < deadline, "the line is not where it should be"
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


def test_a_log_that_cannot_be_copied_is_cut_all_the_same(tmp_path):
    log = tmp_path / "one.log"
    log.write_text("x" * 300)
    (tmp_path / "one.old.log").mkdir()
    processes.rotate(log, 200)
    assert os.path.getsize(log) == 0

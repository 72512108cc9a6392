"""The local Redis-compatible server loses nothing and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import redis

from imagepipeline.errors import StackError
from imagepipeline.runtime import processes, valkey


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="ip", dir="/tmp") as folder:
        yield Path(folder)


def start(folder):
    socket = folder / "valkey.sock"
    return valkey.start_server(folder / "data", socket, folder / "log"), redis.Redis(
        unix_socket_path=str(socket)
    )


def test_pushed_entries_survive_a_kill(folder):
    process, client = start(folder)
    client.lpush("l", *range(2000))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process, client = start(folder)
    assert client.llen("l") == 2000
    assert processes.stop(process, patience_seconds=10)
    assert process.returncode == 0


def test_no_port_is_open_and_only_the_owner_can_connect(folder):
    process, client = start(folder)
    assert client.config_get("port") == {"port": "0"}
    assert client.config_get("appendonly") == {"appendonly": "yes"}
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert (folder / "valkey.sock").stat().st_mode & 0o077 == 0
    processes.stop(process, patience_seconds=10)


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(folder):
    process, _ = start(folder)
    assert os.getpgid(process.pid) != os.getpgid(0)
    processes.stop(process, patience_seconds=10)


def test_a_server_that_cannot_start_says_why(folder):
    (folder / "data").write_text("in the way")
    with pytest.raises((StackError, FileExistsError)):
        start(folder)
    long = folder / ("x" * 120)
    with pytest.raises(StackError, match="unix socket path too long"):
        valkey.start_server(folder / "other", long / "valkey.sock", folder / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end children with their parent")
def test_children_end_when_their_parent_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from imagepipeline.runtime import processes;"
        "child = processes.start(['sleep', '600'], Path(sys.argv[1]));"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "log"], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")

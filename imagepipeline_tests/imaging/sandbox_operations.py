"""Operations for the tests of the sandbox: small honest calls, attacks, and lies."""

import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from imagepipeline.errors import UnreadableImageError
from imagepipeline.imaging.confinement import PR_SET_PDEATHSIG

libc = ctypes.CDLL(None, use_errno=True)


def warm_up() -> None:
    """Does nothing, because no import here is late."""


# ---- honest


def make_list(numbers: list[int]) -> list[int]:
    return numbers


def fail(message: str) -> None:
    raise UnreadableImageError(message)


def identity(held: list[int]) -> list[int]:
    return held


def append(held: list[int], number: int) -> None:
    held.append(number)


def get(held: list[int], index: int) -> int:
    return held[index]


def echo(held: list[int], content: bytes) -> bytes:
    return content


def allocate(held: list[int], count: int) -> int:
    return int(np.ones(count, dtype=np.uint8).sum())


def spin(held: list[int]) -> None:
    while True:
        pass


def sleep(held: list[int], seconds: float) -> None:
    time.sleep(seconds)


def die(held: list[int], number: int) -> None:
    signal.raise_signal(number)


def leave(held: list[int], code: int) -> None:
    os._exit(code)


def give_lock(held: list[int]) -> Any:
    return threading.Lock()


def shout(held: list[int]) -> int:
    return os.write(1, b"x") + os.write(2, b"y")


def start_threads(held: list[int], count: int) -> int:
    """Starts threads, as the decoder of HEIC does."""
    done: list[int] = []
    threads = [threading.Thread(target=done.append, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done)


def keep_threads(held: list[int], count: int, seconds: float) -> int:
    """Starts threads that sleep, and sleeps as long."""
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(seconds,), daemon=True).start()
    time.sleep(seconds)
    return count


# ---- lies


def say(held: list[int], data: bytes) -> None:
    """Writes bytes instead of an answer, and ends."""
    os.write(0, data)
    os._exit(0)


def dribble(held: list[int], data: bytes) -> None:
    """Writes an answer one byte at a time."""
    for index in range(len(data)):
        os.write(0, data[index : index + 1])
        time.sleep(0.05)


def raise_named(held: list[int], name: str, message: str) -> None:
    """Raises an error with the given name."""
    raise type(name, (Exception,), {})(message)


def claim_usage(held: list[int]) -> float:
    return float("inf")


# ---- attacks


def call(number: int, *arguments: Any) -> Any:
    """Makes a system call by its number on x86_64; raises OSError if it fails."""
    values = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *values)
    must_succeed(result)
    return result


def must_succeed(result: int) -> None:
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")


def start_process(number: int, *arguments: Any) -> None:
    if call(number, *arguments) == 0:
        os._exit(0)


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def map_executable() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()


def reach_network() -> None:
    with socket.socket(socket.AF_INET):
        pass


def reach_socket() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect_ex("/tmp/nobody.sock")


def write_file() -> None:
    path = f"/tmp/attack-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.unlink(path)


buffer = ctypes.create_string_buffer(256)
ATTACKS: dict[str, Callable[[], object]] = {
    "read a file": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)),
    "write a file": write_file,
    "stat a file": lambda: os.stat("/etc/passwd"),
    "list a folder": lambda: os.listdir("/"),
    "read the environment": lambda: os.close(os.open("/proc/self/environ", os.O_RDONLY)),
    "read the environment of its parent": lambda: os.close(
        os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY)
    ),
    "open the memory of its parent": lambda: os.close(
        os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)
    ),
    "reach the network": reach_network,
    "reach a Unix socket": reach_socket,
    "create a pair of sockets": lambda: [one.close() for one in socket.socketpair()],
    "fork": fork,
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
    "signal all": lambda: os.kill(os.getpgid(0) * -1, 0),
    "duplicate a descriptor": lambda: os.close(os.dup(0)),
    "map executable memory": map_executable,
    "become another user": lambda: os.setuid(os.getuid()),
    "lift its limits": lambda: resource.setrlimit(
        resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE)
    ),
    "outlive its parent": lambda: must_succeed(libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)),
}
HARMLESS = tuple(ATTACKS)  # they do no harm even if they succeed
if platform.machine() == "x86_64":
    ATTACKS |= {
        "clone a process": lambda: start_process(56, int(signal.SIGCHLD), 0, 0, 0, 0),
        "clone with the memory": lambda: start_process(56, 0x100 | int(signal.SIGCHLD), 0, 0, 0, 0),
        "clone into a new user namespace": lambda: start_process(
            56, 0x10000000 | int(signal.SIGCHLD), 0, 0, 0, 0
        ),
        "clone3": lambda: call(435, buffer, 1),
        "execute": lambda: call(59, b"/nothing", 0, 0),
        "execute a descriptor": lambda: call(322, 0, b"", 0, 0, 0x1000),
        "signal a thread of its parent": lambda: call(234, os.getppid(), os.getppid(), 0),
        "signal a thread": lambda: call(200, os.getppid(), 0),
        "trace its parent": lambda: call(101, 16, os.getppid(), 0, 0),
        "be traced": lambda: call(101, 0, 0, 0, 0),
        "read the memory of its parent": lambda: call(310, os.getppid(), buffer, 1, buffer, 1, 0),
        "write the memory of its parent": lambda: call(311, os.getppid(), buffer, 1, buffer, 1, 0),
        "open a handle of its parent": lambda: call(434, os.getppid(), 0),  # pidfd_open
        "take a descriptor of its parent": lambda: call(438, 0, 0, 0),
        "compare with its parent": lambda: call(312, os.getpid(), os.getppid(), 0, 0, 0),
        "io_uring": lambda: call(425, 1, buffer),
        "mount": lambda: call(165, b"none", b"/nothing", b"tmpfs", 0, 0),
        "open a tree": lambda: call(428, -100, b"/", 0),
        "kernel keyring": lambda: call(250, 0, -3, 0),
        "bpf": lambda: call(321, 0, buffer, 8),
        "userfaultfd": lambda: call(323, 1),
        "perf events": lambda: call(298, buffer, 0, -1, -1, 0),
        "memfd": lambda: call(319, b"x", 0),
        "shared memory": lambda: call(29, 0, 4096, 0o1600),
        "message queue": lambda: call(68, 0, 0o1600),
        "new namespaces": lambda: call(272, 0),
        "chroot": lambda: call(161, b"/"),
        "load a module": lambda: call(175, buffer, 0, b""),
        "another filter": lambda: call(317, 0, 0, 0),
        "inject terminal input": lambda: call(16, 0, 0x5412, buffer),
        "send a descriptor": lambda: call(46, 0, buffer, 0),
        "receive a descriptor": lambda: call(47, 0, buffer, 0),
        "open by handle": lambda: call(304, 0, buffer, 0),
        "openat2": lambda: call(437, -100, b"/etc/passwd", buffer, 24),
        "old open": lambda: call(2, b"/etc/passwd", 0, 0),
        "change permissions": lambda: call(90, b"/nothing", 0),
        "delete": lambda: call(87, b"/nothing"),
        "another scheduler": lambda: call(144, 0, 0, buffer),
        "another personality": lambda: call(135, 0xFFFFFFFF),
        "set the time": lambda: call(227, 99, buffer),
        "NUMA pages": lambda: call(256, 0, 0, 0, 0),
    }
FOREIGN = 0x40000000 | 39  # getpid of x32: another ABI


def attack(held: list[int], name: str) -> str:
    """Tries an attack; returns the name of the error, or `done`."""
    try:
        ATTACKS[name]()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def call_foreign(held: list[int]) -> None:
    call(FOREIGN)


MAKERS = (make_list, fail)
CALLS = (
    *(
        identity,
        append,
        get,
        echo,
        allocate,
        spin,
        sleep,
        die,
        leave,
        give_lock,
        shout,
        start_threads,
        keep_threads,
    ),
    *(say, dribble, raise_named, claim_usage, attack, call_foreign),
)

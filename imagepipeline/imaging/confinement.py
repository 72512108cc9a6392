"""Confines a decoding process with seccomp, Landlock and resource limits before it reads an upload.

We use no library, because those for Python need libseccomp, which a minimal Debian may lack, and a
filter is only a page of numbers (seccomp(2), landlock(7); system calls: syscalls(2), unistd.h of
each architecture).
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2
# linux/seccomp.h. An errno is added to REFUSE.
KILL_PROCESS, REFUSE, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
FORBID = REFUSE | errno.EPERM
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same on all architectures
LANDLOCK_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION: return the version instead of a ruleset
# AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of linux/audit.h, by their names in `platform`.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # from this number on, system calls of x86_64 belong to the x32 ABI
PROT_EXEC = 4
# The clone flags with which glibc and musl start a thread; musl adds UNUSED_THREAD_FLAG. No new
# process can be started with these flags.
THREAD_FLAGS, UNUSED_THREAD_FLAG = 0x3D0F00, 0x400000

# Allowed system calls, by their numbers on x86_64 and aarch64. docs/security.md gives the reasons.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "restart_syscall": (219, 128),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Allowed with certain arguments only.
MMAP, MPROTECT, CLONE, TGKILL = (9, 222), (10, 226), (56, 220), (234, 131)
# A filter cannot read the flags of clone3. If it seems to be missing, libraries use clone instead.
CLONE3 = (435, 435)


@dataclass(frozen=True)
class Confinement:
    """What the kernel supports: seccomp filters, and a version of Landlock (0: none)."""

    has_seccomp: bool
    landlock_version: int

    def describe(self) -> str:
        """Describes the confinement in words."""
        calls = (
            "its system calls are filtered"
            if self.has_seccomp
            else "its system calls are not filtered"
        )
        files = (
            "Landlock closes the file system" if self.landlock_version else "there is no Landlock"
        )
        return f"{calls}, {files}"


def confine(memory_bytes: int, cpu_seconds: int) -> Confinement:
    """Confines this process for good to computing, to its memory and to its open descriptors.

    The resource limits are set on every system, the rest only if the kernel supports it.

    Args:
        memory_bytes: memory that it may map in addition to what it has now.
        cpu_seconds: CPU time it may use.

    Returns:
        What the kernel supports and is now in force.
    """
    _limit(memory_bytes, cpu_seconds)
    is_linux = sys.platform == "linux"
    has_no_privileges = is_linux and _control(PR_SET_NO_NEW_PRIVS, 1)  # or neither works
    landlock_version = _close_file_system() if has_no_privileges else 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # open descriptors stay open
    return Confinement(has_no_privileges and _filter_calls(), landlock_version)


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent process ends, on Linux.

    Args:
        parent: the process ID of the parent.
    """
    if sys.platform == "linux":
        _control(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has already ended
        os._exit(1)


def build_filter(architecture: str, process: int) -> bytes:
    """Builds the BPF program that decides on each system call of a process.

    A call that is not allowed fails with EPERM, because some libraries only try a call and carry on
    without it. A call of another architecture, where the numbers mean other calls, kills the
    process.

    Args:
        architecture: a key of `ARCHITECTURES`.
        process: the process ID; the process may send signals to itself alone.
    """
    column = list(ARCHITECTURES).index(architecture)
    program = [
        _load(4),
        _jump_if(ARCHITECTURES[architecture], 1, 0),
        _decide(KILL_PROCESS),
        _load(0),
    ]
    if architecture == "x86_64":
        program += [_jump_if_at_least(X32, 0, 1), _decide(KILL_PROCESS)]
    for numbers in ALLOWED.values():
        program += [_jump_if(numbers[column], 0, 1), _decide(ALLOW)]
    for numbers in (MMAP, MPROTECT):
        program += [
            *(_jump_if(numbers[column], 0, 4), _load(16 + 8 * 2)),  # the third argument
            *(_jump_if_any(PROT_EXEC, 0, 1), _decide(FORBID), _decide(ALLOW)),
        ]
    program += [
        *(_jump_if(CLONE[column], 0, 5), _load(16), _and(~UNUSED_THREAD_FLAG & 0xFFFFFFFF)),
        *(_jump_if(THREAD_FLAGS, 0, 1), _decide(ALLOW), _decide(FORBID)),
        *(_jump_if(TGKILL[column], 0, 4), _load(16)),
        *(_jump_if(process, 0, 1), _decide(ALLOW), _decide(FORBID)),
        *(_jump_if(CLONE3[column], 0, 1), _decide(REFUSE | errno.ENOSYS)),
        _decide(FORBID),
    ]
    return b"".join(program)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # without it we are on macOS, whose kernel enforces no memory limit
        mapped_bytes = int(statistics.read_text().split()[0]) * resource.getpagesize()
        address_space = mapped_bytes + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scopes", ctypes.c_uint64),
    )


def _control(option: int, *values: int) -> bool:
    """Calls prctl(2); returns whether it succeeded."""
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return bool(ctypes.CDLL(None).prctl(option, *arguments) == 0)


def _filter_calls() -> bool:
    architecture = platform.machine()
    if architecture not in ARCHITECTURES or sys.maxsize < 2**32:
        return False
    program = build_filter(architecture, os.getpid())
    described = _Program(len(program) // 8, program)
    return _control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(described))


def _close_file_system() -> int:
    """Forbids everything that this kernel's Landlock can forbid; returns its version, or 0."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    version = call(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        return 0
    # Version 1 has 13 bits for access to files; 2, 3 and 5 add one each. Version 4 adds TCP, 6
    # signals and sockets.
    files = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    rules = _Ruleset((1 << files) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = call(LANDLOCK_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return 0
    try:
        return version if call(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


# ---- BPF instructions (linux/filter.h): code, jump if true, jump if false, operand


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _load(offset: int) -> bytes:
    """Loads 32 bits of `struct seccomp_data`.

    At 0 is the call's number, at 4 the architecture, at 16 the first argument.
    """
    return _instruction(0x20, 0, 0, offset)


def _and(mask: int) -> bytes:
    return _instruction(0x54, 0, 0, mask)


def _jump_if(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x15, if_true, if_false, value)


def _jump_if_at_least(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x35, if_true, if_false, value)


def _jump_if_any(mask: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x45, if_true, if_false, mask)


def _decide(action: int) -> bytes:
    return _instruction(0x06, 0, 0, action)

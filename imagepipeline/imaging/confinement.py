"""Confinement: what the kernel keeps from a process that decodes, before that sees a byte of an upload.

Without a library: what there is for Python needs libseccomp, which a bare Debian may not have, and a filter is a page
of numbers (seccomp(2), landlock(7); system calls: syscalls(2), unistd.h of each architecture).
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
KILL_PROCESS, REFUSE, ALLOW = (
    0x80000000,
    0x00050000,
    0x7FFF0000,
)  # linux/seccomp.h; REFUSE holds the error's number
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same on all architectures
LANDLOCK_VERSION = 1  # a flag that asks for it
# AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of linux/audit.h, by what `platform` calls them.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # system calls of x86_64 from here on are those of another ABI
PROT_EXEC = 4
# Flags with which glibc, and but for the second number musl too, starts a thread; no process can be started with them.
THREAD_FLAGS, UNUSED_THREAD_FLAG = 0x3D0F00, 0x400000

# What may be called, by its numbers on x86_64 and aarch64. Why: docs/security.md.
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
# Allowed with some arguments only.
MMAP, MPROTECT, CLONE, TGKILL = (9, 222), (10, 226), (56, 220), (234, 131)
CLONE3 = (435, 435)  # its flags cannot be looked at; when it is missing, libraries use clone


@dataclass(frozen=True)
class Confinement:
    """What the kernel offers here: whether it filters system calls, and its version of Landlock (0: none)."""

    has_seccomp: bool
    landlock_version: int

    def describe(self) -> str:
        """What holds a decoder, in words."""
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
    """Takes from this process, for good, all but computing, its memory and the descriptors it holds.

    Returns what the kernel offered for it; the limits are set everywhere.
    """
    _limit(memory_bytes, cpu_seconds)
    is_linux = sys.platform == "linux"
    has_no_privileges = is_linux and _control(
        PR_SET_NO_NEW_PRIVS, 1
    )  # without that the kernel allows no filter
    landlock_version = _close_file_system() if has_no_privileges else 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # what is open stays open
    return Confinement(has_no_privileges and _filter_calls(), landlock_version)


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the one it was forked from, `parent`, ends; where it can."""
    if sys.platform == "linux":
        _control(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def build_filter(architecture: str, process: int) -> bytes:
    """The program that decides on each system call of that process, for the kernel's BPF machine.

    What is not allowed fails with EPERM: a library that only tries must not die of it. A call of another architecture,
    whose numbers mean other calls, ends the process.
    """
    column = list(ARCHITECTURES).index(architecture)
    program = [_load(4), _jump_if(ARCHITECTURES[architecture], 1, 0), _give(KILL_PROCESS), _load(0)]
    if architecture == "x86_64":
        program += [_jump_if_at_least(X32, 0, 1), _give(KILL_PROCESS)]
    for numbers in ALLOWED.values():
        program += [_jump_if(numbers[column], 0, 1), _give(ALLOW)]
    for numbers in (MMAP, MPROTECT):
        program += [
            *(_jump_if(numbers[column], 0, 4), _load(16 + 8 * 2)),  # the third argument
            *(_jump_if_any(PROT_EXEC, 0, 1), _give(REFUSE | errno.EPERM), _give(ALLOW)),
        ]
    program += [
        *(_jump_if(CLONE[column], 0, 5), _load(16), _and(~UNUSED_THREAD_FLAG & 0xFFFFFFFF)),
        *(_jump_if(THREAD_FLAGS, 0, 1), _give(ALLOW), _give(REFUSE | errno.EPERM)),
        *(_jump_if(TGKILL[column], 0, 4), _load(16)),
        *(_jump_if(process, 0, 1), _give(ALLOW), _give(REFUSE | errno.EPERM)),
        *(_jump_if(CLONE3[column], 0, 1), _give(REFUSE | errno.ENOSYS)),
        _give(REFUSE | errno.EPERM),
    ]
    return b"".join(program)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    statistics = Path("/proc/self/statm")
    if statistics.exists():  # elsewhere (macOS) the kernel does not enforce a limit on memory
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
    """prctl(2); whether it succeeded."""
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
    """Forbids all that this kernel's Landlock knows; gives its version, or 0."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    version = call(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        return 0
    # Access to files by version 1: 13 bits, then one each in 2, 3 and 5; TCP since 4; signals and sockets since 6.
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


# ---- instructions of the BPF machine (linux/filter.h): code, jumps if true and if false, operand


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _load(offset: int) -> bytes:
    """Loads 32 bits of `struct seccomp_data`: 0 the call's number, 4 the architecture, 16 its first argument."""
    return _instruction(0x20, 0, 0, offset)


def _and(mask: int) -> bytes:
    return _instruction(0x54, 0, 0, mask)


def _jump_if(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x15, if_true, if_false, value)


def _jump_if_at_least(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x35, if_true, if_false, value)


def _jump_if_any(mask: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x45, if_true, if_false, mask)


def _give(action: int) -> bytes:
    return _instruction(0x06, 0, 0, action)

"""Confinement of the decoding process: what the kernel refuses it once it has its libraries.

Each part holds by itself. Landlock (`landlock(7)`) takes away the file system, the network and
signals to others; a seccomp filter (`seccomp(2)`) leaves the system calls that decoding needs; no
capability is left, none can be got, and no process of the same user can look into it.
"""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from lungwatch.errors import ConfigError

# The numbers below are Linux's own: linux/prctl.h, linux/landlock.h, linux/seccomp.h,
# linux/bpf_common.h, linux/audit.h.
_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 1, 3, 4
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 24, 38, 39
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
# Rights to files and sockets, by the version of the interface that brought them.
_LANDLOCK_FILES = {1: 0x1FFF, 2: 0x2000, 3: 0x4000, 5: 0x8000}
_LANDLOCK_NETWORK = {4: 0x3}
_LANDLOCK_SCOPED = {6: 0x3}
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_KILL, _EPERM, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000
_PROT_EXEC = 4
# Files of root's own are not readable for this user, and no process of the system's is its.
_NOBODY = 65534
_PROBE_TIMEOUT_S = 60.0

# Numbers of (x86_64, aarch64); None where there is no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69),
    "preadv2": (327, 286),
    "recvmsg": (47, 212), "poll": (7, None), "ppoll": (271, 73),
    "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "futex": (202, 98), "membarrier": (324, 283), "rseq": (334, 293),
    "set_robust_list": (273, 99), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "gettid": (186, 178), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Calls that no decoding makes by mistake: the process is killed. All others fail with EPERM.
_HOSTILE: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "seccomp": (317, 277),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
}  # fmt: skip
# No memory that can be executed is made: what runs is what was loaded.
_MAPPING: dict[str, tuple[int, int]] = {"mmap": (9, 222), "mprotect": (10, 226)}
_TGKILL = (234, 131)
_SECCOMP = (317, 277)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What holds a decoding process.

    Attributes
    ----------
    seccomp
        Whether it has the filter of system calls.
    landlock
        Version of the kernel's interface that took away files, network and signals; 0 for none.
    no_new_privs
        Whether no program that it could start gets more rights.
    no_capabilities
        Whether it has none.
    not_dumpable
        Whether other processes of its user cannot look into it.
    own_user
        Whether it runs as another user than the daemon's; only where root starts the daemon.
    """

    seccomp: bool = False
    landlock: int = 0
    no_new_privs: bool = False
    no_capabilities: bool = False
    not_dumpable: bool = False
    own_user: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """What `require_sandbox` asks for and this kernel or platform does not give."""
        return tuple(
            field.name
            for field in fields(self)
            if field.name != "own_user" and not getattr(self, field.name)
        )


def confine(*kept: int) -> Confinement:
    """Confine this process, for good; to be called with one thread and all modules imported.

    Parameters
    ----------
    kept
        Descriptors that stay open, beside the first three.
    """
    if sys.platform != "linux":
        return Confinement()
    os.environ.clear()
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getppid()
    own_user = _become_nobody()
    _drop_capabilities(libc)
    # A change of the user undoes the first two.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died meanwhile
    hide()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # In this order: each of the last two takes away what is asked before it.
    return Confinement(
        own_user=own_user,
        no_new_privs=libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        no_capabilities=_has_no_capabilities(libc),
        not_dumpable=libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
        landlock=_take_files_and_network(libc),
        seccomp=_filter_calls(libc),
    )


def hide() -> None:
    """Keep other processes of this user out of this one's memory (PR_SET_DUMPABLE, prctl(2)).

    Nor is there a core dump, which could hold a patient's data.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


@cache
def probe() -> Confinement:
    """Confine a process as a decoding process is, and return what held.

    Raises
    ------
    OSError
        If no process can be started.
    """
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter and module
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
        return Confinement(**json.loads(done.stdout))
    except (ValueError, TypeError, subprocess.TimeoutExpired):
        return Confinement()


def described(found: Confinement) -> str:
    """Return what holds a decoding process, in words."""
    user = "a user of its own" if found.own_user else "the daemon's user"
    text = (
        f"seccomp {'on' if found.seccomp else 'off'}, "
        f"Landlock {f'version {found.landlock}' if found.landlock else 'off'}, {user}"
    )
    return f"{text}; missing: {', '.join(found.missing)}" if found.missing else text


def check_required(found: Confinement) -> None:
    """Refuse a confinement that lacks a part.

    Raises
    ------
    ConfigError
        With what is missing.
    """
    if found.missing:
        raise ConfigError(
            f"require_sandbox is set, and this system does not give the decoders "
            f"{', '.join(found.missing)}: use a kernel with Landlock and seccomp, or unset it"
        )


def _become_nobody() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError:  # root without the capability, as in some containers
        return False
    return True


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for number in range(64):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())


def _has_no_capabilities(libc: ctypes.CDLL) -> bool:
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    return libc.capget(header, sets) == 0 and not any(sets)


def _take_files_and_network(libc: ctypes.CDLL) -> int:
    """Deny everything that this kernel's Landlock knows; return its version, 0 for none."""
    version: int = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1 or len(list(Path("/proc/self/task").iterdir())) != 1:
        return 0
    handled = [
        sum(bits for since, bits in rights.items() if since <= version)
        for rights in (_LANDLOCK_FILES, _LANDLOCK_NETWORK, _LANDLOCK_SCOPED)
    ]
    words = 1 + (version >= min(_LANDLOCK_NETWORK)) + (version >= min(_LANDLOCK_SCOPED))
    ruleset = libc.syscall(
        _LANDLOCK_CREATE_RULESET, (ctypes.c_uint64 * 3)(*handled), ctypes.c_size_t(8 * words), 0
    )
    if ruleset < 0:
        return 0
    try:
        return version if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


class _Instruction(ctypes.Structure):
    """One instruction of a filter (struct sock_filter)."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """A filter (struct sock_fprog)."""

    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


def _instructions(machine: int, architecture: int, pid: int) -> list[tuple[int, int, int, int]]:
    """Return the filter as (code, jump if true, jump if false, value)."""
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == 0:
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for calls, answer in ((_ALLOWED, _ALLOW), (_HOSTILE, _KILL)):
        for numbers in calls.values():
            if (number := numbers[machine]) is not None:
                program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    for numbers in _MAPPING.values():
        program += [
            (_EQUAL, 0, 4, numbers[machine]),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 2 * 8),
            (_ANY_BIT, 0, 1, _PROT_EXEC),
            (_RETURN, 0, 0, _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        ]
    # abort() signals its own process.
    program += [
        (_EQUAL, 0, 3, _TGKILL[machine]),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_EQUAL, 0, 1, pid),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return [*program, (_RETURN, 0, 0, _EPERM)]


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Install the filter of system calls; False where the kernel or the machine has none."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    machine, architecture = _ARCHITECTURES[platform.machine()]
    instructions = _instructions(machine, architecture, os.getpid())
    array = (_Instruction * len(instructions))(*(_Instruction(*line) for line in instructions))
    program = _Program(len(instructions), array)
    status: int = libc.syscall(
        _SECCOMP[machine],
        _SECCOMP_SET_MODE_FILTER,
        _SECCOMP_FILTER_FLAG_TSYNC,
        ctypes.byref(program),
    )
    return status == 0


if __name__ == "__main__":
    os.write(1, json.dumps(asdict(confine())).encode())
    os._exit(0)

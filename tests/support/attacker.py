# ruff: noqa: PTH101, PTH102, PTH104, PTH108, PTH116, PTH208, PTH211
"""Attacks by code in a decoding process; the process loads this file before it is confined.

The test fills in `HOME` and `VICTIM`, another patient's file. An attack that the kernel
refuses raises `OSError`; one that returns has succeeded. None stops or cripples the daemon where
it succeeds (SIGWINCH, PTRACE_SEIZE, no core dumps), so that the test fails and does not hang.
"""

import ctypes
import fcntl
import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lungwatch.errors import FileRejected, Reason

HOME = "/nowhere"
VICTIM = "/nowhere/file"
_LIBC = ctypes.CDLL(None, use_errno=True)
_DAEMON = os.getppid()
_X86 = os.uname().machine == "x86_64"
_PAGE = 4096
# What is there before the process is confined: a descriptor too many, and the environment at its
# start, which stays in memory. Its number is one that no later file gets.
_STRAY = fcntl.fcntl(os.open("/etc/passwd", os.O_RDONLY), fcntl.F_DUPFD, 200)
_ENVIRONMENT = Path("/proc/self/environ").read_bytes()
SECRET = "ATTACKED_SECRET"


def armed(path: Path, home: Path, victim: Path) -> Path:
    """Write this file to a path, with what it attacks filled in, and return the path."""
    source = Path(__file__).read_text()
    for name, before, value in (("HOME", HOME, home), ("VICTIM", VICTIM, victim)):
        line = f'{name} = "{before}"\n'
        assert line in source
        source = source.replace(line, f'{name} = "{value}"\n', 1)
    path.write_text(source)
    return path


def _call(x86: int, arm: int, *args: object) -> None:
    if _LIBC.syscall(x86 if _X86 else arm, *args) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "refused")


def _signal_thread(file: BinaryIO) -> None:
    del file
    _call(234, 131, _DAEMON, _DAEMON, signal.SIGWINCH)


def _executable(file: BinaryIO) -> None:
    del file
    mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def _make_executable(file: BinaryIO) -> None:
    del file
    memory = mmap.mmap(-1, _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _checked(_LIBC.mprotect(ctypes.c_void_p(address), _PAGE, 5))


def _descriptor(file: BinaryIO) -> int:
    return file.raw._descriptor  # type: ignore[attr-defined,no-any-return]


def _by_itself(file: BinaryIO) -> None:
    os.open(f"/proc/self/fd/{_descriptor(file)}", os.O_RDWR)


def _shared(file: BinaryIO) -> None:
    # mmap.mmap() asks for more than the system call; this is the call alone.
    address = _LIBC.mmap(None, _PAGE, 3, mmap.MAP_SHARED, _descriptor(file), 0)
    if ctypes.c_long(address).value == -1:
        raise OSError(ctypes.get_errno(), "refused")


def _write_mapping(file: BinaryIO) -> None:
    _LIBC.mmap.restype = ctypes.c_void_p
    address = _LIBC.mmap(None, _PAGE, 1, mmap.MAP_SHARED, _descriptor(file), 0)
    _checked(_LIBC.mprotect(ctypes.c_void_p(address), _PAGE, 3))


def _secret(file: BinaryIO) -> None:
    del file
    if SECRET.encode() not in _ENVIRONMENT and not os.environ:
        raise OSError("there is none")


def _fork(file: BinaryIO) -> None:
    del file
    if os.fork() == 0:
        os._exit(0)


def _database(mode: int) -> Callable[[BinaryIO], None]:
    return lambda file: os.close(os.open(f"{HOME}/lungwatch.db", mode))


REFUSED: dict[str, Callable[[BinaryIO], object]] = {
    "read another file": lambda file: Path(VICTIM).read_bytes(),
    "read a public file": lambda file: Path("/etc/passwd").read_bytes(),
    "read the database": _database(os.O_RDONLY),
    "write the database": _database(os.O_RDWR),
    "make a file": lambda file: Path(f"{HOME}/done/x").write_bytes(b"x"),
    "list the home": lambda file: os.listdir(HOME),
    "look at a file": lambda file: os.stat(VICTIM),
    "ask whether a file is there": lambda file: _checked(_LIBC.access(VICTIM.encode(), 0)),
    "remove a file": lambda file: os.unlink(VICTIM),
    "rename a file": lambda file: os.rename(VICTIM, VICTIM + "x"),
    "link a file": lambda file: os.link(VICTIM, VICTIM + "x"),
    "make a symbolic link": lambda file: os.symlink("/", HOME + "/incoming/x"),
    "make a folder": lambda file: os.mkdir(HOME + "/incoming/x"),
    "change a file's rights": lambda file: os.chmod(VICTIM, 0o777),
    "change its file's rights": lambda file: os.fchmod(_descriptor(file), 0o777),
    "write to its file": lambda file: os.write(_descriptor(file), b"x"),
    "cut its file": lambda file: os.ftruncate(_descriptor(file), 0),
    "open its file for writing": _by_itself,
    "map its file for writing": _shared,
    "make a mapping of its file writable": _write_mapping,
    "lock its file": lambda file: _checked(_LIBC.flock(_descriptor(file), 2)),
    "write the daemon's memory": lambda file: os.open(f"/proc/{_DAEMON}/mem", os.O_RDWR),
    "read the daemon's environment": lambda file: Path(f"/proc/{_DAEMON}/environ").read_bytes(),
    "take the daemon's descriptors": lambda file: os.listdir(f"/proc/{_DAEMON}/fd"),
    "use a stray descriptor": lambda file: os.pread(_STRAY, 1, 0),
    "read the environment": _secret,
    "signal the daemon": lambda file: os.kill(_DAEMON, signal.SIGWINCH),
    "signal a thread of the daemon": _signal_thread,
    "limit the daemon": lambda file: _checked(
        _LIBC.prlimit(_DAEMON, 4, (ctypes.c_uint64 * 2)(0, 0), None)
    ),
    "fork": _fork,
    "make memory to run": _executable,
    "make memory runnable": _make_executable,
    "become dumpable": lambda file: _checked(_LIBC.prctl(4, 1, 0, 0, 0)),
    "become root": lambda file: os.setresuid(0, 0, 0),
    "take a capability": lambda file: _checked(
        _LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6))
    ),
    "raise its limits": lambda file: _checked(
        _LIBC.setrlimit(1, (ctypes.c_uint64 * 2)(2**64 - 1, 2**64 - 1))
    ),
}


def _try_all(file: BinaryIO) -> None:
    succeeded = []
    for name, attack in REFUSED.items():
        try:
            attack(file)
        except OSError:
            continue
        succeeded.append(name)
    said = json.dumps({"tried": len(REFUSED), "succeeded": succeeded})
    raise FileRejected(Reason.NOT_AN_IMAGE, said)


def _run(file: BinaryIO) -> None:
    del file
    _call(59, 221, b"/bin/true", (ctypes.c_char_p * 1)(None), None)


def _socket(family: int) -> Callable[[BinaryIO], None]:
    return lambda file: _call(41, 198, family, 1, 0)


# Each has the process killed, and so needs a file of its own.
KILLED: dict[str, Callable[[BinaryIO], None]] = {
    "exec": _run,
    "inet": _socket(2),
    "unix": _socket(1),
    "netlink": _socket(16),
    "ptrace": lambda file: _call(101, 117, 0x4206, _DAEMON, 0, 0),
    "vmwrite": lambda file: _call(311, 271, _DAEMON, None, 0, None, 0, 0),
    "vmread": lambda file: _call(310, 270, _DAEMON, None, 0, None, 0, 0),
    "pidfd": lambda file: _call(434, 434, _DAEMON, 0),
    "uring": lambda file: _call(425, 425, 1, ctypes.create_string_buffer(256)),
    "bpf": lambda file: _call(321, 280, 0, None, 0),
    "unshare": lambda file: _call(272, 97, 0x10000000),
    "mount": lambda file: _call(165, 40, b"a", b"/", b"tmpfs", 0, None),
    "keyctl": lambda file: _call(250, 219, 0, 0, 0),
    "memfd": lambda file: _call(319, 279, b"a", 0),
    "userfault": lambda file: _call(323, 282, 0),
    **({"x32": lambda file: _call(0x40000000 + 39, 0)} if _X86 else {}),
}


def _escape(attack: Callable[[BinaryIO], None]) -> Callable[[BinaryIO], None]:
    def tried(file: BinaryIO) -> None:
        try:
            attack(file)
        except OSError as error:
            raise FileRejected(Reason.NOT_AN_IMAGE, f"not killed, errno {error.errno}") from None
        raise FileRejected(Reason.NOT_AN_IMAGE, "succeeded")

    return tried


ATTACKS: dict[bytes, Callable[[BinaryIO], None]] = {
    b"all": _try_all,
    **{name.encode(): _escape(attack) for name, attack in KILLED.items()},
}

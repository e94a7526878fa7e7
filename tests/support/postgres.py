"""A PostgreSQL server that is started where one is installed, and thrown away after."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The server refuses to run as root; Debian's package brings this user.
_USER = "postgres"
_SETTINGS = ("listen_addresses=", "max_connections=40")
# Where nothing of it has to outlive a crash.
_FAST = ("fsync=off", "full_page_writes=off")
_PATIENCE_S = 120


def find_programs() -> Path | None:
    """Return the folder of the newest server's programs, None without one that can be run."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    if not found or not shutil.which("setpriv") or (os.geteuid() == 0 and not _has_user()):
        return None
    return found[-1].parent


def _has_user() -> bool:
    try:
        pwd.getpwnam(_USER)
    except KeyError:
        return False
    return True


class Server:
    """A server of its own, reached by a socket in its own folder.

    Parameters
    ----------
    programs
        See `find_programs`.
    is_durable
        Whether its database has to outlive a crash, which costs time.
    """

    def __init__(self, programs: Path, *, is_durable: bool = False) -> None:
        self._programs = programs
        settings = _SETTINGS if is_durable else (*_SETTINGS, *_FAST)
        self._options = [part for setting in settings for part in ("-c", setting)]
        # Not pytest's own folders: those are root's alone, and a socket's path must be short.
        self._root = Path(tempfile.mkdtemp(prefix="lw-pg-"))
        # Should the tests be killed, their server stops at once, too.
        self._drop = ["setpriv", "--pdeathsig", "QUIT"]
        if os.geteuid() == 0:
            account = pwd.getpwnam(_USER)
            os.chown(self._root, account.pw_uid, account.pw_gid)
            self._drop += [f"--reuid={_USER}", f"--regid={account.pw_gid}", "--clear-groups"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its database."""
        return f"postgresql://{_USER}@/postgres?host={self._root}"

    def create(self) -> None:
        """Make its database."""
        options = ("-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        if self._run("initdb", "-D", f"{self._root}/data", *options).wait(_PATIENCE_S):
            raise RuntimeError(self._log())

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        data = ("-D", f"{self._root}/data", "-k", str(self._root))
        self._process = self._run("postgres", *data, *self._options)
        deadline = time.monotonic() + _PATIENCE_S
        while self._run("pg_isready", "-q", "-h", str(self._root)).wait(_PATIENCE_S):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self._log())
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all of its processes at once."""
        if self._process is not None:
            # Each has a session of its own; the first one's death they would survive for a while.
            pid = self._process.pid
            others = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for number in (pid, *map(int, others)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            self._process.wait(_PATIENCE_S)

    def remove(self) -> None:
        """Stop it, and remove all that it has written."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(_PATIENCE_S)
        shutil.rmtree(self._root, ignore_errors=True)

    def _run(self, program: str, *args: str) -> subprocess.Popen[bytes]:
        with (self._root / "log").open("ab") as log:
            return subprocess.Popen(
                [*self._drop, self._programs / program, *args],
                cwd=self._root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _log(self) -> str:
        return (self._root / "log").read_text(errors="replace")


@contextmanager
def running(programs: Path, *, is_durable: bool = False) -> Iterator[Server]:
    """Run a server for as long as the context lasts."""
    server = Server(programs, is_durable=is_durable)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.remove()

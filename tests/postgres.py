"""A PostgreSQL server for the tests alone, started where one is installed and thrown away after."""

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
# Nothing of it outlives the tests.
_FAST = [
    part
    for setting in ("listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=40")
    for part in ("-c", setting)
]
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


@contextmanager
def cluster(programs: Path) -> Iterator[str]:
    """Run a server of its own, reached by a socket in its own folder; yields its URL."""
    # Not pytest's own folders: those are root's alone, and a socket's path must be short.
    root = Path(tempfile.mkdtemp(prefix="lw-pg-"))
    # Should the tests be killed, their server stops at once, too.
    drop = ["setpriv", "--pdeathsig", "QUIT"]
    if os.geteuid() == 0:
        account = pwd.getpwnam(_USER)
        os.chown(root, account.pw_uid, account.pw_gid)
        drop += [f"--reuid={_USER}", f"--regid={account.pw_gid}", "--clear-groups"]

    def start(program: str, *args: str) -> subprocess.Popen[bytes]:
        with (root / "log").open("ab") as log:
            return subprocess.Popen(
                [*drop, programs / program, *args],
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def check(process: subprocess.Popen[bytes]) -> None:
        if process.wait(_PATIENCE_S):
            raise RuntimeError((root / "log").read_text(errors="replace"))

    try:
        data = ("-D", f"{root}/data")
        options = ("-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        check(start("initdb", *data, *options))
        server = start("postgres", *data, "-k", str(root), *_FAST)
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while start("pg_isready", "-q", "-h", str(root)).wait(_PATIENCE_S):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((root / "log").read_text(errors="replace"))
                time.sleep(0.05)
            yield f"postgresql://{_USER}@/postgres?host={root}"
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(_PATIENCE_S)
    finally:
        shutil.rmtree(root, ignore_errors=True)

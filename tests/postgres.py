"""A PostgreSQL server for the tests alone, started where one is installed and thrown away after."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The server refuses to run as root; Debian's package brings this user.
_USER = "postgres"
# Nothing of it outlives the tests.
_FAST = "-c listen_addresses='' -c fsync=off -c full_page_writes=off -c max_connections=40"


def find_programs() -> Path | None:
    """Return the folder of the newest server's programs, None without one that can be run."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    if not found or (os.geteuid() == 0 and not (_has_user() and shutil.which("setpriv"))):
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
    drop = []
    if os.geteuid() == 0:
        account = pwd.getpwnam(_USER)
        os.chown(root, account.pw_uid, account.pw_gid)
        drop = ["setpriv", f"--reuid={_USER}", f"--regid={account.pw_gid}", "--clear-groups"]

    def call(program: str, *args: str) -> None:
        # To a file: the server keeps what it inherits open.
        with (root.parent / f"{root.name}.log").open("ab") as log:
            subprocess.run(
                [*drop, programs / program, "-D", root / "data", *args],
                check=True,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=120,
            )

    try:
        call("initdb", "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        call("pg_ctl", "-w", "-o", f"{_FAST} -k {root}", "start")
        try:
            yield f"postgresql://{_USER}@/postgres?host={root}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)
        (root.parent / f"{root.name}.log").unlink(missing_ok=True)

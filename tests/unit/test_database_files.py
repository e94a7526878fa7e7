"""Looks at the files of an open SQLite database, which must not take SQLite's locks away."""

import sqlite3
import subprocess
import sys
from contextlib import closing

from lungwatch.db.identity import SqliteFiles

# The byte that every connection holds a shared lock on (SQLite's wal.c and os_unix.c: DMS).
_ASK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as index:
    fcntl.lockf(index, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)
"""


def is_locked(index):
    ask = [sys.executable, "-c", _ASK, index]
    return b"BlockingIOError" in subprocess.run(ask, capture_output=True, check=False).stderr


def test_a_look_at_the_files_of_a_database_leaves_its_locks_in_force(tmp_path):
    """Without them another process that opens the database damages it."""
    path = tmp_path / "x.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("CREATE TABLE t (a)")
        files = SqliteFiles(path)
        assert is_locked(f"{path}-shm")
        assert files.problem() == ""
        assert is_locked(f"{path}-shm")
        files.close()
    assert not (tmp_path / "x.db-shm").exists()

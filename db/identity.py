"""The database's identity: its files, its random id, and the lease of the one daemon that writes.

A daemon keeps a SQLite file open that another program removes or replaces, and would go on to
write into what nobody sees any more; two homes with one database would each take the other's rows
for their own. Both are looked for inside every transaction, before the commit and after it.

The lease is told by its counter, not by a time of expiry: whoever wants it watches the counter
stand still for the length of a lease, by a clock of its own that nobody sets. The holder needs no
clock at all, since a transaction of its own that finds another token in the row is rolled back
(fencing, as in Kleppmann, "How to do distributed locking", 2016).
"""

import contextlib
import os
import sqlite3
import struct
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, event, exc, select, update

from lungwatch.db.engine import (
    GUARD,
    DatabaseReplacedError,
    columns_for,
    connect_existing,
    describe_url,
    insert_if_new,
    reading,
    writing,
)
from lungwatch.db.models import LeaseHolding
from lungwatch.errors import DatabaseError
from lungwatch.files import replacing

# "WAL-Index header" of https://sqlite.org/walformat.html, in the machine's byte order: version,
# unused, change counter, flags, page size, last valid frame, pages of the database.
_WAL_INDEX = struct.Struct("=IIIBBHII")
_WAL_HEADER, _FRAME_HEADER = 32, 24
_MOST_DESCRIPTORS = 4096  # it is opened early, and they are numbered from 0
_LARGEST_PAGE = 65536  # written as 1
_UNREADABLE_IN_A_ROW = 3


class LeaseLostError(DatabaseError):
    """Another daemon has taken over the database; this one writes nothing more."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The row of the lease.

    Attributes
    ----------
    database_id
        Random, of the database.
    counter
        Advanced by every acquisition and renewal.
    token
        Random, of the process that holds it; None if it was given back.
    place, home_inode
        Machine and folder of the holder's home, and the folder's inode number.
    scope, pid, started
        The holder's process: boot and PID namespace, number, start in clock ticks.
    """

    database_id: str
    counter: int
    token: str | None = None
    place: str | None = None
    home_inode: str | None = None
    scope: str | None = None
    pid: int | None = None
    started: str | None = None

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to have ended; False where that cannot be told."""
        if self.pid is None or self.scope != process_scope():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's
        started = process_start(self.pid)
        return started is not None and started != self.started


def process_scope() -> str:
    """Return what makes a process number mean one process: this boot and PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return str(uuid.uuid4())  # no other process is in a scope that cannot be told


def process_start(pid: int) -> str | None:
    """Return when a process started, in clock ticks since the boot; None if that is hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name, in parentheses, may hold anything (proc_pid_stat(5)).
    return stat.rpartition(")")[2].split()[19]


def read_lease(engine: Engine) -> Lease | None:
    """Return the lease's row, None for a database that no daemon has worked with yet."""
    with reading(engine) as connection:
        return _read(connection)


def acquire_lease(
    engine: Engine, found: Lease | None, *, place: str, home_inode: str
) -> Lease | None:
    """Take the lease if its row is still as it was found.

    Parameters
    ----------
    found
        The row as `read_lease` returned it; the caller has made sure that its holder is gone.
    place, home_inode
        Of this process's home.

    Returns
    -------
    Lease or None
        The lease as it is held now; None if another process was faster.
    """
    with writing(engine) as connection:
        if found is None:
            insert_if_new(
                connection,
                LeaseHolding,
                ("id",),
                {"id": 1, "database_id": str(uuid.uuid4()), "counter": 0},
            )
            found = _read(connection)
            assert found is not None
        pid = os.getpid()
        held = Lease(
            database_id=found.database_id,
            counter=found.counter + 1,
            token=str(uuid.uuid4()),
            place=place,
            home_inode=home_inode,
            scope=process_scope(),
            pid=pid,
            started=process_start(pid),
        )
        is_taken = _replace(connection, found, held)
    return held if is_taken else None


def _read(connection: Connection) -> Lease | None:
    row = connection.execute(select(*columns_for(Lease, LeaseHolding))).one_or_none()
    return None if row is None else Lease(**row._mapping)  # noqa: SLF001 - SQLAlchemy's public name


def _replace(connection: Connection, found: Lease, held: Lease) -> bool:
    """Write a row in place of the one that was found, by compare-and-set."""
    changed = connection.execute(
        update(LeaseHolding)
        .where(
            LeaseHolding.id == 1,
            LeaseHolding.database_id == found.database_id,
            LeaseHolding.counter == found.counter,
            LeaseHolding.token.is_(None)
            if found.token is None
            else LeaseHolding.token == found.token,
        )
        .values({name: getattr(held, name) for name in Lease.__dataclass_fields__})
    )
    return changed.rowcount == 1


class SqliteFiles:
    """The files of an open SQLite database, compared with what their paths lead to now.

    Parameters
    ----------
    path
        The database; it exists.
    """

    def __init__(self, path: Path) -> None:
        self._paths = (path, Path(f"{path}-wal"), Path(f"{path}-shm"))
        # While it is open SQLite neither removes the log nor makes a new one.
        self._anchor = connect_existing(path, timeout_s=1.0)
        self._anchor.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        self._identities = [_identity(one) for one in self._paths]
        self._index = _own_descriptor(self._identities[2])
        self._size = path.stat().st_size
        self._lock = threading.Lock()

    def problem(self) -> str:
        """Say what has become of a file; empty if all are as they were."""
        for path, known in zip(self._paths, self._identities, strict=True):
            found = _identity(path)
            if found != known:
                return f"{path} {'is gone' if found is None else 'is another file than the open'}"
        return self._truncation()

    def _truncation(self) -> str:
        """Say which file is shorter than the log's index has it."""
        database, log, _ = self._paths
        index = self._index
        if index is None:
            return ""
        try:
            for _ in range(_UNREADABLE_IN_A_ROW):
                before = _index_header(index)
                size, logged = database.stat().st_size, log.stat().st_size
                if before != _index_header(index):
                    continue  # a checkpoint shortens the log after the index
                page, frames, pages = before
                if frames and logged < _WAL_HEADER + frames * (_FRAME_HEADER + page):
                    return f"{log} was truncated"
                with self._lock:
                    is_shorter = size < self._size and size < pages * page
                    if not is_shorter:
                        self._size = size
                return f"{database} was truncated" if is_shorter else ""
        except OSError as error:
            return f"the database's files cannot be looked at ({error.strerror})"
        return ""

    def save(self, target: Path) -> None:
        """Copy what the open files hold, which may be all that is left of it.

        Raises
        ------
        sqlite3.Error, OSError
            If it cannot be copied.
        """
        with replacing(target) as temporary, contextlib.closing(sqlite3.connect(temporary)) as copy:
            self._anchor.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")

    def close(self) -> None:
        """Close the connection that keeps the log's identity."""
        self._anchor.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _own_descriptor(identity: tuple[int, int] | None) -> int | None:
    """Return the descriptor that SQLite itself has of a file of this device and inode.

    To open the log's index once more and close it would take SQLite's locks on it away from the
    whole process (fcntl(2)): another process that opens the database would then rebuild the index
    under the daemon, and the database would be damaged.
    """
    for descriptor in range(_MOST_DESCRIPTORS):
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) == identity:
                return descriptor
    return None


def _index_header(index: int) -> tuple[int, int, int]:
    """Return page size, valid frames of the log, and pages of the database."""
    data = os.pread(index, _WAL_INDEX.size, 0)
    if len(data) < _WAL_INDEX.size:
        raise OSError(0, "the log's index was truncated")
    *_, page, frames, pages = _WAL_INDEX.unpack(data)
    return _LARGEST_PAGE if page == 1 else page, frames, pages


class DatabaseGuard:
    """Sees to it that transactions change the database that was opened, as its only daemon.

    Parameters
    ----------
    engine
        Of the database that `lease` was acquired in.

    Attributes
    ----------
    engine
        The engine whose transactions are guarded; others of the same database are not.
    """

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._plain = engine
        self._lease = lease
        self._seen = lease.counter  # of the main file, without its log
        self._unreadable = 0
        self._path = Path(engine.url.database or "") if engine.dialect.name == "sqlite" else None
        self._files: SqliteFiles | None = None
        if self._path is not None:
            with contextlib.closing(connect_existing(self._path, timeout_s=1.0)) as connection:
                # So that the file itself holds the counter, which a copy from before does not.
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._files = SqliteFiles(self._path)
        event.listen(engine, "connect", self._check_new)
        self.engine = engine.execution_options(**{GUARD: self})

    def _check_new(self, _connection: object, _record: object) -> None:
        self.check_files()

    def check_files(self) -> None:
        """Refuse files other than those that were opened.

        Raises
        ------
        DatabaseReplacedError
            If one was removed, replaced or truncated.
        """
        if self._files is not None and (problem := self._files.problem()):
            raise self._replaced(problem)

    def check(self, connection: Connection) -> None:
        """Refuse a transaction unless this process holds the lease in it.

        On PostgreSQL the row is locked, so that nobody takes the lease over before the commit.

        Raises
        ------
        DatabaseReplacedError
            If the database is another, or an earlier copy of itself.
        LeaseLostError
            If another daemon has taken it over.
        """
        self.check_files()
        statement = select(*columns_for(Lease, LeaseHolding)).with_for_update(read=True)
        try:
            row = connection.execute(statement).one_or_none()
        except exc.ProgrammingError as error:
            raise self._replaced("it has no lease, so it is another database") from error
        except exc.OperationalError as error:
            if "no such table" in str(error.orig):
                raise self._replaced("it has no lease, so it is another database") from error
            raise
        self._judge(None if row is None else Lease(**row._mapping))  # noqa: SLF001 - public name

    def inspect(self) -> None:
        """Look at the database from outside of any transaction, as another process finds it.

        Raises
        ------
        DatabaseReplacedError, LeaseLostError
            As `check`.
        DatabaseError
            If it cannot be read.
        """
        self.check_files()
        if self._path is not None:
            self._inspect_main_file(self._path)
        with reading(self.engine) as connection:
            self.check(connection)

    def renew(self) -> None:
        """Advance the counter.

        Raises
        ------
        DatabaseReplacedError, LeaseLostError
            As `check`.
        DatabaseError
            If it cannot be written.
        """
        with writing(self.engine) as connection:
            held = self._lease
            renewed = Lease(**{**vars(held), "counter": held.counter + 1})
            # A second try after a COMMIT whose answer was lost finds it renewed.
            if not _replace(connection, held, renewed) and not _replace(
                connection, renewed, renewed
            ):
                raise LeaseLostError(self._taken(None))
        self._lease = renewed

    def release(self) -> None:
        """Give the lease back, so that the next daemon need not wait.

        Raises
        ------
        DatabaseError
            If it cannot be written.
        """
        held = self._lease
        with writing(self.engine) as connection:
            free = Lease(database_id=held.database_id, counter=held.counter + 1)
            _replace(connection, held, free)

    def save(self, target: Path) -> bool:
        """Copy what this process still has open of a SQLite file; return whether it did.

        Raises
        ------
        sqlite3.Error, OSError
            If it cannot be copied.
        """
        if self._files is None:
            return False
        self._files.save(target)
        return True

    def close(self) -> None:
        """Stop guarding."""
        event.remove(self._plain, "connect", self._check_new)
        if self._files is not None:
            self._files.close()

    def _inspect_main_file(self, path: Path) -> None:
        """Refuse another database that was written into the open file, under its log.

        The log hides the file's pages from ordinary connections, so it is read as it is.
        """
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                row = connection.execute("SELECT database_id, counter FROM lease").fetchone()
        except sqlite3.Error as error:
            # A checkpoint writes pages at this moment; but not at every one.
            self._unreadable += 1
            if self._unreadable >= _UNREADABLE_IN_A_ROW:
                raise self._replaced(f"{path} was overwritten") from error
            return
        self._unreadable = 0
        if row is None or row[0] != self._lease.database_id:
            raise self._replaced(f"another database was written into {path}")
        if row[1] < self._seen:
            raise self._replaced(f"an earlier copy was written into {path}")
        self._seen = row[1]

    def _judge(self, found: Lease | None) -> None:
        if found is None or found.database_id != self._lease.database_id:
            raise self._replaced("it is another database")
        # Renewals of this process may be under way in another thread.
        if found.token == self._lease.token and found.counter >= self._lease.counter:
            return
        if found.counter <= self._lease.counter:
            raise self._replaced("it is an earlier copy of itself")
        raise LeaseLostError(self._taken(found.place))

    def _taken(self, place: str | None) -> str:
        return (
            f"the database {describe_url(self._plain.url)} was taken over by another daemon"
            f"{f' ({place})' if place else ''}: this one stops; give each home a database of its "
            "own, or keep one of the two stopped"
        )

    def _replaced(self, what: str) -> DatabaseReplacedError:
        return DatabaseReplacedError(
            f"the database {describe_url(self._plain.url)} is not the one that was opened: {what}; "
            "put the right one back, or stop the daemon and run `lungwatch backup restore`"
        )

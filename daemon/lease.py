"""A daemon's hold on its database: the lease, its renewal, and the watch over the files."""

import contextlib
import itertools
import logging
import socket
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.home import Home, database_lies_within
from lungwatch.daemon.logs import event
from lungwatch.daemon.retry import Clock, OutageKind, Outages, TimeLimited
from lungwatch.daemon.stage import OnCrash, Worker
from lungwatch.db.engine import DatabaseReplacedError, describe_url
from lungwatch.db.identity import DatabaseGuard, Lease, LeaseLostError, acquire_lease, read_lease
from lungwatch.errors import DatabaseError, HomeError, LungwatchError, describe

_POLL_S = 1.0
_RENEWALS = 3  # within the length of a lease
_RELEASE_S = 3.0


def take_lease(
    home: Home, engine: Engine, *, lease_s: float, clock: Clock, stopped: Callable[[float], bool]
) -> DatabaseGuard:
    """Acquire the database for this process; the home must be locked.

    Parameters
    ----------
    lease_s
        How long the lease of a holder that may be alive must not have been renewed.
    stopped
        Waits so many seconds, and tells whether the service stops meanwhile.

    Raises
    ------
    HomeError
        If another daemon works with it.
    """
    place = f"{socket.gethostname()}:{home.root.absolute()}"
    inode = str(home.root.stat().st_ino)
    found = read_lease(engine)
    if found is not None and found.token is not None and not _is_over(home, engine, found):
        _wait_out(engine, found, lease_s=lease_s, clock=clock, stopped=stopped)
        found = read_lease(engine)
    lease = acquire_lease(engine, found, place=place, home_inode=inode)
    if lease is None:
        raise _in_use(engine, read_lease(engine))
    return DatabaseGuard(engine, lease)


def _is_over(home: Home, engine: Engine, found: Lease) -> bool:
    # Whoever worked with a database within the home held the home's lock, which is ours now.
    return found.is_dead or database_lies_within(home, engine)


def _wait_out(
    engine: Engine,
    first: Lease,
    *,
    lease_s: float,
    clock: Clock,
    stopped: Callable[[float], bool],
) -> None:
    """Wait until a lease has not been renewed for its length, by this process's clock."""
    event("lease_awaited", level=logging.WARNING, holder=first.place, most_s=lease_s)
    until_s = clock.monotonic() + lease_s
    while clock.monotonic() < until_s:
        if stopped(min(_POLL_S, lease_s)):
            raise _in_use(engine, first)
        found = read_lease(engine)
        if found is None or found.token is None or found.is_dead:
            return
        if (found.token, found.counter) != (first.token, first.counter):
            raise _in_use(engine, found)


def _in_use(engine: Engine, holder: Lease | None) -> HomeError:
    place = holder.place if holder is not None else "another home"
    return HomeError(
        f"the database {describe_url(engine.url)} is in use by another daemon ({place}): "
        "stop that one, or give this home a database of its own"
    )


class DatabaseWatch:
    """Thread that looks at the database every second, and renews the lease.

    What is wrong with it is an outage while it lasts; a lease that is lost stops the service.
    """

    def __init__(
        self,
        guard: DatabaseGuard,
        home: Home,
        *,
        lease_s: float,
        clock: Clock,
        outages: Outages,
        on_crash: OnCrash,
    ) -> None:
        self._guard = guard
        self._home = home
        self._renew_s = lease_s / _RENEWALS
        self._clock = clock
        self._outages = outages
        self._stopped = threading.Event()
        self._problem = ""
        self._saved: Path | None = None
        self._thread = Worker("lease", self._run, on_crash)
        self.start = self._thread.start

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_RELEASE_S)
        # Where it fails the next daemon waits for the lease's end.
        with contextlib.suppress(LungwatchError, TimeoutError):
            TimeLimited(self._guard.release, limit_s=_RELEASE_S)()
        self._guard.close()

    def _run(self) -> None:
        renewed_s = self._clock.monotonic()
        while not self._stopped.wait(min(_POLL_S, self._renew_s)):
            try:
                self._guard.inspect()
                if self._clock.monotonic() - renewed_s >= self._renew_s:
                    self._guard.renew()
                    renewed_s = self._clock.monotonic()
            except LeaseLostError:
                raise
            except DatabaseReplacedError as error:
                self._begin(error)
            except DatabaseError:
                pass  # locked or out of reach: whatever needs it waits
            else:
                self._end()

    def _begin(self, error: DatabaseReplacedError) -> None:
        if not self._problem:
            self._problem = describe(error)
            self._outages.begin(OutageKind.DATABASE_REPLACED, self._problem)
            self._save()

    def _end(self) -> None:
        if self._problem:
            self._problem = ""
            self._outages.end(OutageKind.DATABASE_REPLACED)

    def _save(self) -> None:
        """Copy what is still open, once a process: it ends with the process."""
        if self._saved is not None:
            return
        folder = self._home.backups
        names = (folder / f"rescued-{n}.db" for n in itertools.count(1))
        target = next(path for path in names if not path.exists())
        try:
            folder.mkdir(exist_ok=True)
            if self._guard.save(target):
                self._saved = target
                event("database_saved", level=logging.WARNING, file=f"backups/{target.name}")
        except (sqlite3.Error, OSError):
            event("database_not_saved", level=logging.ERROR)

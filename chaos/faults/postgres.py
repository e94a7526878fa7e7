"""The record is in a PostgreSQL database, and the daemon is killed, or the server is."""

import importlib.util
from collections.abc import Iterator
from typing import ClassVar

from chaos.fault import Lab, PassingFault, Trial
from chaos.faults.kill import KillAtRandom
from chaos.place import Place
from tests.support.postgres import Server, find_programs, running


class KillWithPostgres(KillAtRandom):
    """At any moment, so that the server has to undo what was begun."""

    name: ClassVar[str] = "killed at random, PostgreSQL"
    how: ClassVar[str] = (
        "SIGKILL of the daemon as above; its database is a PostgreSQL server of its own, which "
        "is not killed"
    )
    counts: ClassVar[tuple[int, int]] = (200, 1000)

    def obstacle(self) -> str | None:
        """The server is no part of lungwatch."""
        return _obstacle()

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Kill under load in one home, with a server that is thrown away after."""
        programs = find_programs()
        assert programs is not None
        with running(programs) as server:
            place = lab.place(DATABASE_URL=server.url)
            try:
                trial = self.trial(lab, place)
            finally:
                place.kill()
        yield trial
        lab.clear(place, trial.audit)


class KillServer(PassingFault):
    """The server dies with everything that it was doing, and comes back."""

    name: ClassVar[str] = "PostgreSQL server killed"
    how: ClassVar[str] = (
        "SIGKILL of all of the server's processes under load (fsync on); it is started again "
        "after 3 s"
    )
    hold_s: ClassVar[float] = 3.0
    runs: ClassVar[tuple[int, int]] = (5, 30)
    sign: ClassVar[str] = "action=database_away"
    _server: Server

    def obstacle(self) -> str | None:
        """The server is no part of lungwatch."""
        return _obstacle()

    def inject(self, place: Place) -> None:  # noqa: ARG002
        """Kill it."""
        self._server.kill()

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Start it again."""
        self._server.start()

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """A server and a home of its own for each."""
        programs = find_programs()
        assert programs is not None
        for run in range(lab.times(*self.runs)):
            with running(programs, is_durable=True) as self._server:
                place = lab.place(DATABASE_URL=self._server.url)
                try:
                    trial = self._trial(place, run)
                finally:
                    place.kill()
            yield trial
            lab.clear(place, trial.audit)


def _obstacle() -> str | None:
    if find_programs() is None:
        return "needs a PostgreSQL server's programs (Debian: postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "needs the extra 'postgres'"
    return None

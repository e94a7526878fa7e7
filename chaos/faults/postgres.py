"""The process is killed while its record is in a PostgreSQL database."""

import importlib.util
from collections.abc import Iterator
from typing import ClassVar

from chaos.fault import Lab, Trial
from chaos.faults.kill import KillAtRandom
from tests.postgres import cluster, find_programs


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
        if find_programs() is None:
            return "needs a PostgreSQL server's programs (Debian: postgresql)"
        if importlib.util.find_spec("psycopg") is None:
            return "needs the extra 'postgres'"
        return None

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Kill under load in one home, with a server that is thrown away after."""
        programs = find_programs()
        assert programs is not None
        with cluster(programs) as url:
            place = lab.place(DATABASE_URL=url)
            try:
                trial = self.trial(lab, place)
            finally:
                place.kill()
        yield trial
        lab.clear(place, trial.audit)

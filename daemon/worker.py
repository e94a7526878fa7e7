"""A thread whose death is noticed."""

import threading
from collections.abc import Callable

from lungwatch.daemon.outage import Abandoned


class Worker(threading.Thread):
    """Runs a function; an exception that escapes it is reported, not printed and forgotten.

    Parameters
    ----------
    name
        For the log.
    work
        Runs until it returns.
    on_crash
        Called with the thread's name and the exception. The service stops then: a daemon
        that has lost a stage must not go on taking files.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        on_crash: Callable[[str, BaseException], None],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_crash = on_crash

    def run(self) -> None:
        """Run the work and report how it failed, if it did."""
        try:
            self._work()
        except Abandoned:
            return  # the service ends; what is in hand stays claimed
        except BaseException as error:  # nothing may die unseen
            self._on_crash(self.name, error)

"""The one thread that writes to the database."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lungwatch.daemon.clock import SystemClock
from lungwatch.daemon.outage import Outages
from lungwatch.daemon.vitals import Vitals
from lungwatch.daemon.worker import Worker

T = TypeVar("T")


class Writer:
    """Runs the store's transactions one after the other, for whichever thread asks.

    SQLite takes one writer at a time; a queue in front of it is fair where its lock is not.
    """

    def __init__(
        self,
        outages: Outages,
        on_crash: Callable[[str, BaseException], None],
        vitals: Vitals | None = None,
    ) -> None:
        self._outages = outages
        self._vitals = vitals or Vitals(SystemClock())
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._vitals.watch_queue("database", self._jobs.qsize)
        self._thread = Worker("writer", self._run, on_crash)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def call(self, transaction: Callable[[], T]) -> T:
        """Run a transaction on the writer's thread and return, or raise, what it does.

        It is repeated for as long as the database is out of reach or the disk is full.
        """
        future: Future[T] = Future()
        self._jobs.put((transaction, future))
        return future.result()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            transaction, future = job
            try:
                with self._vitals.busy("database"):
                    result = self._outages.ride_out(transaction)
                future.set_result(result)
            # Whoever asked decides what the error means; this thread goes on serving.
            except Exception as error:
                future.set_exception(error)

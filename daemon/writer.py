"""The one thread that writes to the database."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lungwatch.daemon.worker import Worker

T = TypeVar("T")


class Writer:
    """Runs the store's transactions one after the other, for whichever thread asks.

    SQLite takes one writer at a time; a queue in front of it is fair where its lock is not.
    """

    def __init__(self, on_crash: Callable[[str, BaseException], None]) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._thread = Worker("writer", self._run, on_crash)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def call(self, transaction: Callable[[], T]) -> T:
        """Run a transaction on the writer's thread and return, or raise, what it does."""
        future: Future[T] = Future()
        self._jobs.put((transaction, future))
        return future.result()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            transaction, future = job
            try:
                future.set_result(transaction())
            # Whoever asked decides what the error means; this thread goes on serving.
            except Exception as error:
                future.set_exception(error)

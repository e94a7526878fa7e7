"""A look at something that may hang: a locked database, a dead server's disk."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Bounded(Generic[T]):
    """Asks on a thread of its own, and waits for the answer no longer than it may.

    One that hangs is not asked a second time: whoever comes meanwhile waits for the same
    answer, so that hanging threads cannot pile up. For all threads.

    Parameters
    ----------
    ask
        May hang and may raise.
    limit_s
        Seconds to wait.
    """

    def __init__(self, ask: Callable[[], T], *, limit_s: float) -> None:
        self._ask = ask
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._answer: Future[T] | None = None

    def __call__(self) -> T:
        """Return the answer.

        Raises
        ------
        TimeoutError
            If there is none in time.
        Exception
            Whatever asking raises.
        """
        with self._lock:
            answer = self._answer
            if answer is None or answer.done():
                answer = self._answer = Future()
                # A daemon thread: one that hangs must not keep the process.
                threading.Thread(target=self._run, args=(answer,), name="look", daemon=True).start()
        return answer.result(self._limit_s)

    def _run(self, answer: Future[T]) -> None:
        try:
            answer.set_result(self._ask())
        # Whoever waits decides what the error means.
        except Exception as error:
            answer.set_exception(error)

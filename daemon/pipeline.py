"""The stages between claim and end, each on threads of its own, joined by queues."""

import errno
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from lungwatch.daemon.clock import Clock
from lungwatch.daemon.config import Config
from lungwatch.daemon.crashpoint import crashpoint
from lungwatch.daemon.decoding import prepare
from lungwatch.daemon.filing import Filing
from lungwatch.daemon.finishing import Finisher
from lungwatch.daemon.home import Home
from lungwatch.daemon.inference import batches, classify
from lungwatch.daemon.inflight import InFlight
from lungwatch.daemon.logs import event
from lungwatch.daemon.model import Classifier
from lungwatch.daemon.records import Claimed, Classified, Prepared
from lungwatch.daemon.unpacking import Unpacker
from lungwatch.daemon.worker import Worker
from lungwatch.daemon.writer import Writer
from lungwatch.db.store import Store
from lungwatch.errors import FileRejected, ProcessingFailed, Reason, TransientError

# Troubles of a busy or remote file system that pass by themselves. A full disk is not among
# them: it stops the service, whose start then says how much space it wants.
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_FIRST_DELAY_S = 0.5

T = TypeVar("T")


class Pipeline:
    """Decode pool → one inference thread → overlay pool.

    The queues are unbounded; what bounds the memory is that a file holds a slot of
    `in_flight` from before its claim to its end.
    """

    def __init__(
        self,
        *,
        home: Home,
        config: Config,
        classifier: Classifier,
        store: Store,
        writer: Writer,
        filing: Filing,
        finisher: Finisher,
        in_flight: InFlight,
        clock: Clock,
        on_crash: Callable[[str, BaseException], None],
    ) -> None:
        self._config = config
        self._classifier = classifier
        self._store = store
        self._writer = writer
        self._filing = filing
        self._finisher = finisher
        self._in_flight = in_flight
        self._clock = clock
        self._unpacker = Unpacker(home, config.read_policy)
        self._abandoned = threading.Event()
        self._to_decode: queue.Queue[Claimed | None] = queue.Queue()
        self._to_classify: queue.Queue[Prepared | None] = queue.Queue()
        self._to_finish: queue.Queue[Classified | None] = queue.Queue()
        self._decoders = [
            Worker(f"decode-{number}", self._decode_loop, on_crash)
            for number in range(config.decode_workers)
        ]
        self._inference = Worker("inference", self._inference_loop, on_crash)
        self._finishers = [
            Worker(f"overlay-{number}", self._finish_loop, on_crash)
            for number in range(config.overlay_workers)
        ]

    def start(self) -> None:
        """Start the threads, the last stage first."""
        for worker in (*self._finishers, self._inference, *self._decoders):
            worker.start()

    def submit(self, claim: Claimed) -> None:
        """Hand a claimed file to the first stage. It holds a slot, and gives it back."""
        self._to_decode.put(claim)

    def stop(self, drain_s: float) -> None:
        """Wait for what is in flight, at most `drain_s` seconds, and end the threads.

        What is not finished then stays claimed; the next start takes it up.
        """
        drained = self._in_flight.wait_empty(drain_s)
        self._abandoned.set()
        for _ in self._decoders:
            self._to_decode.put(None)
        self._to_classify.put(None)
        for _ in self._finishers:
            self._to_finish.put(None)
        if drained:
            for worker in (*self._decoders, self._inference, *self._finishers):
                worker.join()

    def _decode_loop(self) -> None:
        while (claim := self._to_decode.get()) is not None:
            prepared = self._guarded(claim, partial(self._prepare, claim))
            if prepared is not None:
                crashpoint("decoded")
                self._to_classify.put(prepared)

    def _prepare(self, claim: Claimed) -> Prepared:
        self._unpacker.unpack(claim.path, claim.sha256)
        return prepare(
            claim,
            policy=self._config.read_policy,
            spec=self._classifier.contract.preprocess,
            overlay_side_px=self._config.overlay_side_px,
        )

    def _inference_loop(self) -> None:
        for batch in batches(self._to_classify, self._config.batch_size):
            for classified in classify(batch, self._classifier, self._on_unscored):
                crashpoint("classified")
                self._to_finish.put(classified)

    def _on_unscored(self, prepared: Prepared, failure: ProcessingFailed) -> None:
        self._end_badly(prepared.claim, failure)

    def _finish_loop(self) -> None:
        while (classified := self._to_finish.get()) is not None:
            claim = classified.prepared.claim
            # Two steps, since a recorded row is never recorded again: a passing trouble of
            # the second must not repeat the first.
            recorded = self._guarded(claim, partial(self._finisher.record, classified))
            if recorded is not None:
                self._retried(claim, partial(self._finisher.file, recorded))
                self._in_flight.release()

    def _guarded(self, claim: Claimed, step: Callable[[], T]) -> T | None:
        """Run a step; None means that the file has met its end otherwise."""
        try:
            return self._retried(claim, step)
        except (FileRejected, ProcessingFailed) as error:
            self._end_badly(claim, error)
            return None

    def _retried(self, claim: Claimed, step: Callable[[], T]) -> T:
        delay_s = _FIRST_DELAY_S
        for left in range(self._config.retries, -1, -1):
            try:
                return step()
            except (OSError, TransientError) as error:
                if isinstance(error, OSError) and error.errno not in _PASSING:
                    raise
                if left == 0:
                    raise ProcessingFailed(
                        Reason.RETRIES_EXHAUSTED, f"a passing trouble did not pass: {_brief(error)}"
                    ) from error
                event(
                    "retry",
                    claim.sha256,
                    level=logging.WARNING,
                    error=_brief(error),
                    wait_s=delay_s,
                )
            self._abandoned.wait(delay_s)
            delay_s *= 2
        raise AssertionError("the loop returns or raises")

    def _end_badly(self, claim: Claimed, error: FileRejected | ProcessingFailed) -> None:
        """Record a rejection or failure, then move the file: the row decides."""
        rejected = isinstance(error, FileRejected)
        transaction = self._store.reject if rejected else self._store.fail
        duration_ms = round((self._clock.monotonic() - claim.started_s) * 1000)
        now = self._clock.now()
        self._writer.call(
            lambda: transaction(
                result_id=claim.result_id,
                reason=error.reason,
                message=str(error),
                meta=error.meta if isinstance(error, FileRejected) else None,
                duration_ms=duration_ms,
                now=now,
            )
        )
        crashpoint("rejected")
        if error.reason is Reason.UNPACKED:
            self._unpacker.publish(claim.sha256)
        self._filing.quarantine(
            image_id=claim.image_id, sha256=claim.sha256, reason=error.reason, path=claim.path
        )
        event(
            "rejected" if rejected else "failed",
            claim.sha256,
            level=logging.WARNING,
            reason=error.reason,
            detail=str(error),
        )
        self._in_flight.release()


def _brief(error: Exception) -> str:
    """Describe an error without the file name that an OSError quotes."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)

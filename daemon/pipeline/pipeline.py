"""The stages between claim and end: decoding, micro-batched inference, and recording."""

import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.archives import Unpacked, Unpacker
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.decode import Decoder, DecoderSetup
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.gate import GateRefused
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.daemon.pipeline.record import Recorder
from lungwatch.daemon.pipeline.records import Claimed, Classified, GateAnswer, Prepared
from lungwatch.daemon.retry import Clock, Outages
from lungwatch.daemon.stage import DatabaseWriter, InFlight, Progress, Worker, crashpoint
from lungwatch.db.models import Plausibility
from lungwatch.db.results import Store
from lungwatch.db.states import State
from lungwatch.errors import FileRejected, ProcessingFailed, Reason, TransientError, describe


def batches(waiting: "queue.Queue[Prepared | None]", most: int) -> Iterator[list[Prepared]]:
    """Yield what is waiting, up to `most` at a time, never waiting for a batch to fill.

    Ends at the first None.
    """
    while (first := waiting.get()) is not None:
        batch = [first]
        while len(batch) < most:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                break
            if item is None:
                waiting.put(None)  # the end: seen again after this batch
                break
            batch.append(item)
        yield batch


def classify(
    batch: list[Prepared],
    classifier: Classifier,
    on_end: Callable[[Prepared, FileRejected | ProcessingFailed], None],
    *,
    refuses: bool = True,
) -> list[Classified]:
    """Look at a batch and score what passes the content gate.

    If that fails, the images are taken one by one, so that a poisoned one costs itself only.

    Parameters
    ----------
    batch
        At least one image.
    classifier
        The model, with its gate if it has one.
    on_end
        Called with each image that the gate refuses (`GateRefused`) or the model cannot score.
    refuses
        Whether what the gate does not accept is refused; else it is scored all the same.
    """
    try:
        answers = _run_gate(batch, classifier)
        refusals = [_refusal(*pair, classifier) if refuses else None for pair in answers]
        passed = [pair for pair, refusal in zip(answers, refusals, strict=True) if refusal is None]
        scores = classifier.run(np.stack([item.tensor for item, _ in passed])) if passed else []
    # onnxruntime's errors share no base class with anything.
    except Exception as error:
        if len(batch) == 1:
            failure = ProcessingFailed(
                Reason.INTERNAL_ERROR, f"the model cannot score this image ({type(error).__name__})"
            )
            on_end(batch[0], failure)
            return []
        return [
            one for item in batch for one in classify([item], classifier, on_end, refuses=refuses)
        ]
    for item, refusal in zip(batch, refusals, strict=True):
        if refusal is not None:
            on_end(item, refusal)
    return [
        Classified(prepared=item, scores=score, gate=answer)
        for (item, answer), score in zip(passed, scores, strict=True)
    ]


def _run_gate(
    batch: list[Prepared], classifier: Classifier
) -> list[tuple[Prepared, GateAnswer | None]]:
    if classifier.gate is None:
        return [(item, None) for item in batch]
    # The decoder makes no second input where the gate sees what the model sees.
    seen = [item.tensor if item.gate_tensor is None else item.gate_tensor for item in batch]
    return list(zip(batch, classifier.gate.run(np.stack(seen)), strict=True))


def _refusal(
    item: Prepared, answer: GateAnswer | None, classifier: Classifier
) -> GateRefused | None:
    if classifier.gate is None or answer is None:
        return None
    return classifier.gate.refusal(item, answer)


# Troubles of a busy or remote file system that pass by themselves. Those that last, such as a
# full disk, are waited out instead (see outage).
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EINTR,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
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
        writer: DatabaseWriter,
        filing: Filing,
        finisher: Recorder,
        in_flight: InFlight,
        outages: Outages,
        vitals: Progress,
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
        self._outages = outages
        self._vitals = vitals
        self._clock = clock
        self._work = home.work
        self._unpacker = Unpacker(home, config.read_policy, config.name_rules)
        self._abandoned = threading.Event()
        self._to_decode: queue.Queue[Claimed | None] = queue.Queue()
        self._to_classify: queue.Queue[Prepared | None] = queue.Queue()
        self._to_finish: queue.Queue[Classified | None] = queue.Queue()
        self._decoders = [
            Worker(f"decode-{number}", self._decode_loop, on_crash)
            for number in range(config.decode_workers)
        ]
        vitals.watch_queue("decode", self._to_decode.qsize)
        vitals.watch_queue("inference", self._to_classify.qsize)
        vitals.watch_queue("overlay", self._to_finish.qsize)
        self._inference = Worker("inference", self._inference_loop, on_crash)
        self._finishers = [
            Worker(f"overlay-{number}", self._finish_loop, on_crash)
            for number in range(config.overlay_workers)
        ]

    @property
    def dead(self) -> list[str]:
        """The threads that have ended, by name; before `start`, all of them."""
        workers = (*self._decoders, self._inference, *self._finishers)
        return [worker.name for worker in workers if not worker.is_alive()]

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
        self._outages.abandon()
        for _ in self._decoders:
            self._to_decode.put(None)
        self._to_classify.put(None)
        for _ in self._finishers:
            self._to_finish.put(None)
        if drained:
            for worker in (*self._decoders, self._inference, *self._finishers):
                worker.join()

    def _decode_loop(self) -> None:
        gate = self._classifier.contract.gate
        setup = DecoderSetup(
            policy=self._config.read_policy,
            spec=self._classifier.contract.preprocess,
            overlay_side_px=self._config.overlay_side_px,
            memory_mb=self._config.decode_memory_mb,
            gate_spec=gate.preprocess if gate is not None else None,
        )
        with Decoder(setup, timeout_s=self._config.decode_timeout_s) as decoder:
            # What its process imports meanwhile, the first file does not wait for; one that
            # cannot be started now is started for the first file.
            with contextlib.suppress(OSError):
                decoder.start()
            while (claim := self._to_decode.get()) is not None:
                prepared = self._guarded(claim, partial(self._prepare, claim, decoder))
                if prepared is not None:
                    crashpoint("decoded")
                    self._to_classify.put(prepared)

    def _prepare(self, claim: Claimed, decoder: Decoder) -> Prepared:
        self._unpacker.unpack(claim.path, claim.sha256)
        decoded = decoder.decode(claim.path)
        return Prepared(
            claim=claim,
            meta=decoded.meta,
            tensor=decoded.tensor,
            preview=decoded.preview,
            shape=decoded.shape,
            gate_tensor=decoded.gate_tensor,
            flags=decoded.flags,
            orientation_known=decoded.orientation_known,
        )

    def _inference_loop(self) -> None:
        for batch in batches(self._to_classify, self._config.batch_size):
            with self._vitals.busy("inference"):
                done = classify(
                    batch,
                    self._classifier,
                    self._on_unscored,
                    refuses=self._config.gate == "refuse",
                )
                for classified in done:
                    crashpoint("classified")
                    self._to_finish.put(classified)

    def _on_unscored(self, prepared: Prepared, error: FileRejected | ProcessingFailed) -> None:
        self._end_badly(prepared.claim, error)

    def _finish_loop(self) -> None:
        while (classified := self._to_finish.get()) is not None:
            claim = classified.prepared.claim
            # Two steps, since a recorded row is never recorded again: a passing trouble of
            # the second must not repeat the first.
            recorded = self._guarded(claim, partial(self._finisher.record, classified))
            if recorded is not None:
                self._file(claim, partial(self._finisher.file, recorded))

    def _file(self, claim: Claimed, step: Callable[[], None]) -> None:
        """Move a recorded file to its place."""
        try:
            self._retried(claim, step)
        except FileNotFoundError as error:
            if not self._is_gone(claim):
                raise
            self._lose(claim, error)
        else:
            self._in_flight.release()

    def _guarded(self, claim: Claimed, step: Callable[[], T]) -> T | None:
        """Run a step; None means that the file has met its end otherwise."""
        try:
            return self._retried(claim, step)
        except (FileRejected, ProcessingFailed) as error:
            self._end_badly(claim, error)
            return None
        except Unpacked as unpacked:
            self._end_unpacked(claim, unpacked.count)
            return None
        except FileNotFoundError as error:
            if not self._is_gone(claim):
                raise
            self._lose(claim, error)
            return None

    def _is_gone(self, claim: Claimed) -> bool:
        """Whether somebody took the file away, and not the whole folder."""
        return self._work.is_dir() and not os.path.lexists(claim.path)

    def _lose(self, claim: Claimed, error: FileNotFoundError) -> None:
        """Record that there is no file any more."""
        now = self._clock.now()
        self._writer.call(lambda: self._store.fail_vanished(result_id=claim.result_id, now=now))
        with contextlib.suppress(OSError):
            claim.path.parent.rmdir()
        event(
            "failed",
            claim.sha256,
            level=logging.WARNING,
            reason=Reason.FILE_VANISHED,
            detail=describe(error),
        )
        self._in_flight.release()

    def _retried(self, claim: Claimed, step: Callable[[], T]) -> T:
        delay_s = _FIRST_DELAY_S
        for left in range(self._config.retries, -1, -1):
            try:
                with self._vitals.busy(_stage_here()):
                    return self._outages.ride_out(step)
            except (OSError, TransientError) as error:
                if isinstance(error, OSError) and error.errno not in _PASSING:
                    raise
                if left == 0:
                    raise ProcessingFailed(
                        Reason.RETRIES_EXHAUSTED,
                        f"a passing trouble did not pass: {describe(error)}",
                    ) from error
                event(
                    "retry",
                    claim.sha256,
                    level=logging.WARNING,
                    error=describe(error),
                    wait_s=delay_s,
                )
            self._abandoned.wait(delay_s)
            delay_s *= 2
        raise AssertionError("the loop returns or raises")

    def _end_badly(self, claim: Claimed, error: FileRejected | ProcessingFailed) -> None:
        """Record a rejection or failure, then move the file: the row decides."""
        rejected = isinstance(error, FileRejected)
        duration_ms = round((self._clock.monotonic() - claim.started_s) * 1000)
        now = self._clock.now()
        plausibility = error.plausibility if isinstance(error, GateRefused) else Plausibility()
        self._writer.call(
            lambda: self._store.end(
                State.REJECTED if rejected else State.FAILED,
                result_id=claim.result_id,
                reason=error.reason,
                message=str(error),
                meta=error.meta if isinstance(error, FileRejected) else None,
                duration_ms=duration_ms,
                now=now,
                plausibility=plausibility,
            )
        )
        crashpoint("rejected")
        self._retried(claim, partial(self._quarantine, claim, error.reason))
        event(
            "rejected" if rejected else "failed",
            claim.sha256,
            level=logging.WARNING,
            reason=error.reason,
            detail=str(error),
        )
        self._in_flight.release()

    def _end_unpacked(self, claim: Claimed, count: int) -> None:
        """Record an archive as unpacked, let its files be taken, then file it: the row decides."""
        duration_ms = round((self._clock.monotonic() - claim.started_s) * 1000)
        now = self._clock.now()
        self._writer.call(
            lambda: self._store.record_unpacked(
                result_id=claim.result_id, count=count, duration_ms=duration_ms, now=now
            )
        )
        crashpoint("recorded")
        self._unpacker.publish(claim.sha256)

        def file() -> None:
            self._filing.file(
                result_id=claim.result_id,
                sha256=claim.sha256,
                received_at=claim.received_at,
                path=claim.path,
            )
            event("unpacked", claim.sha256, files=count)

        self._file(claim, file)

    def _quarantine(self, claim: Claimed, reason: Reason) -> None:
        try:
            self._filing.quarantine(
                image_id=claim.image_id, sha256=claim.sha256, reason=reason, path=claim.path
            )
        except FileNotFoundError:
            if not self._is_gone(claim):
                raise
            # Its row has its end already; only the file is nowhere.
            self._writer.call(lambda: self._store.set_path(image_id=claim.image_id, path=None))


def _stage_here() -> str:
    """Return the stage that this thread works for: its name without its number."""
    return threading.current_thread().name.partition("-")[0]

"""The pipeline of claimed files: decoding, micro-batched inference, overlay and record."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from typing import TypeVar

import numpy as np

from lungwatch.daemon.intake.archives import Unpacker
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.decode import Decoder, DecoderSetup
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.gate import GateRefused
from lungwatch.daemon.pipeline.model import Classifier, ModelInUse
from lungwatch.daemon.pipeline.record import record_result, redraw_overlay
from lungwatch.daemon.pipeline.records import Claimed, Classified, GateAnswer, Prepared
from lungwatch.daemon.retry import retries_wait_s
from lungwatch.daemon.stage import Context, Lane, Stage, crashpoint
from lungwatch.db.models import Plausibility, State
from lungwatch.errors import FileRejected, ProcessingFailed, Reason, describe

# Starting a decoder and killing it, which one file may need twice.
_DECODER_S = 65.0
_DECODE_STAGES = {Lane.ORDINARY: "decode", Lane.SLOW: "decode_slow"}
# Of the slow lane's decoding process: ordinary files go first where processors are short.
_SLOW_NICENESS = 10

T = TypeVar("T")


class Pipeline:
    """The stages decode, inference (one thread) and overlay, joined by their queues.

    Files of the slow lane have a decode stage of their own, `decode_slow`, of one worker, so that
    `decode_workers` are always there for ordinary ones. Every claimed file meets its end here:
    recorded and in `done/`, rejected or failed and in `quarantine/`, unpacked, or gone. Until then
    it holds a slot of `Context.in_flight`.
    """

    def __init__(self, context: Context, model: ModelInUse, filing: Filing) -> None:
        config = context.config
        retries_s = retries_wait_s(config.retries)
        self._context = context
        self._model = model
        self._filing = filing
        self._unpacker = Unpacker(context.home, config.read_policy, config.name_rules)
        self._decode = {
            lane: Stage[Claimed](
                _DECODE_STAGES[lane],
                partial(self._open_decoder, lane),
                context.progress,
                context.on_crash,
                workers=config.decode_workers if lane is Lane.ORDINARY else 1,
                extra_s=retries_s + 2 * (config.decode_timeout_s + _DECODER_S),
            )
            for lane in Lane
        }
        self._inference = Stage[Prepared](
            "inference",
            lambda: nullcontext(self._infer),
            context.progress,
            context.on_crash,
            batch_size=config.batch_size,
            extra_s=retries_s,
        )
        self._overlay = Stage[Classified](
            "overlay",
            lambda: nullcontext(self._record),
            context.progress,
            context.on_crash,
            workers=config.overlay_workers,
            extra_s=retries_s,
        )
        self._stages: tuple[Stage[Claimed] | Stage[Prepared] | Stage[Classified], ...] = (
            *self._decode.values(),
            self._inference,
            self._overlay,
        )

    @property
    def dead(self) -> list[str]:
        """The threads that have ended, by name; before `start`, all of them."""
        return [name for stage in self._stages for name in stage.dead]

    def submit(self, claim: Claimed) -> None:
        """Queue a claimed file, which holds a slot of its lane."""
        self._decode[claim.lane].put(claim)

    def start(self) -> None:
        """Start the threads, the last stage first."""
        for stage in reversed(self._stages):
            stage.start()

    def stop(self, drain_s: float) -> None:
        """Wait for what is in flight, at most `drain_s` seconds, and end the threads.

        What is not finished then stays claimed; the next start takes it up.
        """
        is_drained = self._context.in_flight.wait_empty(drain_s)
        self._context.outages.shut_down()
        for stage in self._stages:
            stage.close()
        for stage in self._stages if is_drained else ():
            stage.join()

    @contextmanager
    def _open_decoder(self, lane: Lane) -> Iterator[Callable[[list[Claimed]], None]]:
        """Give the handler of one decode thread, which has a decoding process of its own."""
        config, contract = self._context.config, self._model.classifier.contract
        setup = DecoderSetup(
            policy=config.read_policy,
            spec=contract.preprocess,
            overlay_side_px=config.overlay_side_px,
            memory_mb=config.decode_memory_mb,
            gate_spec=contract.gate.preprocess if contract.gate is not None else None,
            require_sandbox=config.require_sandbox,
        )
        niceness = _SLOW_NICENESS if lane is Lane.SLOW else 0
        decoder = Decoder(setup, timeout_s=config.decode_timeout_s, niceness=niceness)
        with closing(decoder):
            if lane is Lane.ORDINARY:
                # It imports its libraries before there is a file. If it cannot be started now,
                # the first file starts it, as in the slow lane.
                with suppress(OSError):
                    decoder.start()
            yield partial(self._prepare, decoder, _DECODE_STAGES[lane])

    def _prepare(self, decoder: Decoder, stage: str, claims: list[Claimed]) -> None:
        """Decode claimed files; unpack those that are archives."""
        for claim in claims:
            unpack = partial(self._unpacker.unpack, claim.file)
            count = self._attempt(stage, claim, unpack)
            if count:
                self._end_unpacked(stage, claim, count)
            if count != 0:
                continue
            decoded = self._attempt(stage, claim, partial(decoder.decode, claim.file.descriptor))
            if decoded is not None:
                crashpoint("decoded")
                self._inference.put(Prepared(claim=claim, **vars(decoded)))

    def _infer(self, batch: list[Prepared]) -> None:
        """Run the content gate and the model on a batch."""
        done = classify(
            batch,
            self._model.classifier,
            lambda item, error: self._end_badly("inference", item.claim, error),
            refuses=self._context.config.gate == "refuse",
        )
        for classified in done:
            crashpoint("classified")
            self._overlay.put(classified)

    def _record(self, items: list[Classified]) -> None:
        """Write overlay and row of scored files, then file them."""
        for classified in items:
            claim, scores = classified.prepared.claim, classified.scores
            if claim.redraws:
                redraw = partial(redraw_overlay, classified, self._model, self._context)
                is_redrawn = self._attempt("overlay", claim, redraw)
                if is_redrawn is not None:
                    self._put_back("overlay", claim, "" if is_redrawn else "other_values")
                continue
            record = partial(record_result, classified, self._model, self._context)
            # Two steps, since a recorded row is never recorded again: a transient error of the
            # second must not repeat the first.
            duration_ms = self._attempt("overlay", claim, record)
            if duration_ms is not None and self._file("overlay", claim):
                event(
                    "filed",
                    claim.sha256,
                    label=scores.label,
                    probability=scores.probability,
                    duration_ms=duration_ms,
                )
                self._release(claim)

    def _attempt(self, stage: str, claim: Claimed, step: Callable[[], T]) -> T | None:
        """Run a step with retries; None means that the file has met its end otherwise."""
        try:
            return self._retry(stage, claim, step)
        except (FileRejected, ProcessingFailed) as error:
            self._end_badly(stage, claim, error)
        except FileNotFoundError as error:
            self._lose(claim, error)
        return None

    def _retry(self, stage: str, claim: Claimed, step: Callable[[], T]) -> T:
        return self._context.outages.retry(
            step,
            retries=self._context.config.retries,
            sha256=claim.sha256,
            on_wait=partial(self._context.progress.beat, stage),
        )

    def _file(self, stage: str, claim: Claimed) -> bool:
        """Move a recorded file to its place; False means that it is gone, which is its end."""
        try:
            self._retry(stage, claim, partial(self._filing.file, claim))
        except FileNotFoundError as error:
            self._lose(claim, error)
            return False
        return True

    def _put_back(self, stage: str, claim: Claimed, problem: str) -> None:
        """File a content whose result is done, with its overlay or, after a problem, without."""
        try:
            self._retry(stage, claim, partial(self._filing.refile, claim))
        except FileNotFoundError as error:
            self._lose(claim, error)
            return
        if problem:
            event("not_redrawn", claim.sha256, level=logging.WARNING, reason=problem)
        event("filed", claim.sha256, resumed=True)
        self._release(claim)

    def _lose(self, claim: Claimed, error: FileNotFoundError) -> None:
        """Record that the file was removed; raise the error if something else is missing."""
        if not self._is_gone(claim):
            raise error
        context, now = self._context, self._context.clock.now()
        context.writer.call(
            lambda: (
                context.store.set_path(image_id=claim.image_id, path=None)
                if claim.redraws
                else context.store.fail_vanished(result_id=claim.result_id, now=now)
            )
        )
        with suppress(OSError):
            claim.path.parent.rmdir()
        event(
            "failed",
            claim.sha256,
            level=logging.WARNING,
            reason=Reason.FILE_VANISHED,
            detail=describe(error),
        )
        self._release(claim)

    def _end_badly(
        self, stage: str, claim: Claimed, error: FileRejected | ProcessingFailed
    ) -> None:
        """Record a rejection or failure, then move the file: the row decides."""
        if claim.redraws:
            self._put_back(stage, claim, error.reason)
            return
        is_rejected = isinstance(error, FileRejected)
        context = self._context
        duration_ms, now = context.elapsed_ms(claim.started_s), context.clock.now()
        context.writer.call(
            lambda: context.store.end(
                State.REJECTED if is_rejected else State.FAILED,
                result_id=claim.result_id,
                reason=error.reason,
                message=str(error),
                meta=error.meta if isinstance(error, FileRejected) else None,
                duration_ms=duration_ms,
                now=now,
                plausibility=(
                    error.plausibility if isinstance(error, GateRefused) else Plausibility()
                ),
            )
        )
        crashpoint("rejected")
        self._retry(stage, claim, partial(self._quarantine, claim, error.reason))
        event(
            "rejected" if is_rejected else "failed",
            claim.sha256,
            level=logging.WARNING,
            reason=error.reason,
            detail=str(error),
        )
        self._release(claim)

    def _end_unpacked(self, stage: str, claim: Claimed, count: int) -> None:
        """Record an archive as unpacked, let its files be taken, then file it: the row decides."""
        context = self._context
        duration_ms, now = context.elapsed_ms(claim.started_s), context.clock.now()
        context.writer.call(
            lambda: context.store.record_unpacked(
                result_id=claim.result_id, count=count, duration_ms=duration_ms, now=now
            )
        )
        crashpoint("recorded")
        self._unpacker.publish(claim.sha256)
        if self._file(stage, claim):
            event("unpacked", claim.sha256, files=count)
            self._release(claim)

    def _quarantine(self, claim: Claimed, reason: Reason) -> None:
        try:
            self._filing.quarantine(claim, reason)
        except FileNotFoundError:
            if not self._is_gone(claim):
                raise
            with suppress(OSError):
                claim.path.parent.rmdir()
            # Its row has its end already; only the file is nowhere.
            store = self._context.store
            self._context.writer.call(lambda: store.set_path(image_id=claim.image_id, path=None))

    def _release(self, claim: Claimed) -> None:
        """Close a file that has met its end, and give its slot back."""
        claim.file.close()
        self._context.in_flight.release(claim.lane)

    def _is_gone(self, claim: Claimed) -> bool:
        """Tell whether the file was removed, and not the whole folder."""
        return self._context.home.work.is_dir() and not os.path.lexists(claim.path)


def classify(
    batch: list[Prepared],
    classifier: Classifier,
    on_end: Callable[[Prepared, FileRejected | ProcessingFailed], None],
    *,
    refuses: bool = True,
) -> list[Classified]:
    """Run the content gate on a batch and score what passes.

    If that fails, the images are run one by one, so that a poisoned one costs itself only.

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
    gate = classifier.gate
    try:
        answers: list[GateAnswer | None] = [None] * len(batch)
        refusals: list[GateRefused | None] = [None] * len(batch)
        if gate is not None:
            # The decoder makes no second input where the gate's is the model's.
            seen = [item.tensor if item.gate_tensor is None else item.gate_tensor for item in batch]
            found = gate.run(np.stack(seen))
            answers = [*found]
            if refuses:
                refusals = [gate.refusal(*pair) for pair in zip(batch, found, strict=True)]
        passed = [
            (item, answer)
            for item, answer, refusal in zip(batch, answers, refusals, strict=True)
            if refusal is None
        ]
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

"""The stage that runs the content gate and the model, in micro-batches of what is waiting."""

import queue
from collections.abc import Callable, Iterator

import numpy as np

from lungwatch.daemon.gate import GateRefused
from lungwatch.daemon.model import Classifier
from lungwatch.daemon.records import Classified, GateAnswer, Prepared
from lungwatch.errors import FileRejected, ProcessingFailed, Reason


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
        answers = _look(batch, classifier)
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


def _look(
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

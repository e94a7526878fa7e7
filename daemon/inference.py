"""The one thread that runs the model, on whatever is waiting."""

import queue
from collections.abc import Callable, Iterator

import numpy as np

from lungwatch.daemon.model import Classifier
from lungwatch.daemon.records import Classified, Prepared
from lungwatch.errors import ProcessingFailed, Reason


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
    on_failure: Callable[[Prepared, ProcessingFailed], None],
) -> list[Classified]:
    """Score a batch; if that fails, one by one, so that a poisoned image costs itself only.

    Parameters
    ----------
    batch
        At least one image.
    classifier
        The model.
    on_failure
        Called with each image that the model cannot score.
    """
    try:
        scores = classifier.run(np.stack([item.tensor for item in batch]))
    # onnxruntime's errors share no base class with anything.
    except Exception as error:
        if len(batch) == 1:
            failure = ProcessingFailed(
                Reason.INTERNAL_ERROR, f"the model cannot score this image ({type(error).__name__})"
            )
            on_failure(batch[0], failure)
            return []
        return [one for item in batch for one in classify([item], classifier, on_failure)]
    return [
        Classified(prepared=item, scores=score) for item, score in zip(batch, scores, strict=True)
    ]

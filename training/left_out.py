"""How a network does on a source that was left out of its training."""

from typing import Any

import numpy as np

from lungwatch.training.evaluation.evaluation import evaluate_pixels
from lungwatch.training.evaluation.scorers import Scorer
from lungwatch.training.prepare import Prepared


def measure_left_out(scorer: Scorer, prepared: Prepared, source: str) -> dict[str, Any]:
    """Measure a network on all images of the source left out.

    Its COVID images stand against test images of the other sources without COVID, or, should
    it have none, its images against COVID of the others: how the network does on a place it
    never saw.

    Parameters
    ----------
    scorer
        The network.
    prepared
        The data set, made ready without the source.
    source
        Its name.

    Returns
    -------
    dict
        As `lungwatch.training.evaluation.evaluation.evaluate_pixels` gives it.
    """
    own = [s for s in prepared.test.samples if s.source == source]
    has_covid = any(s.positive for s in [*prepared.left_out.samples, *own])
    rest = prepared.test.take(
        [
            index
            for index, sample in enumerate(prepared.test.samples)
            if sample.source == source or sample.positive != has_covid
        ]
    )
    return evaluate_pixels(
        scorer,
        [*prepared.left_out.samples, *rest.samples],
        np.concatenate([prepared.left_out.pixels, rest.pixels]),
    )

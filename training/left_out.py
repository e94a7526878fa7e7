"""How a network does on a source that was left out of its training."""

from typing import Any

import numpy as np

from lungwatch.training.evaluate import measure
from lungwatch.training.prepare import Prepared
from lungwatch.training.scorers import Scorer


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
        As `lungwatch.training.evaluate.measure` gives it.
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
    return measure(
        scorer,
        [*prepared.left_out.samples, *rest.samples],
        np.concatenate([prepared.left_out.pixels, rest.pixels]),
    )

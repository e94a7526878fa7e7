"""Training that is guided to the lungs: frames, disguises, order within sources, evidence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.disguise import Disguise, disguise
from lungwatch.training.fit import FitData
from lungwatch.training.foreign import KerasModel
from lungwatch.training.framing import Framing, reframe
from lungwatch.training.head import FEATURES
from lungwatch.training.lesson import Batch, Lesson
from lungwatch.training.objective import (
    Objective,
    gravity,
    lungs_on_map,
    make_guided_step,
    source_numbers,
)
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Finding, Sample
from lungwatch.training.segmenter import segment


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How training is guided; replaces the plain augmentation and the plain loss.

    Attributes
    ----------
    framing, disguise
        How images are changed at every showing.
    objective
        What is rewarded.
    power, shares
        How often each finding and, within it, each source is drawn; see
        `lungwatch.training.sampling`.
    """

    framing: Framing = field(default_factory=Framing)
    disguise: Disguise = field(default_factory=Disguise)
    objective: Objective = field(
        default_factory=lambda: Objective(other_target=0.1, ranking=0.25, lungs=0.5)
    )
    power: float = 0.4
    shares: tuple[tuple[Finding, float], ...] = (
        ("COVID", 0.4),
        ("OTHER_PNEUMONIA", 0.32),
        ("NORMAL", 0.28),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """What guided training knows of each image besides its pixels.

    Attributes
    ----------
    gravity, source
        int32 (N,); see `lungwatch.training.objective`.
    lungs
        uint8 (N, S, S): the probability of being lung, 255 for certain.
    """

    gravity: NDArray[np.int32]
    source: NDArray[np.int32]
    lungs: NDArray[np.uint8]


def make_guide(samples: Sequence[Sample], pixels: FloatArray, segmenter: KerasModel) -> Guide:
    """Find the lungs of all training images, and number findings and sources."""
    lungs = np.round(segment(segmenter, pixels) * 255.0).astype(np.uint8)
    return Guide(gravity=gravity(samples), source=source_numbers(samples), lungs=lungs)


def guided_lesson(model: KerasModel, data: FitData, guide: Guide, guidance: Guidance) -> Lesson:
    """Make what shows framed and disguised batches, and lets a network learn from them.

    Parameters
    ----------
    model
        A compiled network with lungwatch's head.
    data
        Its training pixels and targets.
    guide
        What is known of them besides.
    guidance
        How.
    """
    side = int(model.get_layer(FEATURES).output.shape[1])

    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> Batch:
        lungs = guide.lungs[indices].astype(np.float32) / 255.0
        framed, found = reframe(data.train_pixels[indices], lungs, guidance.framing, rng)
        return (
            disguise(framed, found, guidance.disguise, rng),
            data.train_targets[indices],
            guide.gravity[indices],
            guide.source[indices],
            lungs_on_map(found, side),
        )

    return Lesson(show=show, step=make_guided_step(model, guidance.objective))

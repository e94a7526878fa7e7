"""Training that is guided to the lungs: frames, disguises, order within sources, evidence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError
from lungwatch.training.adversary import Adversary, sources_of_findings
from lungwatch.training.data.dataset import ImageClass, Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.disguise import Disguise, disguise
from lungwatch.training.fit_config import FitData
from lungwatch.training.framing import Framing, reframe
from lungwatch.training.guide_numbers import gravity, source_numbers
from lungwatch.training.head import FEATURES
from lungwatch.training.histograms import Histograms, exchange_histograms, read_histograms
from lungwatch.training.lesson import Batch, Lesson
from lungwatch.training.objective import Objective, lungs_on_map, make_guided_step
from lungwatch.training.robust import RiskGroups, RobustLoss, risk_groups
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
    exchange_histograms
        How often an image is shown with another source's grey levels, 0..1; see
        `lungwatch.training.histograms`.
    group_robust
        Step of the groups' weights, see `lungwatch.training.robust`; 0 is the plain mean.
    domain_adversarial
        Weight of the reversed gradient, see `lungwatch.training.adversary`; 0 is none.
    """

    framing: Framing = field(default_factory=Framing)
    disguise: Disguise = field(default_factory=Disguise)
    objective: Objective = field(
        default_factory=lambda: Objective(other_target=0.1, ranking=0.25, lungs=0.5)
    )
    power: float = 0.4
    shares: tuple[tuple[ImageClass, float], ...] = (
        ("COVID", 0.4),
        ("OTHER_PNEUMONIA", 0.32),
        ("NORMAL", 0.28),
    )
    exchange_histograms: float = 0.0
    group_robust: float = 0.0
    domain_adversarial: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.exchange_histograms <= 1.0:
            raise ConfigError("how often histograms are exchanged must lie within 0..1")
        if self.group_robust < 0 or self.domain_adversarial < 0:
            raise ConfigError(
                "the step of the group weights and the adversarial weight must not be below 0"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """What guided training knows of each image besides its pixels, and of all of them.

    Attributes
    ----------
    gravity, source
        int32 (N,); see `lungwatch.training.guide_numbers`.
    lungs
        uint8 (N, S, S): the probability of being lung, 255 for certain.
    groups
        Findings by source.
    there
        Which findings occur in which sources, bool (3, sources).
    histograms
        The grey levels, if they are to be exchanged.
    """

    gravity: NDArray[np.int32]
    source: NDArray[np.int32]
    lungs: NDArray[np.uint8]
    groups: RiskGroups
    there: NDArray[np.bool_]
    histograms: Histograms | None = None


def make_guide(
    samples: Sequence[Sample], pixels: FloatArray, segmenter: KerasModel, guidance: Guidance
) -> Guide:
    """Find the lungs of all training images, and number findings, sources and groups."""
    lungs = np.round(segment(segmenter, pixels) * 255.0).astype(np.uint8)
    source = source_numbers(samples)
    return Guide(
        gravity=gravity(samples),
        source=source,
        lungs=lungs,
        groups=risk_groups(samples),
        there=sources_of_findings(samples),
        histograms=read_histograms(pixels, source) if guidance.exchange_histograms else None,
    )


def guided_lesson(
    model: KerasModel, data: FitData, guide: Guide, guidance: Guidance, *, steps: int, seed: int
) -> Lesson:
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
    steps
        Of the whole training, for what is ramped up.
    seed
        Of what else has first weights.
    """
    shape = model.get_layer(FEATURES).output.shape
    robust = RobustLoss(guide.groups, guidance.group_robust) if guidance.group_robust else None
    adversary = None
    if guidance.domain_adversarial:
        adversary = Adversary(
            int(shape[3]), guide.there, weight=guidance.domain_adversarial, steps=steps, seed=seed
        )

    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> Batch:
        pixels = data.train_pixels[indices]
        if guide.histograms is not None:
            amount = guidance.exchange_histograms
            pixels = exchange_histograms(pixels, indices, guide.histograms, amount, rng)
        lungs = guide.lungs[indices].astype(np.float32) / 255.0
        framed, found = reframe(pixels, lungs, guidance.framing, rng)
        return (
            disguise(framed, found, guidance.disguise, rng),
            data.train_targets[indices],
            guide.gravity[indices],
            guide.source[indices],
            lungs_on_map(found, int(shape[1])),
        )

    learners = [learner for learner in (robust, adversary) if learner]

    def notes() -> dict[str, float]:
        return {name: value for learner in learners for name, value in learner.notes().items()}

    return Lesson(
        show=show,
        step=make_guided_step(model, guidance.objective, robust=robust, adversary=adversary),
        variables=[variable for learner in learners for variable in learner.variables],
        notes=notes,
    )

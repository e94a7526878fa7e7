"""Recipe `train guided`: a network guided to the lungs by masks and domain randomisation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import ImageClass, LabelMap, Sample
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.plots import plot_group_weights
from lungwatch.training.fitting.augmentation import (
    DomainRandomisation,
    Framing,
    Histograms,
    exchange_histograms,
    randomise_domain,
    read_histograms,
    reframe,
)
from lungwatch.training.fitting.objectives import (
    WEIGHT,
    Adversary,
    Objective,
    RiskGroups,
    RobustLoss,
    lungs_on_map,
    make_guided_step,
    risk_groups,
    severity_ranks,
    source_numbers,
    sources_of_findings,
)
from lungwatch.training.fitting.preparation import conclude, evaluate_rest, prepare
from lungwatch.training.fitting.run import Progress, RunFolder, prepare_tensorflow
from lungwatch.training.fitting.tasks import FitData, binary_task, fit, sampling_weights
from lungwatch.training.fitting.trainer import FitConfig, FitState, TrainingTask
from lungwatch.training.networks.backbones import (
    TransferConfig,
    build_transfer,
    cut_at_stride,
    load_backbone,
    unfreeze,
)
from lungwatch.training.networks.heads import FEATURES
from lungwatch.training.networks.lungs import SEGMENTER_PX, segment
from lungwatch.training.networks.weights import load_keras


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
        `trainer`.
    exchange_histograms
        How often an image is shown with another source's grey levels, 0..1; see
        `augmentation`.
    group_robust
        Step of the groups' weights, see `objectives`; 0 is the plain mean.
    domain_adversarial
        Weight of the reversed gradient, see `objectives`; 0 is none.
    """

    framing: Framing = field(default_factory=Framing)
    disguise: DomainRandomisation = field(default_factory=DomainRandomisation)
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
class GuidanceData:
    """What guided training knows of each image besides its pixels, and of all of them.

    Attributes
    ----------
    gravity, source
        int32 (N,); see `objectives`.
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


def make_guidance_data(
    samples: Sequence[Sample], pixels: FloatArray, segmenter: KerasModel, guidance: Guidance
) -> GuidanceData:
    """Find the lungs of all training images, and number findings, sources and groups."""
    lungs = np.round(segment(segmenter, pixels) * 255.0).astype(np.uint8)
    source = source_numbers(samples)
    return GuidanceData(
        gravity=severity_ranks(samples),
        source=source,
        lungs=lungs,
        groups=risk_groups(samples),
        there=sources_of_findings(samples),
        histograms=read_histograms(pixels, source) if guidance.exchange_histograms else None,
    )


def guided_task(
    model: KerasModel,
    data: FitData,
    guide: GuidanceData,
    guidance: Guidance,
    fitting: FitConfig,
) -> TrainingTask:
    """Make the task of learning from reframed, randomised batches by a guided objective.

    Parameters
    ----------
    model
        A compiled network with lungwatch's head.
    data
        Its training pixels and targets.
    guide
        What is known of them besides.
    guidance, fitting
        How; the number of all steps is the length of the adversary's ramp.
    """
    shape = model.get_layer(FEATURES).output.shape
    robust = RobustLoss(guide.groups, guidance.group_robust) if guidance.group_robust else None
    adversary = None
    if guidance.domain_adversarial:
        adversary = Adversary(
            int(shape[3]),
            guide.there,
            weight=guidance.domain_adversarial,
            steps=fitting.epochs * math.ceil(len(data.train_targets) / fitting.batch_size),
            seed=fitting.seed,
        )

    def show(indices: NDArray[np.intp], rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
        pixels = data.train_pixels[indices]
        if guide.histograms is not None:
            amount = guidance.exchange_histograms
            pixels = exchange_histograms(pixels, indices, guide.histograms, amount, rng)
        lungs = guide.lungs[indices].astype(np.float32) / 255.0
        framed, found = reframe(pixels, lungs, guidance.framing, rng)
        return (
            randomise_domain(framed, found, guidance.disguise, rng),
            data.train_targets[indices],
            guide.gravity[indices],
            guide.source[indices],
            lungs_on_map(found, int(shape[1])),
        )

    learners = [learner for learner in (robust, adversary) if learner]

    def notes() -> dict[str, float]:
        return {name: value for learner in learners for name, value in learner.notes().items()}

    return binary_task(
        model,
        data,
        fitting,
        show=show,
        step=make_guided_step(model, guidance.objective, robust=robust, adversary=adversary),
        variables=[variable for learner in learners for variable in learner.variables],
        notes=notes,
    )


def train_guided(
    location: Path,
    root: Path,
    *,
    lungs: Path,
    network: TransferConfig,
    stride: int | None = None,
    fitting: FitConfig,
    guidance: Guidance,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    labels: LabelMap | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train all of a network for a fixed number of epochs, calibrate, and measure.

    Nothing stops early and the last weights are kept: validation images come from the same
    collections as the training images, and would prefer the network that knows those best.

    Parameters
    ----------
    lungs
        A run folder of `lungwatch train lungs`, or its model.
    network, fitting
        The network and how to train it; the learning rate is that of the steepest epoch.
    stride
        Cut the backbone at its last map of this many input pixels a cell, which makes maps for
        explanation finer and the network smaller; None keeps all of it.
    guidance
        Augmentation, objective and drawing.
    """
    progress = progress or Progress()
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(fitting.seed)
    segmenter = load_segmenter(lungs)
    # Fails early, before thousands of images are read, if the backbone cannot be had.
    backbone = load_backbone(network.backbone, network.weights, network.size_px)
    if stride:
        backbone = cut_at_stride(backbone, stride)
    model = build_transfer(network, backbone=backbone)
    unfreeze(model, None)
    prepared = prepare(
        location,
        PreprocessSpec(size_px=network.size_px),
        leave_out=leave_out,
        leaks=leaks,
        labels=labels,
        progress=progress,
    )
    run.begin(
        {
            "family": f"{network.backbone}, guided to the lungs",
            "network": {
                **asdict(network),
                "weights": Path(network.weights).name,
                "stride": stride,
            },
            "fit": asdict(fitting),
            "guidance": asdict(guidance),
            "preprocess": prepared.spec.to_dict(),
            "data": prepared.data,
        },
        resume=resume,
        record=prepared.record(builds_on=[Path(network.weights)]),
    )
    train = prepared.train.samples
    data = replace(
        prepared.fit_data(),
        train_targets=guidance.objective.targets(train),
        train_weights=sampling_weights(train, guidance.power, dict(guidance.shares)),
    )
    guide = make_guidance_data(train, prepared.train.pixels, segmenter, guidance)
    state = fit(
        lambda: model,
        data,
        fitting,
        run,
        task=lambda network: guided_task(network, data, guide, guidance, fitting),
        progress=progress,
    )
    if guidance.group_robust:
        _log_weights(run, state)
    metrics = conclude(run, state, prepared)
    return evaluate_rest(run, metrics, prepared, leave_out)


def _log_weights(run: RunFolder, state: FitState) -> None:
    # From the state, which an interrupted run goes on from: no epoch is missing or there twice.
    rows = [
        {
            "epoch": row["epoch"],
            # Sorted, as what was read back from the state is.
            **{key.removeprefix(WEIGHT): row[key] for key in sorted(row) if key.startswith(WEIGHT)},
        }
        for row in state.history
    ]
    run.write_table("group_weights.csv", rows)
    plot_group_weights(rows, run.root / "group_weights.png")


def cosine_rates(epochs: int, steepest: float) -> tuple[float, ...]:
    """Learning rates of each epoch: half the steepest to warm up, then down a half cosine."""
    falling = [0.5 * (1.0 + math.cos(math.pi * (e - 0.5) / epochs)) for e in range(1, epochs + 1)]
    falling[0] *= 0.5
    return tuple(steepest * (part + 0.01) for part in falling)


def load_segmenter(path: Path) -> KerasModel:
    """Open the network that finds lungs.

    Raises
    ------
    NotFoundError, ModelError
        If there is none, or it is damaged.
    DatasetError
        If it is another kind of network.
    """
    model = load_keras(RunFolder(root=path).model if path.is_dir() else path)
    if model.output_shape[1:] != (SEGMENTER_PX, SEGMENTER_PX, 1):
        raise DatasetError(f"{path} does not find lungs; train one with `lungwatch train lungs`")
    return model

"""Recipe `train guided`: objectives and domain randomisation that keep a network at the lungs."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import ImageClass, LabelMap, Sample
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.evaluation.plots import plot_group_weights
from lungwatch.training.fitting.augmentation import (
    MIN_LUNG_SHARE,
    DomainRandomisation,
    Framing,
    Histograms,
    exchange_histograms,
    randomise_domain,
    read_histograms,
    reframe,
)
from lungwatch.training.fitting.preparation import conclude, evaluate_rest, prepare
from lungwatch.training.fitting.run import Progress, RunFolder, open_run
from lungwatch.training.fitting.tasks import FitData, binary_task, fit, sampling_weights
from lungwatch.training.fitting.trainer import FitConfig, FitState, TrainingTask
from lungwatch.training.networks.backbones import (
    TransferConfig,
    build_transfer,
    cut_at_stride,
    load_backbone,
    unfreeze,
)
from lungwatch.training.networks.heads import DROPOUT, FEATURES, HIDDEN, LOGIT
from lungwatch.training.networks.lungs import SEGMENTER_PX, segment
from lungwatch.training.networks.weights import load_keras

# How grave each finding is, for ranking: other pneumonias lie between.
_SEVERITY: dict[ImageClass, int] = {"NORMAL": 0, "OTHER_PNEUMONIA": 1, "COVID": 2}


def severity_ranks(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Severity of the findings, int32 (N,): 0 NORMAL, 1 OTHER_PNEUMONIA, 2 COVID."""
    return np.array([_SEVERITY[s.finding] for s in samples], dtype=np.int32)


def source_numbers(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Number the sources in the order of their names, int32 (N,)."""
    names = sorted({s.source for s in samples})
    return np.array([names.index(s.source) for s in samples], dtype=np.int32)


# A handful of images can be learnt by heart, or never be right: either would say nothing of
# how their group does, so they count with the largest group of their finding.
FEWEST_OF_GROUP = 20
WEIGHT = "weight "


@dataclass(frozen=True, kw_only=True, eq=False)
class RiskGroups:
    """The groups whose risk is watched.

    Attributes
    ----------
    names
        As "ieee8023/COVID".
    table
        The group of each finding's severity and source's number, int32 (3, sources); -1 where
        there are no images.
    """

    names: tuple[str, ...]
    table: NDArray[np.int32]


def risk_groups(samples: Sequence[Sample]) -> RiskGroups:
    """Group training images by finding and source."""
    grave, source = severity_ranks(samples), source_numbers(samples)
    sizes = Counter(zip(grave.tolist(), source.tolist(), strict=True))
    names = {
        key: f"{s.source}/{s.finding}"
        for key, s in zip(zip(grave.tolist(), source.tolist(), strict=True), samples, strict=True)
    }
    largest = {
        finding: max((key for key in sizes if key[0] == finding), key=lambda key: sizes[key])
        for finding in sorted({key[0] for key in sizes})
    }
    own = sorted({*largest.values(), *(key for key in sizes if sizes[key] >= FEWEST_OF_GROUP)})
    table = np.full((3, int(source.max()) + 1), -1, dtype=np.int32)
    for key in sizes:
        table[key] = own.index(key if key in own else largest[key[0]])
    return RiskGroups(names=tuple(names[key] for key in own), table=table)


class RobustLoss:
    """The loss weighted by group, and the weights, which learn too.

    Parameters
    ----------
    groups
        Whose loss is watched.
    step
        How fast the weights move, above 0; Sagawa et al. use 0.01.
    """

    def __init__(self, groups: RiskGroups, step: float) -> None:
        import tensorflow as tf

        self._groups = groups
        self._step = step
        count = len(groups.names)
        self.weights = tf.Variable(np.full(count, 1.0 / count, np.float32), trainable=False)

    @property
    def variables(self) -> list[Any]:
        """Variables that a checkpoint must hold."""
        return [self.weights]

    def __call__(self, losses: Tensor, targets: Tensor, grave: Tensor, source: Tensor) -> Tensor:
        """Move the weights by a batch's losses, then weigh them.

        Parameters
        ----------
        losses, targets
            Cross-entropies in nats, and the targets they are of, (N,). What no network could
            undercut, the entropy of a soft target, moves no weight.
        grave, source
            Numbers of finding and source, (N,).
        """
        import tensorflow as tf

        group = tf.gather_nd(tf.constant(self._groups.table), tf.stack([grave, source], axis=1))
        members = tf.one_hot(group, len(self._groups.names))
        counts = tf.maximum(tf.reduce_sum(members, axis=0), 1.0)
        soft = tf.clip_by_value(targets, 1e-6, 1.0 - 1e-6)
        entropy = -soft * tf.math.log(soft) - (1.0 - soft) * tf.math.log(1.0 - soft)
        excess = tf.stop_gradient(losses - entropy)
        risks = tf.reduce_sum(excess[:, None] * members, axis=0) / counts
        grown = self.weights * tf.exp(self._step * risks)
        weights = self.weights.assign(grown / tf.reduce_sum(grown))
        means = tf.reduce_sum(losses[:, None] * members, axis=0) / counts
        return tf.reduce_sum(tf.stop_gradient(weights) * means)

    def notes(self) -> dict[str, float]:
        """Return the weights for the history, by group."""
        values = np.asarray(self.weights).tolist()
        return {WEIGHT + name: v for name, v in zip(self._groups.names, values, strict=True)}


_UNITS = 64
_LEARNING_RATE = 1e-3
_STEEPNESS = 10.0
_IMPOSSIBLE = -1e9
SOURCE_LOSS = "source_loss"


def sources_of_findings(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Tell which findings occur in which sources, bool (3, sources)."""
    source = source_numbers(samples)
    there = np.zeros((3, int(source.max()) + 1), dtype=bool)
    there[severity_ranks(samples), source] = True
    return there


def reversed_gradient(values: Tensor, strength: Tensor) -> Tensor:
    """Return the same values, whose gradient is turned about and multiplied by `strength`."""
    import tensorflow as tf

    return tf.stop_gradient((1.0 + strength) * values) - strength * values


class Adversary:
    """Source classifier on the pooled features, with an optimiser of its own.

    Parameters
    ----------
    features
        How many there are.
    there
        What `sources_of_findings` returns.
    weight
        Of the reversed gradient at the end of the ramp.
    steps
        Length of the training; the ramp is 1 at its end.
    seed
        Of the head's first weights.
    """

    def __init__(
        self, features: int, there: NDArray[np.bool_], *, weight: float, steps: int, seed: int
    ) -> None:
        import keras
        import tensorflow as tf

        self._there = there
        self._weight = weight
        self._steps = steps
        self._hidden, self._last = (
            keras.layers.Dense(
                units,
                activation=activation,
                kernel_initializer=keras.initializers.GlorotUniform(seed=seed + number),
            )
            for number, (units, activation) in enumerate([(_UNITS, "relu"), (there.size, None)])
        )
        self._hidden.build((None, features))
        self._last.build((None, _UNITS))
        self.trainable = [*self._hidden.trainable_variables, *self._last.trainable_variables]
        self._optimizer = keras.optimizers.Adam(_LEARNING_RATE)
        self._optimizer.build(self.trainable)
        self._mean_loss = tf.Variable(0.0, trainable=False)

    @property
    def variables(self) -> list[Any]:
        """Variables that a checkpoint must hold."""
        return [*self.trainable, *self._optimizer.variables, self._mean_loss]

    def __call__(self, pooled: Tensor, grave: Tensor, source: Tensor, step: Tensor) -> Tensor:
        """Return the mean cross-entropy of the source within the finding, in nats.

        Parameters
        ----------
        pooled
            Features, (N, C); they receive the reversed gradient.
        grave, source
            Numbers of finding and source, (N,).
        step
            How many steps there were before.
        """
        import tensorflow as tf

        part = tf.cast(step, tf.float32) / self._steps
        strength = self._weight * (2.0 / (1.0 + tf.exp(-_STEEPNESS * part)) - 1.0)
        answers = self._last(self._hidden(reversed_gradient(pooled, strength)))
        answers = tf.reshape(answers, (-1, *self._there.shape))
        own = tf.gather(answers, grave, batch_dims=1)
        possible = tf.gather(tf.constant(self._there), grave)
        own = tf.where(possible, own, _IMPOSSIBLE)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=source, logits=own)
        loss = tf.reduce_mean(losses)
        self._mean_loss.assign_add(0.05 * (tf.stop_gradient(loss) - self._mean_loss))
        return loss

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Take one step; gradients in the order of `trainable`."""
        self._optimizer.apply_gradients(zip(gradients, self.trainable, strict=True))

    def notes(self) -> dict[str, float]:
        """Return the head's loss of late for the history: it is small where sources show."""
        return {SOURCE_LOSS: float(self._mean_loss)}


_LARGEST_GRADIENT = 5.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of the loss.

    Attributes
    ----------
    other_target
        The target of other pneumonias, 0..1; 0 is the plain question "COVID or not", more
        asks for a score that opacities raise.
    ranking
        Weight of the ranking within sources.
    lungs
        Weight of the evidence outside the lungs; needs lung masks.
    """

    other_target: float = 0.0
    ranking: float = 0.0
    lungs: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.other_target < 1.0:
            raise ConfigError("the target of other pneumonias must lie within 0..1")
        if self.ranking < 0 or self.lungs < 0:
            raise ConfigError("the weights of ranking and lungs must not be below 0")

    def targets(self, samples: Sequence[Sample]) -> FloatArray:
        """Training targets of samples, float32 (N,)."""
        values = {"COVID": 1.0, "NORMAL": 0.0, "OTHER_PNEUMONIA": self.other_target}
        return np.array([values[s.finding] for s in samples], dtype=np.float32)


def lungs_on_map(lungs: FloatArray, side: int) -> FloatArray:
    """Bring lung masks, (N, S, S), onto a map's cells, (N, side, side), with some margin.

    Pleura and hila belong to what a reader looks at, and cells are coarse.
    """
    around = max(3, round(lungs.shape[1] * 0.05)) | 1
    grown = (cv2.dilate(mask, np.ones((around, around), np.uint8)) for mask in lungs)
    cells = [cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA) for mask in grown]
    return np.stack(cells).astype(np.float32)


def ranking_loss(logits: Tensor, grave: Tensor, source: Tensor) -> Tensor:
    """Mean logistic loss over the batch's pairs of one source with unlike findings.

    Parameters
    ----------
    logits, grave, source
        Tensors (N,): binary logits, and what `severity` and `source_numbers` return.
    """
    import tensorflow as tf

    graver = grave[:, None] > grave[None, :]
    pairs = tf.cast(graver & (source[:, None] == source[None, :]), tf.float32)
    losses = tf.nn.softplus(logits[None, :] - logits[:, None])
    return tf.reduce_sum(losses * pairs) / tf.maximum(tf.reduce_sum(pairs), 1.0)


def lungs_loss(evidence: Tensor, cells: Tensor) -> Tensor:
    """Mean share of the evidence, of either sign, that lies outside the lungs, 0..1.

    Parameters
    ----------
    evidence
        Tensor (N, h, w): Grad-CAM before its ReLU.
    cells
        Tensor (N, h, w), 0..1: see `lungs_on_map`. Images with next to no lung do not count.
    """
    import tensorflow as tf

    amount = tf.abs(evidence)
    outside = tf.reduce_sum(amount * (1.0 - cells), axis=(1, 2))
    share = outside / (tf.reduce_sum(amount, axis=(1, 2)) + 1e-6)
    known = tf.cast(tf.reduce_mean(cells, axis=(1, 2)) > MIN_LUNG_SHARE, tf.float32)
    return tf.reduce_sum(share * known) / tf.maximum(tf.reduce_sum(known), 1.0)


def make_guided_step(
    model: KerasModel,
    objective: Objective,
    robust: RobustLoss | None = None,
    adversary: Adversary | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the function that lets a compiled network learn from one batch by an objective.

    Parameters
    ----------
    model
        A compiled network, pixels to logit, with lungwatch's head.
    objective
        The weights.
    robust
        Weighs the groups' cross-entropies; None takes their mean over the batch.
    adversary
        Guesses the source from the features; None for nobody.

    Returns
    -------
    function
        Of pixels (N, S, S, 1), targets (N,), severity (N,), source numbers (N,) and lungs on the
        map's cells (N, h, w), to the loss and the binary logits (N,) before the step.
    """
    import keras
    import tensorflow as tf

    features_of = keras.Model(model.input, model.get_layer(FEATURES).output)
    hidden, dropout, last = (model.get_layer(name) for name in (HIDDEN, DROPOUT, LOGIT))
    # Variables must not be made while a graph is traced.
    model.optimizer.build(model.trainable_variables)

    def step(
        pixels: Tensor, targets: Tensor, grave: Tensor, source: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        with tf.GradientTape() as tape:
            features = features_of(pixels, training=True)
            pooled = tf.reduce_mean(features, axis=(1, 2))
            h = hidden(pooled)
            z = last(dropout(h, training=True))[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(targets, z)
            loss = robust(losses, targets, grave, source) if robust else tf.reduce_mean(losses)
            if objective.ranking:
                loss += objective.ranking * ranking_loss(z, grave, source)
            if objective.lungs:
                # The hidden layer's ReLU is its activation: h > 0 where it lets through.
                active = tf.cast(h > 0.0, tf.float32) * last.kernel[:, 0][None, :]
                weights = tf.matmul(active, hidden.kernel, transpose_b=True)
                evidence = tf.reduce_sum(features * weights[:, None, None, :], axis=-1)
                loss += objective.lungs * lungs_loss(evidence, cells)
            wanted = loss
            if adversary:
                wanted += adversary(pooled, grave, source, model.optimizer.iterations)
        opponent = adversary.trainable if adversary else []
        gradients, guesses = tape.gradient(wanted, (model.trainable_variables, opponent))
        if adversary:
            adversary.learn(guesses)
        clipped, _ = tf.clip_by_global_norm(gradients, _LARGEST_GRADIENT)
        model.optimizer.apply_gradients(zip(clipped, model.trainable_variables, strict=True))
        return loss, z

    traced: Callable[..., tuple[Tensor, Tensor]] = tf.function(step, reduce_retracing=True)
    return traced


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of a training; replaces plain augmentation and cross-entropy.

    Attributes
    ----------
    framing, disguise
        How images are changed at every showing.
    objective
        What is rewarded.
    power, shares
        How often each finding and, within it, each source is drawn; see
        `tasks.sampling_weights`.
    exchange_histograms
        How often an image is shown with another source's grey levels, 0..1; see
        `exchange_histograms`.
    group_robust
        Step of the groups' weights, see `RobustLoss`; 0 is the plain mean.
    domain_adversarial
        Weight of the reversed gradient, see `Adversary`; 0 is none.
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
    """Data of guided training besides pixels and targets.

    Attributes
    ----------
    severity, source
        int32 (N,); see `severity_ranks` and `source_numbers`.
    lungs
        uint8 (N, S, S): the probability of being lung, 255 for certain.
    groups
        Findings by source.
    there
        Which findings occur in which sources, bool (3, sources).
    histograms
        The grey levels, if they are to be exchanged.
    """

    severity: NDArray[np.int32]
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
        severity=severity_ranks(samples),
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
            guide.severity[indices],
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
    run = open_run(root, resume=resume, seed=fitting.seed)
    segmenter = load_segmenter(lungs)
    # Fails early, before thousands of images are read, if the backbone is not available.
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
    # The state is what a run resumes from: no epoch is missing or there twice.
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

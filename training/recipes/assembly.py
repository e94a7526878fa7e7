"""Recipes that assemble trained networks: `train join` and `train findings`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError, MissingExtraError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import LabelMap, Sample, select
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import FloatArray, KerasModel, targets
from lungwatch.training.data.splits import LearntImages, learnt_of, prefix
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.scorers import KerasScorer
from lungwatch.training.fitting.preparation import (
    VALIDATION,
    Part,
    Prepared,
    calibrate_on,
    calibrate_outputs,
    evaluate_rest,
    prepare,
)
from lungwatch.training.fitting.run import Progress, RunFolder, open_run
from lungwatch.training.networks.heads import (
    FEATURES,
    FINER,
    HIDDEN,
    LOGIT,
    MARGIN,
    POOLED,
    Member,
    join_networks,
)
from lungwatch.training.networks.lungs import (
    FINDER_PX,
    THREE,
    TRUNK,
    FoundBox,
    _shrunk,
    agreement,
    boxes_around,
    build_field_finder,
    build_finder,
    fit_finder,
    segment,
    view_field,
)
from lungwatch.training.networks.lungs import HIDDEN as CLASSES_HIDDEN
from lungwatch.training.networks.weights import load_keras, save_keras


def learn_box(
    prepared: Prepared, segmenter: KerasModel, *, progress: Progress | None = None
) -> FoundBox:
    """Train a box finder on a data set, and measure its boxes on validation images.

    Parameters
    ----------
    prepared
        The data set; its pixels' side must be a multiple of 64 px.
    segmenter
        Its masks are what the box finder learns from.

    Raises
    ------
    ConfigError
        If the side is no such multiple.
    DatasetError
        If no lungs are found in training or validation images.
    """
    if prepared.spec.size_px % FINDER_PX:
        raise ConfigError(f"a box of the lungs is found in inputs of a multiple of {FINDER_PX} px")

    def with_lungs(part: Part) -> tuple[FloatArray, FloatArray]:
        pixels = np.stack([_shrunk(image) for image in part.pixels])
        return pixels, segment(segmenter, pixels)

    small = fit_finder(
        *with_lungs(prepared.train), on_epoch=progress.on_epoch if progress else None
    )
    pixels, lungs = with_lungs(prepared.val)
    known, boxes = boxes_around(lungs)
    if not known.any():
        raise DatasetError("no lungs were found in the validation images")
    finder = build_finder(prepared.spec.size_px)
    finder.set_weights(small.get_weights())
    return FoundBox(
        finder=finder,
        parameters=int(finder.count_params()),
        overlap=agreement(np.asarray(small(pixels[known], training=False)), boxes[known]),
    )


_FEWEST = 2
_OF_MEMBERS = ("family", "network", "fit", "guidance", "normalisation", "data")


def train_join(
    runs: Sequence[Path],
    location: Path,
    root: Path,
    *,
    lungs: Path | None = None,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    labels: LabelMap | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Join the networks of finished runs, calibrate the whole, and measure it.

    Parameters
    ----------
    runs
        Run folders, each calibrated on validation data.
    location
        The data set whose validation split calibrates.
    lungs
        Run folder of `train lungs`: the joint network then sees the box of the lungs alone,
        from an input of twice the side, and finds it by itself. None shows it the whole image.
    leave_out
        A source; the runs must have been trained without it.
    resume
        Do it again in `root`, if it was begun with the same configuration.
    """
    if len(runs) < _FEWEST:
        raise ConfigError("give at least two runs to join")
    run = open_run(root, resume=resume)
    scorers = _open_members(runs, leave_out)
    spec = scorers[0].judgement.preprocess
    segmenter = load_keras(RunFolder(root=lungs).model) if lungs else None
    if segmenter is not None:
        spec = replace(spec, size_px=FINER * spec.size_px)
    prepared = prepare(
        location, spec, leave_out=leave_out, leaks=leaks, labels=labels, progress=progress
    )
    learnt = LearntImages()
    for path in runs:
        learnt |= learnt_of(path) or LearntImages()
    unseen = prepared.val.take(_unlearnt(prepared, learnt))
    learnt |= LearntImages(val=prepared.record().learnt.val)
    run.begin(
        {
            "family": " + ".join(scorer.config["family"] for scorer in scorers),
            "members": [
                {key: scorer.config[key] for key in _OF_MEMBERS if key in scorer.config}
                for scorer in scorers
            ],
            **({"lung_view": {"margin": MARGIN, "segmenter": "U-Net"}} if lungs else {}),
            "preprocess": spec.to_dict(),
            "data": prepared.data,
        },
        resume=resume,
        record=replace(prepared.files, learnt=learnt),
    )
    found = learn_box(prepared, segmenter, progress=progress) if segmenter is not None else None
    members = [
        Member(name=f"member_{n}", model=scorer.model, calibration=scorer.judgement.calibration)
        for n, scorer in enumerate(scorers, start=1)
    ]
    model = join_networks(members, finder=found and found.finder)
    save_keras(model, run.model)
    scorer = KerasScorer(root)
    metrics = {
        "best_epoch": max(s.metrics["best_epoch"] for s in scorers),
        "epochs": max(s.metrics["epochs"] for s in scorers),
        "parameters": int(model.count_params()),
        **({"lung_box": found.to_dict()} if found else {}),
        **calibrate_on(unseen, prepared, scorer.logits),
    }
    return evaluate_rest(run, metrics, prepared, leave_out)


def _open_members(runs: Sequence[Path], leave_out: str | None) -> list[KerasScorer]:
    """Open the networks to join; refuse those that do not belong together."""
    scorers = [KerasScorer(path) for path in runs]
    for path, scorer in zip(runs, scorers, strict=True):
        if not scorer.calibrated:
            raise ConfigError(f"{path} is no finished run")
        if scorer.judgement.preprocess != scorers[0].judgement.preprocess:
            raise ConfigError(
                "the runs' preprocessing differs; their networks cannot share an input"
            )
        _check_left_out(path, scorer.config.get("data", {}).get("left_out"), leave_out)
    return scorers


def _unlearnt(prepared: Prepared, learnt: LearntImages) -> list[int]:
    # A member that was retrained has learnt from most of the validation split.
    folder, files = prepared.folder, prepared.files
    found = [
        index
        for index, sample in enumerate(prepared.val.samples)
        if prefix(files.row(sample.path, folder).sha256) not in learnt.train
    ]
    select(
        [prepared.val.samples[index] for index in found],
        None,
        f"{prepared.name}: what of split 'val' no member has learnt from",
    )
    return found


def _check_left_out(run: Path, theirs: str | None, asked: str | None) -> None:
    # A member that has seen the source would make the joint figures too good, and one that
    # has not would be calibrated on a source it is not made for.
    if theirs != asked:
        without = f"without {theirs}" if theirs else "with all sources"
        wanted = f"--leave-out {theirs}" if theirs else "no --leave-out"
        raise ConfigError(f"{run} was trained {without}; join it with its like and {wanted}")


OPACITY_HIDDEN, OPACITY = "opacity_hidden", "opacity_logit"
"""Layer with the logit of an opacity, (N, 1)."""
FINDING_LOGITS = "finding_logits"
"""Layer with the logits of COVID and of an opacity, (N, 2)."""
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties that are tried, from weak to strong."""
_MIDDLE = 1.0
_FEWEST_OF_SIDE = 5  # images on one side of an area under the curve
_AGAINST_REST = (-0.5, -0.5, 1.0)  # of the classes' logits
_OTHERS = ("NORMAL", "OTHER_PNEUMONIA")


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearHead:
    """A linear logit of the pooled features.

    Attributes
    ----------
    weights
        float32, shape (C,).
    bias
        Logit of no features.
    """

    weights: FloatArray
    bias: float

    def logits(self, features: FloatArray) -> FloatArray:
        """Return the logits, (N,), of features, (N, C)."""
        return np.asarray(features @ self.weights + np.float32(self.bias), np.float32)


@dataclass(frozen=True, kw_only=True)
class PenaltyChoice:
    """Chosen penalty, and the figures that chose it.

    Attributes
    ----------
    penalty
        The chosen one.
    left_out
        Penalty -> source left out -> "COVID vs FINDING" -> ROC-AUC; empty where fewer than two
        sources have enough COVID.
    """

    penalty: float
    left_out: dict[str, dict[str, dict[str, float]]]


def fit_head(features: FloatArray, samples: Sequence[Sample], penalty: float) -> LinearHead:
    """Fit a linear head that separates COVID from the rest.

    COVID and the rest weigh the same; within each, a group of one source and one finding weighs
    as the square root of its number.

    Parameters
    ----------
    features
        float32, shape (N, C).
    samples
        What they are of.
    penalty
        Of half the squared weights of the standardised features, where the loss is the weighted
        mean of each side, added up.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("training findings", "train") from error

    truth = targets(samples)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    found = LogisticRegression(C=1.0 / penalty, max_iter=1000).fit(
        ((features - mean) / deviation).astype(np.float64), truth, sample_weight=_weights(samples)
    )
    weights = found.coef_[0] / deviation
    return LinearHead(
        weights=weights.astype(np.float32), bias=float(found.intercept_[0] - weights @ mean)
    )


def choose_penalty(
    features: FloatArray, samples: Sequence[Sample], is_learnt: NDArray[np.bool_]
) -> PenaltyChoice:
    """Choose the penalty by sources left out.

    Each source that has COVID is left out in turn; its COVID is scored against normals and other
    pneumonias that were not learnt from either: the source's own, and those of the validation
    split. The penalty with the highest mean wins, the stronger one on a tie.

    Parameters
    ----------
    features
        float32, shape (N, C), of training and validation images.
    samples
        What they are of.
    is_learnt
        bool, shape (N,): whether an image is of the training split.
    """
    sources = np.array([s.source for s in samples])
    findings = np.array([s.finding for s in samples])
    with_covid, counts = np.unique(sources[findings == "COVID"], return_counts=True)
    tried = [
        source for source, count in zip(with_covid, counts, strict=True) if count >= _FEWEST_OF_SIDE
    ]
    if len(tried) < 2:
        return PenaltyChoice(penalty=_MIDDLE, left_out={})
    table: dict[str, dict[str, dict[str, float]]] = {}
    means: list[float] = []
    for penalty in PENALTIES:
        rows = {}
        for source in tried:
            own = sources == source
            learnt = np.flatnonzero(is_learnt & ~own)
            head = fit_head(features[learnt], [samples[int(i)] for i in learnt], penalty)
            logits = head.logits(features)
            rows[str(source)] = dict(_against(logits, findings, own, own | ~is_learnt))
        table[f"{penalty:g}"] = rows
        means.append(float(np.mean([v for row in rows.values() for v in row.values()])))
    best = max(range(len(PENALTIES)), key=lambda index: (round(means[index], 4), index))
    return PenaltyChoice(penalty=PENALTIES[best], left_out=table)


def assemble(
    fields: Sequence[KerasModel], gate: KerasModel, head: LinearHead, *, size_px: int
) -> KerasModel:
    """Assemble the network for whole X-rays.

    Parameters
    ----------
    fields
        Of `lungs.build_field_network`, with equal views: their
        features lie side by side, and the opacity's logit is their mean.
    gate
        Of `lungs.build_gate_network`: finds the lungs.
    head
        COVID's, of the features of all.
    size_px
        Side of the X-ray, a multiple of the gate's.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, S, S, 1), 0..1, to COVID's logit, (N, 1), with the head of
        `heads`. The layer `OPACITY` has the opacity's.
    """
    import keras

    layers = keras.layers
    pixels = keras.Input((size_px, size_px, 1), name="pixels")
    finder = build_field_finder(gate, size_px)
    shown = view_field(pixels, finder, int(fields[0].input_shape[1]))
    trunks = [one.get_layer(TRUNK) for one in fields]
    maps = [
        keras.Model(trunk.input, trunk.output, name=f"{TRUNK}_{number}")(shown)
        for number, trunk in enumerate(trunks)
    ]
    together = layers.Concatenate(name="side_by_side")(maps) if len(maps) > 1 else maps[0]
    features = layers.Activation("linear", name=FEATURES)(together)
    pooled = layers.GlobalAveragePooling2D(name=POOLED)(features)
    hidden = layers.Dense(2, activation="relu", name=HIDDEN)(pooled)
    covid = layers.Dense(1, name=LOGIT)(hidden)
    opacity_hidden, opacity_last = _opacity_weights(fields)
    units = layers.Dense(len(opacity_last[0]), activation="relu", name=OPACITY_HIDDEN)(pooled)
    opacity = layers.Dense(1, name=OPACITY)(units)
    # One answer like any network's; through this layer a saved network keeps the other as well.
    both = layers.Concatenate(name=FINDING_LOGITS)([covid, opacity])
    model = keras.Model(pixels, both[:, :1], name="findings")
    # A linear logit z as relu(z) - relu(-z).
    kernel = np.stack([head.weights, -head.weights], axis=1)
    model.get_layer(HIDDEN).set_weights([kernel, np.array([head.bias, -head.bias], np.float32)])
    model.get_layer(LOGIT).set_weights([np.array([[1.0], [-1.0]], np.float32), np.zeros(1)])
    model.get_layer(OPACITY_HIDDEN).set_weights(opacity_hidden)
    model.get_layer(OPACITY).set_weights(opacity_last)
    model.trainable = False
    return model


def channels_of(fields: Sequence[KerasModel]) -> int:
    """Count the pooled features of networks side by side."""
    return sum(int(one.get_layer(TRUNK).output.shape[-1]) for one in fields)


def opacity_against_rest(logits: FloatArray) -> FloatArray:
    """Turn the logits of the classes, (N, 3), into the opacity's, (N,), of an assembled network.

    Against the mean of the other classes' logits, which a head of one hidden layer can give.
    """
    return np.asarray(logits @ np.array(_AGAINST_REST, np.float32), np.float32)


def _opacity_weights(fields: Sequence[KerasModel]) -> tuple[list[FloatArray], list[FloatArray]]:
    """Join the hidden layers of networks as blocks, and average their opacity logits."""
    kernels, biases = zip(*(o.get_layer(CLASSES_HIDDEN).get_weights() for o in fields), strict=True)
    rows, columns = (sum(kernel.shape[axis] for kernel in kernels) for axis in (0, 1))
    kernel = np.zeros((rows, columns), np.float32)
    row = column = 0
    for block in kernels:
        kernel[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    mixed = [
        [opacity_against_rest(np.atleast_2d(part)) / len(fields) for part in o.get_weights()]
        for o in (one.get_layer(THREE) for one in fields)
    ]
    last = np.concatenate([kernel for kernel, _ in mixed])[:, np.newaxis]
    return [kernel, np.concatenate(biases)], [last, np.sum([bias for _, bias in mixed], axis=0)]


def _weights(samples: Sequence[Sample]) -> NDArray[np.float64]:
    truth = targets(samples) > 0.5
    names = [f"{s.source}/{s.finding}" for s in samples]
    _, group, counts = np.unique(names, return_inverse=True, return_counts=True)
    weights = 1.0 / np.sqrt(counts[group])
    for side in (truth, ~truth):
        weights[side] /= weights[side].sum()
    return np.asarray(weights, np.float64)


def _against(
    logits: FloatArray,
    findings: NDArray[np.str_],
    own: NDArray[np.bool_],
    unseen: NDArray[np.bool_],
) -> Iterator[tuple[str, float]]:
    covid = logits[own & (findings == "COVID")]
    for other in _OTHERS:
        rest = logits[unseen & (findings == other)]
        if len(rest) >= _FEWEST_OF_SIDE:
            is_covid = np.repeat([True, False], [len(covid), len(rest)])
            auc = roc_auc(is_covid, np.concatenate([covid, rest]))
            yield f"COVID vs {other}", round(float(auc), 4)


FINDINGS_FAMILY = "Findings on lung fields"
FINDINGS_PX = 320
_AT_ONCE = 32


def train_findings(
    location: Path,
    root: Path,
    *,
    fields: Sequence[Path],
    gate: Path,
    size_px: int = FINDINGS_PX,
    penalty: float | None = None,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit COVID on a trunk of lung fields, calibrate and measure it.

    Parameters
    ----------
    location
        The data set; normals, other pneumonias and children are the rest.
    fields
        Run folders of `train fields`, of different seeds: their features lie side by side.
    gate
        Run folder of `train gate`: its network finds the lungs.
    size_px
        Side of the X-ray, a multiple of the gate's.
    penalty
        See `fit_head`; None chooses it by sources left out.
    resume
        Do it again in `root`, if it was begun with the same configuration.
    """
    progress = progress or Progress()
    run = open_run(root, resume=resume)
    parts = [RunFolder(root=one) for one in (*fields, gate)]
    *trunks, finder = (load_keras(one.model) for one in parts)
    if len({trunk.input_shape for trunk in trunks}) != 1:
        raise ConfigError("give networks of lung fields with views of one size")
    if size_px % int(finder.input_shape[1]):
        raise ConfigError(f"the size must be a multiple of the gate's {finder.input_shape[1]} px")
    spec = PreprocessSpec(size_px=size_px)
    prepared = prepare(location, spec, leave_out=leave_out, leaks=leaks, progress=progress)
    described = [one.read("config.json") for one in parts]
    run.begin(
        {
            "family": FINDINGS_FAMILY,
            "network": {"penalty": penalty},
            "members": [
                {key: one[key] for key in ("family", "fit", "data") if key in one}
                for one in described
            ],
            "preprocess": spec.to_dict(),
            "data": prepared.data,
        },
        resume=resume,
    )
    nothing = LinearHead(weights=np.zeros(channels_of(trunks), np.float32), bias=0.0)
    embedding = _embedding(assemble(trunks, finder, nothing, size_px=size_px))
    train, val = (_embed(embedding, part.pixels) for part in (prepared.train, prepared.val))
    choice = choose_penalty(
        np.concatenate([train, val]),
        [*prepared.train.samples, *prepared.val.samples],
        np.repeat([True, False], [len(train), len(val)]),
    )
    head = fit_head(train, prepared.train.samples, penalty or choice.penalty)
    model = assemble(trunks, finder, head, size_px=size_px)
    save_keras(model, run.model)
    metrics: dict[str, Any] = {
        "best_epoch": 1,
        "epochs": 1,
        "parameters": int(model.count_params()),
        "penalty": penalty or choice.penalty,
        "by_sources_left_out": choice.left_out,
        "calibrated_on": VALIDATION,
        **calibrate_outputs(prepared.val.targets, head.logits(val)),
    }
    return evaluate_rest(run, metrics, prepared, leave_out)


def _embedding(model: KerasModel) -> KerasModel:
    import keras

    return keras.Model(model.input, model.get_layer(POOLED).output)


def _embed(model: KerasModel, pixels: FloatArray) -> FloatArray:
    parts = [
        np.asarray(model(pixels[start : start + _AT_ONCE], training=False))
        for start in range(0, len(pixels), _AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float32)

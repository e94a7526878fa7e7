"""The findings of a network that sees the lungs alone, on a trunk that stays as it is.

The trunk knows what lungs show from sources where a finding tells no source. To fine-tune it with
COVID, of which each source has its own, would throw that away; a strongly regularised logistic
regression on its pooled features keeps it. How strongly is chosen by sources left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import MissingExtraError
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray, KerasModel, targets
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.field_finder import build_field_finder, see_field
from lungwatch.training.field_network import HIDDEN as CLASSES_HIDDEN
from lungwatch.training.field_network import THREE, TRUNK
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT, POOLED

OPACITY_HIDDEN, OPACITY = "opacity_hidden", "opacity_logit"
"""Layer with the logit of an opacity, (N, 1)."""
FINDING_LOGITS = "finding_logits"
"""Layer with the logits of COVID and of an opacity, (N, 2)."""

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Penalties that are tried, from weak to strong."""
_MIDDLE = 1.0
_FEWEST = 5  # images on one side of an area under the curve
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
class Choice:
    """Which penalty was chosen, and by what.

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
    """Fit COVID against the rest.

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
) -> Choice:
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
    tried = [source for source, count in zip(with_covid, counts, strict=True) if count >= _FEWEST]
    if len(tried) < 2:
        return Choice(penalty=_MIDDLE, left_out={})
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
    return Choice(penalty=PENALTIES[best], left_out=table)


def assemble(
    fields: Sequence[KerasModel], gate: KerasModel, head: LinearHead, *, size_px: int
) -> KerasModel:
    """Build the network for whole X-rays.

    Parameters
    ----------
    fields
        Of `lungwatch.training.field_network.build_field_network`, with equal views: their
        features lie side by side, and the opacity's logit is their mean.
    gate
        Of `lungwatch.training.gate_network.build_gate_network`: finds the lungs.
    head
        COVID's, of the features of all.
    size_px
        Side of the X-ray, a multiple of the gate's.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, S, S, 1), 0..1, to COVID's logit, (N, 1), with the head of
        `lungwatch.training.head`. The layer `OPACITY` has the opacity's.
    """
    import keras

    layers = keras.layers
    pixels = keras.Input((size_px, size_px, 1), name="pixels")
    finder = build_field_finder(gate, size_px)
    shown = see_field(pixels, finder, int(fields[0].input_shape[1]))
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
    """Put the hidden layers of networks side by side, as blocks, and average their opacities."""
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
        if len(rest) >= _FEWEST:
            is_covid = np.repeat([True, False], [len(covid), len(rest)])
            auc = roc_auc(is_covid, np.concatenate([covid, rest]))
            yield f"COVID vs {other}", round(float(auc), 4)

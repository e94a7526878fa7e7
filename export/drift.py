"""The reference for drift of a bundle, measured on a data set as the daemon would measure it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import CAM, COVID, EMBEDDING, INPUT, LOGITS
from lungwatch.driftreference import COMPONENTS, GATE_ACCEPTED, DriftReference, figures_of
from lungwatch.errors import DatasetError, FileRejected, Reason
from lungwatch.export.gate import ExportedGate, OnnxGate
from lungwatch.imaging import read_radiograph
from lungwatch.lungfield import area_of, lung_mask, share_inside
from lungwatch.preprocess import content_of, preprocess
from lungwatch.training.dataset import dataset_name, load_dataset, of_split
from lungwatch.training.label_map import LabelMap
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample, Split
from lungwatch.training.scorers import OnnxScorer
from lungwatch.twosample import LEAST, Distribution

_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class _Picture:
    tensor: FloatArray
    gate_tensor: FloatArray | None
    shape: tuple[int, int]
    view: str


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One picture's figures; what follows `view` is None for a picture that the gate refuses."""

    gate_score: float | None
    lung_area: float | None
    reason: Reason | None
    view: str
    logit: float | None = None
    lung_share: float | None = None
    embedding: NDArray[np.float32] | None = None


def make_reference(
    scorer: OnnxScorer,
    gate: ExportedGate | None,
    data: Path,
    *,
    labels: LabelMap | None = None,
    progress: Callable[[int], None] | None = None,
) -> DriftReference | None:
    """Measure the population that a site's results are compared with.

    Parameters
    ----------
    scorer
        The graph of the bundle.
    gate
        Its content gate, if it has one.
    data
        Data set of the training: its validation split, which the network has not learnt by heart;
        the test split of one without.
    labels
        What to do with labels that are none of lungwatch's.
    progress
        Called with 1 for every image read.

    Returns
    -------
    DriftReference or None
        None where fewer than 20 pictures can be scored.

    Raises
    ------
    DatasetError
        If images are missing or cannot be read.
    """
    samples = load_dataset(data, labels)
    split: Split = "val" if any(sample.split == "val" for sample in samples) else "test"
    chosen = of_split(samples, split, dataset_name(data))
    asked = OnnxGate(gate.onnx, gate.contract) if gate else None
    measured = list(_measure(scorer, asked, chosen, progress))
    scored = [one.embedding for one in measured if one.embedding is not None]
    if len(scored) < LEAST:
        return None
    centre, axes = principal_axes(np.stack(scored), COMPONENTS)
    empty = DriftReference(source="", centre=centre, axes=axes, values={})
    values: dict[str, list[float]] = defaultdict(list)
    for one in measured:
        for name, value in figures_of(
            logit=one.logit,
            gate_score=one.gate_score,
            lung_area=one.lung_area,
            lung_share=one.lung_share,
            components=None if one.embedding is None else empty.components(one.embedding),
        ).items():
            values[name].append(value)
    return DriftReference(
        source=f"{dataset_name(data)}/{split}",
        centre=centre,
        axes=axes,
        values={name: Distribution.of(found).reduced() for name, found in values.items()},
        tags=_tags(measured, is_gated=gate is not None),
    )


def principal_axes(embeddings: FloatArray, most: int) -> tuple[FloatArray, FloatArray]:
    """Return the mean of embeddings, (n,), and their principal axes, (k, n), for unit variance.

    Source: Pearson 1901, by singular values. Axes without variance are left out, and each has its
    largest element above 0, so that the same embeddings give the same axes.
    """
    centre = embeddings.mean(axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(embeddings - centre, full_matrices=False)
    spread = sizes / np.sqrt(max(1, len(embeddings) - 1))
    kept = np.flatnonzero(spread > 1e-6 * max(float(spread[0]), 1e-12))[:most]
    chosen = axes[kept] / spread[kept, np.newaxis]
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1)[:, np.newaxis], axis=1)
    return centre.astype(np.float32), (chosen * np.sign(largest)).astype(np.float32)


def _measure(
    scorer: OnnxScorer,
    gate: OnnxGate | None,
    samples: Sequence[Sample],
    progress: Callable[[int], None] | None,
) -> Iterator[_Measured]:
    spec = scorer.contract.preprocess
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        for start in range(0, len(samples), _AT_ONCE):
            batch = samples[start : start + _AT_ONCE]
            pictures = list(pool.map(lambda one: _read(one, scorer, gate), batch))
            logits, cams, embeddings = scorer.session.run(
                [LOGITS, CAM, EMBEDDING], {INPUT: np.stack([one.tensor for one in pictures])}
            )
            seen = [one.gate_tensor for one in pictures if one.gate_tensor is not None]
            answers = gate.run(np.stack(seen)) if gate else [None] * len(batch)
            for index, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
                area = share = score = reason = None
                if gate and answer:
                    mask = lung_mask(answer.lungs, picture.shape, gate.contract.preprocess)
                    cam = cams[index][scorer.contract.labels.index(COVID)]
                    share = share_inside(
                        content_of(cam, picture.shape, spec), mask.astype(np.float32)
                    )
                    area, score = area_of(mask), answer.verdict.score
                    reason = answer.verdict.reason
                is_scored = reason is None
                yield _Measured(
                    gate_score=score,
                    lung_area=area,
                    reason=reason,
                    view=picture.view,
                    logit=float(logits[index][1] - logits[index][0]) if is_scored else None,
                    lung_share=share if is_scored else None,
                    embedding=embeddings[index] if is_scored else None,
                )
                if progress:
                    progress(1)


def _read(sample: Sample, scorer: OnnxScorer, gate: OnnxGate | None) -> _Picture:
    try:
        found = read_radiograph(sample.path)
    except (FileRejected, OSError) as error:
        raise DatasetError(f"{sample.path}: {error}") from error
    pixels = found.pixels
    return _Picture(
        tensor=preprocess(pixels, scorer.contract.preprocess),
        gate_tensor=preprocess(pixels, gate.contract.preprocess) if gate else None,
        shape=(pixels.shape[0], pixels.shape[1]),
        view=(found.meta.view_position or "").strip(),
    )


def _tags(measured: Sequence[_Measured], *, is_gated: bool) -> dict[str, dict[str, int]]:
    """Count what is known of most pictures; size and depth of training files tell nothing."""
    tags = {}
    if is_gated:
        tags["gate"] = dict(Counter(str(one.reason or GATE_ACCEPTED) for one in measured))
    views = Counter(one.view for one in measured)
    if views[""] * 2 < len(measured):
        tags["view"] = dict(views)
    return tags

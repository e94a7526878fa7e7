"""Train the findings of a network that sees the lungs: the whole of `lungwatch train findings`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.conclude import VALIDATION, judge
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.evaluation import evaluate_pixels
from lungwatch.training.evaluation.scorers import KerasScorer, load_keras
from lungwatch.training.findings_head import (
    OPACITY,
    LinearHead,
    assemble,
    channels_of,
    choose_penalty,
    fit_head,
)
from lungwatch.training.head import POOLED
from lungwatch.training.keras_file import save_keras
from lungwatch.training.left_out import measure_left_out
from lungwatch.training.prepare import prepare
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow

FAMILY = "Findings on lung fields"
SIZE_PX = 320
_AT_ONCE = 32


def train_findings(
    location: Path,
    root: Path,
    *,
    fields: Sequence[Path],
    gate: Path,
    size_px: int = SIZE_PX,
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
        The data set; see `load_dataset`. Normals, other pneumonias and children are the rest.
    root
        The run folder to fill.
    fields
        Run folders of `train fields`, of different seeds: their features lie side by side.
    gate
        Run folder of `train gate`: its network finds the lungs.
    size_px
        Side of the X-ray, a multiple of the gate's.
    penalty
        See `lungwatch.training.findings_head.fit_head`; None chooses it by sources left out.
    leave_out, leaks
        See `lungwatch.training.prepare.prepare`.
    resume
        Do it again in `root`, if it was begun with the same configuration.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`; `penalty` with what it was chosen by; with a source
        left out, its figures as `left_out`.

    Raises
    ------
    ConfigError
        If `root` holds another run, the size does not fit the gate's, or the views differ.
    NotFoundError, ModelError
        If a run is not finished.
    DatasetError
        If a split is missing or empty, holds one class only, leaks, or a file is unreadable.
    MissingExtraError
        If TensorFlow or scikit-learn is not installed.
    """
    progress = progress or Progress()
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow()
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
            "family": FAMILY,
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
    verdict = judge(prepared.val.targets, head.logits(val))
    metrics: dict[str, Any] = {
        "best_epoch": 1,
        "epochs": 1,
        "parameters": int(model.count_params()),
        "penalty": penalty or choice.penalty,
        "by_sources_left_out": choice.left_out,
        "calibrated_on": VALIDATION,
        **verdict.to_dict(),
    }
    run.write("metrics.json", metrics)
    judged = KerasScorer(root)
    if prepared.test.samples:
        metrics["test"] = evaluate_pixels(judged, prepared.test.samples, prepared.test.pixels)
    if leave_out:
        metrics["left_out"] = measure_left_out(judged, prepared, leave_out)
    run.write("metrics.json", metrics)
    return metrics


def opacity_logits(model: KerasModel, pixels: FloatArray) -> FloatArray:
    """Return the logits of an opacity, float32 (N,), for X-rays, (N, S, S, 1), 0..1."""
    import keras

    return _embed(keras.Model(model.input, model.get_layer(OPACITY).output), pixels)[:, 0]


def _embedding(model: KerasModel) -> KerasModel:
    import keras

    return keras.Model(model.input, model.get_layer(POOLED).output)


def _embed(model: KerasModel, pixels: FloatArray) -> FloatArray:
    parts = [
        np.asarray(model(pixels[start : start + _AT_ONCE], training=False))
        for start in range(0, len(pixels), _AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float32)

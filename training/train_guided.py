"""Train a network that is guided to the lungs: the whole of `lungwatch train guided`."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.backbones import cut_at_stride, load_backbone
from lungwatch.training.conclude import conclude
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.data.plots import plot_group_weights
from lungwatch.training.evaluation.evaluation import evaluate_pixels
from lungwatch.training.evaluation.scorers import KerasScorer, load_keras
from lungwatch.training.fit import fit
from lungwatch.training.fit_config import FitConfig
from lungwatch.training.fit_state import FitState
from lungwatch.training.guidance import Guidance, guided_lesson, make_guide
from lungwatch.training.left_out import measure_left_out
from lungwatch.training.prepare import prepare
from lungwatch.training.progress import Progress
from lungwatch.training.robust import WEIGHT
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.sampling import sampling_weights
from lungwatch.training.segmenter import SIZE_PX
from lungwatch.training.transfer import TransferConfig, build_transfer, unfreeze


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
    location
        The data set, with the splits train and val; see `load_dataset`.
    root
        The run folder to fill.
    lungs
        A run folder of `lungwatch train lungs`, or its model.
    network, fitting
        The network and how to train it; the learning rate is that of the steepest epoch.
    stride
        Cut the backbone at its last map of this many input pixels a cell, which makes maps for
        explanation finer and the network smaller; None keeps all of it.
    guidance
        What keeps training at the lungs.
    leave_out, leaks, labels
        See `lungwatch.training.prepare.prepare`.
    resume
        Continue the run that is in `root`.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`: as `train_baseline`; the figures on the `test` split
        if there is one, the source left out included; and, of such a source, those of all its
        images against the other sources' test images of the other class, as `left_out`.

    Raises
    ------
    DatasetError
        If a split is missing or empty, holds one class only, leaks, or a file is unreadable.
    ConfigError
        If `root` holds another run, or the backbone cannot be had.
    NotFoundError, ModelError
        If there is no segmenter, or it is none.
    MissingExtraError
        If TensorFlow is not installed.
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
    guide = make_guide(train, prepared.train.pixels, segmenter, guidance)
    steps = fitting.epochs * math.ceil(len(train) / fitting.batch_size)
    state = fit(
        lambda: model,
        data,
        fitting,
        run,
        lesson=lambda network: guided_lesson(
            network, data, guide, guidance, steps=steps, seed=fitting.seed
        ),
        on_batch=progress.on_batch,
        on_epoch=progress.on_epoch,
    )
    if guidance.group_robust:
        _log_weights(run, state)
    metrics = conclude(run, state, prepared.val.pixels, prepared.val.targets)
    scorer = KerasScorer(root)
    if prepared.test.samples:
        metrics["test"] = evaluate_pixels(scorer, prepared.test.samples, prepared.test.pixels)
    if leave_out:
        metrics["left_out"] = measure_left_out(scorer, prepared, leave_out)
    run.write("metrics.json", metrics)
    return metrics


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
    if model.output_shape[1:] != (SIZE_PX, SIZE_PX, 1):
        raise DatasetError(f"{path} does not find lungs; train one with `lungwatch train lungs`")
    return model

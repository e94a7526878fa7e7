"""Recipe `train pretrain`: a backbone pretrained on X-rays for one task or several."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import (
    count_labels,
    dataset_name,
    labelled_split,
    load_labelled,
)
from lungwatch.training.data.pixels import FloatArray, KerasModel, read_pixels
from lungwatch.training.data.splits import DataRecord, LearntImages, learnt_of
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.plots import plot_history
from lungwatch.training.fitting.run import Progress, RunFolder, prepare_tensorflow
from lungwatch.training.fitting.trainer import (
    IntArray,
    Task,
    TasksConfig,
    TasksData,
    cross_entropy,
    drawing_weights,
    fit_tasks,
    make_tasks,
    predict_answers,
)
from lungwatch.training.networks.backbones import (
    Normalisation,
    Standardisation,
    imagenet_grey,
    load_backbone,
)
from lungwatch.training.networks.heads import DROPOUT, POOLED
from lungwatch.training.networks.weights import load_keras

# Keras's 0.99 would need more steps than a run of ten epochs over a few thousand images has.
_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The network's shape and where it comes from; see `TransferConfig`.

    Attributes
    ----------
    backbone, weights, size_px
        See `backbones.load_backbone`.
    dropout
        Fraction of the pooled features dropped in training.
    """

    backbone: str = "ResNet50V2"
    weights: str = "none"
    size_px: int = 128
    dropout: float = 0.2


def build_pretraining(
    config: PretrainConfig, standardisation: Standardisation | None, tasks: list[Task]
) -> KerasModel:
    """Build the network; all of it learns, batch norm included.

    Parameters
    ----------
    config
        Its shape and origin.
    standardisation
        How its input is normalised; see `backbones`.
    tasks
        What it answers.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, size, size, 1), 0..1, to a dict of logits by the tasks'
        names, (N, answers) each. Its layer named "backbone" is what `load_backbone` takes.

    Raises
    ------
    ConfigError, NotFoundError, ModelError, MissingExtraError
        As `load_backbone` does.
    """
    import keras

    backbone = load_backbone(config.backbone, config.weights, config.size_px)
    for layer in backbone.model.layers:
        layer.trainable = True
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = _MOMENTUM
    pixels = keras.Input((config.size_px, config.size_px, 1), name="pixels")
    x = backbone.features(imagenet_grey(pixels, standardisation))
    x = keras.layers.GlobalAveragePooling2D(name=POOLED)(x)
    x = keras.layers.Dropout(config.dropout, name=DROPOUT)(x)
    heads = {
        task.name: keras.layers.Dense(len(task.answers), name=f"task_{task.name}")(x)
        for task in tasks
    }
    return keras.Model(pixels, heads, name="pretraining")


def train_pretrain(
    locations: Sequence[Path],
    root: Path,
    *,
    network: PretrainConfig,
    task_weights: dict[str, float],
    fitting: TasksConfig,
    normalisation: Normalisation | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a backbone on several tasks, stopping by the validation loss.

    Parameters
    ----------
    locations
        Data sets with any classes; see `dataset.load_labelled`. Their test
        splits are not read.
    root
        The run folder to fill; `train transfer --weights` takes it.
    network, fitting
        The network's shape and origin, and how to train it.
    task_weights
        Tasks and their weights; see `trainer`.
    normalisation
        Of the grey levels, "all" meaning train and val; None leaves them to the backbone's
        own scaling.
    resume
        Continue the run that is in `root`.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`: `best_epoch`, `epochs`, and for each task its
        answers and its validation figures.

    Raises
    ------
    DatasetError
        If a data set lacks train or val, a task has one answer only, or a file is unreadable.
    ConfigError
        If `root` holds another run, or the backbone cannot be had.
    MissingExtraError
        If TensorFlow, or the package with the weights, is not installed.
    """
    progress = progress or Progress()
    samples = [sample for location in locations for sample in load_labelled(location)]
    train, val = labelled_split(samples, "train"), labelled_split(samples, "val")
    tasks = make_tasks(task_weights, train)
    answers = {task.name: (task.targets(train), task.targets(val)) for task in tasks}
    spec = PreprocessSpec(size_px=network.size_px)
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(fitting.seed)
    # Fails early, before thousands of images are read, if the backbone cannot be had.
    build_pretraining(network, None, tasks)
    config = {
        "family": f"{network.backbone}, pretraining",
        "network": {**asdict(network), "weights": Path(network.weights).name},
        "tasks": [asdict(task) for task in tasks],
        "fit": asdict(fitting),
        "normalisation": asdict(normalisation) if normalisation else None,
        "preprocess": spec.to_dict(),
        "data": {
            "names": [dataset_name(location) for location in locations],
            "train": count_labels(train),
            "val": count_labels(val),
        },
    }
    record = DataRecord(rows={})
    for location in locations:
        labelled = load_labelled(location)
        folder = location if location.is_dir() else location.parent
        one = DataRecord.of(labelled, [sample.label for sample in labelled], folder)
        record |= one.by_split().under(dataset_name(location))
    before = learnt_of(Path(network.weights)) or LearntImages()
    run.begin(config, resume=resume, record=replace(record, learnt=record.learnt | before))
    pixels = [read_pixels(part, spec, progress=progress.on_read) for part in (train, val)]
    grey = normalisation.settle(pixels[0], pixels[1:]) if normalisation else None
    state = fit_tasks(
        lambda: build_pretraining(network, grey, tasks),
        tasks,
        TasksData(
            train_pixels=pixels[0],
            train_answers={name: both[0] for name, both in answers.items()},
            train_weights=drawing_weights(train),
            val_pixels=pixels[1],
            val_answers={name: both[1] for name, both in answers.items()},
        ),
        fitting,
        run,
        on_batch=progress.on_batch,
        on_epoch=progress.on_epoch,
    )
    metrics = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        **_validation(run, tasks, pixels[1], {n: both[1] for n, both in answers.items()}),
    }
    run.write("metrics.json", metrics)
    plot_history(state.history, run.root / "history.png")
    return metrics


def _validation(
    run: RunFolder, tasks: list[Task], pixels: FloatArray, answers: dict[str, IntArray]
) -> dict[str, Any]:
    model = load_keras(run.model)
    logits = predict_answers(model, pixels)
    found = {}
    for task in tasks:
        given = answers[task.name]
        right = logits[task.name].argmax(axis=1) == given
        found[task.name] = {
            "answers": list(task.answers),
            "images": len(given),
            "accuracy": float(np.mean(right)),
            "cross_entropy": cross_entropy(given, logits[task.name]),
            "roc_auc": _areas(task, logits[task.name], given),
        }
    return {"parameters": int(model.count_params()), "validation": found}


def _areas(task: Task, logits: FloatArray, answers: IntArray) -> dict[str, float]:
    """Tell each answer from all others: ROC-AUC by name, for those that occur."""
    margins = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return {
        name: roc_auc(answers == number, margins[:, number])
        for number, name in enumerate(task.answers)
        if 0 < int(np.sum(answers == number)) < len(answers)
    }

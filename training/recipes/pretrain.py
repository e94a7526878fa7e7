"""Recipe `train pretrain`: a backbone pretrained on X-rays for one task or several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import (
    LabelledImage,
    count_labels,
    dataset_name,
    labelled_split,
    load_labelled,
)
from lungwatch.training.data.pixels import FloatArray, KerasModel, read_pixels
from lungwatch.training.data.splits import DataRecord, LearntImages, learnt_of
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.plots import plot_history
from lungwatch.training.fitting.augmentation import augment
from lungwatch.training.fitting.run import Progress, RunFolder, open_run
from lungwatch.training.fitting.tasks import epoch_batches, group_weights, seed_dropout
from lungwatch.training.fitting.trainer import FitConfig, Trainer, TrainingTask
from lungwatch.training.networks.backbones import (
    Normalisation,
    Standardisation,
    imagenet_grey,
    load_backbone,
)
from lungwatch.training.networks.heads import DROPOUT, POOLED
from lungwatch.training.networks.weights import load_keras

IntArray = NDArray[np.int64]
TASKS = ("finding", "covid", "source")
_COVID = "COVID"


@dataclass(frozen=True, kw_only=True)
class PretrainTask:
    """A question with a few exclusive answers.

    Attributes
    ----------
    name
        "finding": which label; "covid": COVID against the rest; "source": which collection.
    weight
        Of its cross-entropy in the loss.
    answers
        The classes, in the order of the head's outputs.
    """

    name: str
    weight: float
    answers: tuple[str, ...]

    def targets(self, samples: Sequence[LabelledImage]) -> IntArray:
        """Return each sample's answer as its number, int64, shape (N,).

        Raises
        ------
        DatasetError
            If an answer does not occur in what the task was made from.
        """
        numbers = {answer: number for number, answer in enumerate(self.answers)}
        found = [_answer(self.name, sample) for sample in samples]
        if unknown := sorted(set(found) - set(numbers)):
            raise DatasetError(
                f"task {self.name}: {', '.join(unknown)} occurs in val and not in train"
            )
        return np.array([numbers[answer] for answer in found], dtype=np.int64)


def parse_tasks(texts: Sequence[str]) -> dict[str, float]:
    """Read "finding", "covid=0.5" and the like into weights by name.

    Raises
    ------
    ConfigError
        If there is no such task, its weight is no positive number, or there is none.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number or 1.0)
        except ValueError:
            weight = 0.0
        if name not in TASKS or not 0 < weight < float("inf"):
            raise ConfigError(f"task {text!r}: write NAME or NAME=WEIGHT, of {', '.join(TASKS)}")
        weights[name] = weight
    if not weights:
        raise ConfigError(f"no task: give one of {', '.join(TASKS)}")
    return weights


def make_tasks(weights: dict[str, float], train: Sequence[LabelledImage]) -> list[PretrainTask]:
    """Make the tasks that these images can answer.

    Raises
    ------
    DatasetError
        If a task has one answer only.
    """
    tasks = []
    for name, weight in weights.items():
        answers = tuple(sorted({_answer(name, sample) for sample in train}))
        if len(answers) < 2:
            raise DatasetError(f"task {name}: every image has the answer {answers[0]}")
        tasks.append(PretrainTask(name=name, weight=weight, answers=answers))
    return tasks


def _answer(task: str, sample: LabelledImage) -> str:
    if task == "covid":
        return _COVID if sample.label == _COVID else f"not {_COVID}"
    return sample.label if task == "finding" else sample.source


_BATCH = 64
# Parts of `FitConfig` that no pretraining changes, and that no run has recorded.
_FIXED = ("learning_rates", "keep")
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
    config: PretrainConfig, standardisation: Standardisation | None, tasks: list[PretrainTask]
) -> KerasModel:
    """Build the network; all of it learns, batch norm included.

    Parameters
    ----------
    config
        Its shape and origin.
    standardisation
        How its input is normalised; see `Standardisation`.
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
    fitting: FitConfig,
    normalisation: Normalisation | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a backbone on several tasks, stopping by the validation loss.

    Parameters
    ----------
    locations
        Data sets with any classes; see `dataset.load_labelled`. Their test splits are not read.
    root
        The run folder to fill; `train transfer --weights` takes it.
    network
        The network's shape and origin.
    task_weights
        Tasks and their weights; see `parse_tasks`.
    normalisation
        Of the grey levels, "all" meaning train and val; None leaves them to the backbone's
        own scaling.
    """
    progress = progress or Progress()
    samples = [sample for location in locations for sample in load_labelled(location)]
    train, val = labelled_split(samples, "train"), labelled_split(samples, "val")
    tasks = make_tasks(task_weights, train)
    answers = {task.name: (task.targets(train), task.targets(val)) for task in tasks}
    spec = PreprocessSpec(size_px=network.size_px)
    run = open_run(root, resume=resume, seed=fitting.seed)
    # Fails early, before thousands of images are read, if the backbone is not available.
    build_pretraining(network, None, tasks)
    config = {
        "family": f"{network.backbone}, pretraining",
        "network": {**asdict(network), "weights": Path(network.weights).name},
        "tasks": [asdict(task) for task in tasks],
        "fit": {key: value for key, value in asdict(fitting).items() if key not in _FIXED},
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
    weights = group_weights([(one.source, one.label) for one in train], power=0.5)
    fresh = partial(build_pretraining, network, grey, tasks)
    state = Trainer(
        lambda: _compiled(fresh(), tasks, fitting),
        lambda model: pretraining_task(
            model, tasks, fitting, pixels=pixels, answers=answers, weights=weights
        ),
        fitting,
        run,
        progress=progress,
    ).fit()
    metrics = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        **_validation(run, tasks, pixels[1], {n: both[1] for n, both in answers.items()}),
    }
    run.write("metrics.json", metrics)
    plot_history(state.history, run.root / "history.png")
    return metrics


def pretraining_task(
    model: KerasModel,
    tasks: Sequence[PretrainTask],
    fitting: FitConfig,
    *,
    pixels: Sequence[FloatArray],
    answers: Mapping[str, Sequence[IntArray]],
    weights: NDArray[np.float64],
) -> TrainingTask:
    """Make the task of giving all answers at once, stopped by the weighted validation loss.

    Parameters
    ----------
    model, tasks, fitting
        The compiled network, what it answers, and how it is trained.
    pixels
        Training and validation images, float32 (N, S, S, 1), 0..1.
    answers
        Of each task, for training and validation images, (N,).
    weights
        Of drawing each training image, (N,).
    """

    def order(epoch: int, rng: np.random.Generator) -> list[NDArray[np.intp]]:
        drawn = epoch_batches(weights, rng, fitting.batch_size)
        seed_dropout(model, fitting.seed, epoch)
        return drawn

    def show(
        indices: NDArray[np.intp], rng: np.random.Generator
    ) -> tuple[FloatArray, dict[str, IntArray]]:
        shown = augment(pixels[0][indices], fitting.augmentation, rng)
        return shown, {name: both[0][indices] for name, both in answers.items()}

    def step(shown: FloatArray, right: dict[str, IntArray]) -> tuple[float, None]:
        return float(model.train_on_batch(shown, right, return_dict=True)["loss"]), None

    def validate() -> dict[str, float]:
        logits = predict_answers(model, pixels[1])
        row: dict[str, float] = {"val_loss": 0.0}
        for task in tasks:
            right, found = answers[task.name][1], logits[task.name]
            loss = cross_entropy(right, found)
            row["val_loss"] += task.weight * loss
            row[f"val_loss_{task.name}"] = loss
            row[f"val_accuracy_{task.name}"] = float(np.mean(found.argmax(axis=1) == right))
        return row

    return TrainingTask(order=order, show=show, step=step, validate=validate, monitor="val_loss")


def predict_answers(model: KerasModel, pixels: FloatArray) -> dict[str, FloatArray]:
    """Return each task's logits, float32 (N, answers), for (N, S, S, 1) in 0..1."""
    parts = [
        model(pixels[start : start + _BATCH], training=False)
        for start in range(0, len(pixels), _BATCH)
    ]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def cross_entropy(answers: IntArray, logits: FloatArray) -> float:
    """Mean cross-entropy of logits (N, K) with answers (N,), in nats."""
    z = np.asarray(logits, np.float64)
    return float(np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), answers]))


def _compiled(model: KerasModel, tasks: Sequence[PretrainTask], fitting: FitConfig) -> KerasModel:
    import keras

    model.compile(
        optimizer=keras.optimizers.AdamW(fitting.rate(1), weight_decay=fitting.weight_decay),
        loss={t.name: keras.losses.SparseCategoricalCrossentropy(from_logits=True) for t in tasks},
        loss_weights={t.name: t.weight for t in tasks},
    )
    return model


def _validation(
    run: RunFolder, tasks: list[PretrainTask], pixels: FloatArray, answers: dict[str, IntArray]
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


def _areas(task: PretrainTask, logits: FloatArray, answers: IntArray) -> dict[str, float]:
    """Tell each answer from all others: ROC-AUC by name, for those that occur."""
    margins = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return {
        name: roc_auc(answers == number, margins[:, number])
        for number, name in enumerate(task.answers)
        if 0 < int(np.sum(answers == number)) < len(answers)
    }

"""Train a network on lung fields: the whole of `lungwatch train fields`."""

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.scorers import load_keras
from lungwatch.training.field_images import (
    CLASSES,
    LungField,
    batch_counts,
    draw_batch,
    plain_view,
)
from lungwatch.training.field_network import (
    abnormal_logit,
    build_field_network,
    compile_fields,
    learn_fields,
    opacity_logit,
)
from lungwatch.training.keras_file import save_keras
from lungwatch.training.lung_fields import FEWEST, FieldData, Group, open_finder, read_fields
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.steps import Course, read_state, remove_checkpoints, take_steps

FAMILY = "Lung fields on EfficientNet-Lite0"
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class FieldFitConfig:
    """How to train on lung fields.

    Attributes
    ----------
    size_px
        Side of the view, a multiple of 16.
    imagenet
        Whether the trunk starts from ImageNet weights instead of random ones.
    steps
        Steps.
    batch_size
        Pictures of a step.
    pair_share
        Share of them that is of pairs within a source, 0..1.
    fewest
        Training images of each finding that a source must have to count as a pair.
    learning_rate, weight_decay
        Of AdamW; the rate is the steepest of a cosine.
    seed
        Of initial weights and pictures.
    checkpoint_steps
        After how many steps each the run is made safe.
    """

    size_px: int = 192
    imagenet: bool = True
    steps: int = 500
    batch_size: int = 128
    pair_share: float = 0.25
    fewest: int = FEWEST
    learning_rate: float = 1e-3
    weight_decay: float = 2e-2
    seed: int = 1
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.checkpoint_steps, self.fewest) < 1:
            raise ConfigError("steps, batch size, checkpoint steps and fewest must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError("the learning rate must be above 0, the weight decay at least 0")
        if not 0 <= self.pair_share < 1:
            raise ConfigError("the share of pairs must be at least 0 and below 1")
        if self.size_px % 16 or self.size_px < 32:
            raise ConfigError("the view's side must be a multiple of 16, at least 32")


def train_fields(
    location: Path,
    root: Path,
    *,
    fitting: FieldFitConfig,
    pairs: Path | None = None,
    gate: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on lung fields, and measure within each source.

    Parameters
    ----------
    location, pairs
        See `lungwatch.training.lung_fields.read_fields`.
    root
        The run folder to fill.
    fitting
        How.
    gate
        Run folder of `train gate`, or a bundle that has a gate: finds the lungs of `pairs`.
    resume
        Continue the run that is in `root`.
    progress
        Listeners; an epoch is a stretch of steps between two checkpoints.

    Returns
    -------
    dict
        What is written to `metrics.json`: `parameters`, and as `validation` by source ROC-AUC of
        each class against each before it, by the opacity score and by the abnormality score.

    Raises
    ------
    DatasetError
        If images are missing or unreadable, or a label is unknown.
    ConfigError
        If `root` holds another run, or of `pairs` and `gate` one is missing.
    MissingExtraError
        If TensorFlow or the package with ImageNet's weights is not installed.
    """
    if (pairs is None) != (gate is None):
        raise ConfigError("pairs of whole X-rays need a gate that finds their lungs, and it them")
    progress = progress or Progress()
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(fitting.seed)
    import keras

    # Fails early, before thousands of images are read, if ImageNet's weights cannot be had.
    build_field_network(fitting.size_px, imagenet=fitting.imagenet)
    data = read_fields(
        location,
        pairs,
        open_finder(gate) if gate else None,
        fewest=fitting.fewest,
        progress=progress.on_read,
    )
    run.begin(
        {
            "family": FAMILY,
            "fit": asdict(fitting),
            "classes": list(CLASSES),
            "data": data.about,
            "backend": f"Keras {keras.__version__} on {keras.backend.backend()}",
            "pictures": "drawn anew for every step",
        },
        resume=resume,
    )
    if not run.model.exists():
        _fit(data, run, fitting, progress)
    model = load_keras(run.model)
    metrics = {
        "parameters": int(model.count_params()),
        "steps": fitting.steps,
        "validation": measure_fields(model, data.val),
    }
    run.write("metrics.json", metrics)
    return metrics


def _fit(data: FieldData, run: RunFolder, fitting: FieldFitConfig, progress: Progress) -> None:
    groups = {**data.fields, **data.pairs}
    counts = batch_counts(
        list(data.fields), list(data.pairs), fitting.batch_size, fitting.pair_share
    )

    def build() -> KerasModel:
        model = build_field_network(fitting.size_px, imagenet=fitting.imagenet)
        compile_fields(model, fitting.learning_rate, fitting.weight_decay)
        return model

    def draw(step: int) -> tuple[FloatArray, FloatArray]:
        rng = np.random.default_rng([fitting.seed, step])
        return draw_batch(groups, counts, fitting.size_px, rng)

    def learn(model: KerasModel, batch: tuple[FloatArray, FloatArray], step: int) -> float:
        return learn_fields(model, *batch, (fitting.seed, step))

    course = Course(
        run=run,
        learning_rate=fitting.learning_rate,
        checkpoint_steps=fitting.checkpoint_steps,
        progress=progress,
    )
    model = take_steps(course, read_state(run), fitting.steps, build=build, draw=draw, learn=learn)
    # Without its optimiser, which nobody needs any more and which holds most of it.
    final = build_field_network(fitting.size_px, imagenet=False)
    final.set_weights(model.get_weights())
    save_keras(final, run.model)
    remove_checkpoints(run)


def measure_fields(
    model: KerasModel, groups: dict[Group, list[LungField]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a network within each source.

    Returns
    -------
    dict
        Source -> "HIGHER vs LOWER" -> ROC-AUC by the scores `opacity` and `abnormal`.
    """
    size = int(model.input_shape[1])
    logits = {group: class_logits(model, fields, size) for group, fields in groups.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for source in sorted({source for source, _ in logits}):
        there = sorted(cls for own, cls in logits if own == source)
        for low, high in combinations(there, 2):
            both = np.concatenate([logits[source, low], logits[source, high]])
            is_high = np.repeat([False, True], [len(logits[source, c]) for c in (low, high)])
            found.setdefault(source, {})[f"{CLASSES[high]} vs {CLASSES[low]}"] = {
                "opacity": round(roc_auc(is_high, opacity_logit(both)), 4),
                "abnormal": round(roc_auc(is_high, abnormal_logit(both)), 4),
            }
    return found


def class_logits(model: KerasModel, fields: list[LungField], size_px: int) -> FloatArray:
    """Return the logits of `CLASSES`, float32 (N, 3), of fields as they are."""
    parts = [
        np.stack([plain_view(one, size_px) for one in fields[start : start + _AT_ONCE]])
        for start in range(0, len(fields), _AT_ONCE)
    ]
    shown = [np.asarray(model(part[..., np.newaxis], training=False)) for part in parts]
    return np.concatenate(shown).astype(np.float32)

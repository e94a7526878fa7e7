"""Recipe `train fields`: a network of lung fields, with the data it learns from."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.errors import ConfigError, DatasetError, FileRejected, ModelError
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.dataset import (
    ImageClass,
    LabelledImage,
    Sample,
    count_labels,
    dataset_name,
    load_dataset,
    load_labelled,
)
from lungwatch.training.data.duplicates import find_leaks
from lungwatch.training.data.pixels import FloatArray, KerasModel
from lungwatch.training.evaluation.metrics import roc_auc
from lungwatch.training.evaluation.scorers import ONNX_FILE, OnnxScorer, onnx_session
from lungwatch.training.fitting.augmentation import (
    FIELD_CLASSES,
    LungField,
    batch_counts,
    draw_field_batch,
    plain_view,
    ready_field,
)
from lungwatch.training.fitting.run import Progress, RunFolder, open_run
from lungwatch.training.fitting.tasks import StepConfig, fit_steps
from lungwatch.training.fitting.trainer import save_without_optimizer
from lungwatch.training.networks.lungs import (
    abnormal_logit,
    build_field_network,
    compile_fields,
    cut_field,
    learn_fields,
    opacity_logit,
)
from lungwatch.training.networks.weights import load_keras
from lungwatch.training.recipes.lungs import find_lungs

FEWEST = 50
"""Training images of each finding that a source must have to count as a pair."""
Group = tuple[str, int]
_OF_LABEL = {"NORMAL": 0, "OTHER": 1, "OPACITY": 2}
_OF_FINDING: dict[ImageClass, int] = {"NORMAL": 0, "OTHER_PNEUMONIA": 2}
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Finder:
    """A content gate that finds lungs.

    Attributes
    ----------
    spec
        Its preprocessing.
    find
        From preprocessed pixels, float32 (N, S, S, 1), to each cell's probability of being lung,
        float32 (N, M, M), 0..1: the mean of a picture and its mirror image.
    """

    spec: PreprocessSpec
    find: Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, kw_only=True, eq=False)
class FieldData:
    """Fields by source and class.

    Attributes
    ----------
    fields, pairs
        Groups to learn from: of ready fields, and of whole X-rays.
    val
        Groups that validate, of both kinds.
    about
        What the run's configuration says about the data.
    """

    fields: dict[Group, list[LungField]]
    pairs: dict[Group, list[LungField]]
    val: dict[Group, list[LungField]]
    about: dict[str, Any]


def open_finder(location: Path) -> Finder:
    """Open a run folder of `train gate`, or a bundle that has a gate.

    Raises
    ------
    NotFoundError
        If there is neither.
    ModelError
        If the bundle has no gate.
    """
    if (location / ONNX_FILE).is_file():
        contract = OnnxScorer((location / ONNX_FILE).read_bytes(), str(location)).contract
        file = location / "gate.onnx"
        if contract.gate is None or not file.is_file():
            raise ModelError(f"{location} has no content gate to find lungs with")
        session = onnx_session(file.read_bytes(), str(file))

        def once(pixels: FloatArray) -> FloatArray:
            parts = np.array_split(pixels, max(1, -(-len(pixels) // _AT_ONCE)))
            return np.concatenate([session.run(["lungs"], {"pixels": part})[0] for part in parts])

        def both(pixels: FloatArray) -> FloatArray:
            mirrored = once(np.ascontiguousarray(pixels[:, :, ::-1]))[:, :, ::-1]
            return np.asarray((once(pixels) + mirrored) / 2.0, np.float32)

        return Finder(spec=contract.gate.preprocess, find=both)
    run = RunFolder(root=location)
    model = load_keras(run.model)
    spec = PreprocessSpec.from_dict(run.read("config.json")["preprocess"])
    return Finder(
        spec=spec,
        find=lambda pixels: find_lungs(model, pixels).astype(np.float32) / np.float32(255.0),
    )


def read_fields(
    location: Path,
    pairs: Path | None = None,
    finder: Finder | None = None,
    *,
    fewest: int = FEWEST,
    progress: Callable[[int], None] | None = None,
) -> FieldData:
    """Read ready fields and, from whole X-rays, pairs within a source.

    Training images of the pairs that show an X-ray or a patient of another split are dropped.

    Parameters
    ----------
    location
        Ready fields; see `load_labelled`. Labels are `CLASSES`.
    pairs
        Data set of whole X-rays; see `load_dataset`. None for none.
    finder
        Finds their lungs; needed with `pairs`.
    fewest
        See `FEWEST`.
    progress
        Called with 1 after each image.

    Raises
    ------
    DatasetError
        If a label is unknown, a class is missing, no source of `pairs` has both findings, or a
        file cannot be read.
    """
    labelled = load_labelled(location)
    if unknown := sorted({one.label for one in labelled} - set(FIELD_CLASSES)):
        raise DatasetError(
            f"{location}: unknown labels: {', '.join(unknown)} ({', '.join(FIELD_CLASSES)})"
        )
    fields = _grouped(
        [(one.source, _OF_LABEL[one.label]) for one in labelled if one.split == "train"],
        _ready([one for one in labelled if one.split == "train"], progress),
    )
    if len({cls for _, cls in fields}) < len(FIELD_CLASSES):
        raise DatasetError(
            f"{location}: the training split lacks one of {', '.join(FIELD_CLASSES)}"
        )
    held = [one for one in labelled if one.split == "val"]
    val = _grouped([(o.source, _OF_LABEL[o.label]) for o in held], _ready(held, progress))
    about: dict[str, Any] = {"name": dataset_name(location), "images": count_labels(labelled)}
    if pairs is None or finder is None:
        return FieldData(fields=fields, pairs={}, val=val, about=about)

    samples = [s for s in load_dataset(pairs) if s.finding in _OF_FINDING]
    sources = paired_sources(samples, fewest)
    if not sources:
        raise DatasetError(
            f"{pairs}: no source has {fewest} training images each of NORMAL and OTHER_PNEUMONIA"
        )
    samples = [s for s in samples if s.source in sources]
    pixels, found = find_fields(samples, finder, progress=progress)
    learnt = [i for i, s in enumerate(samples) if s.split == "train"]
    others = [i for i, s in enumerate(samples) if s.split != "train"]
    leaks = find_leaks(
        [samples[i] for i in learnt],
        pixels[learnt],
        [samples[i] for i in others],
        pixels[others],
    )
    leaking = {learnt[leak.train] for leak in leaks}

    def of(indices: Sequence[int]) -> dict[Group, list[LungField]]:
        keys = [(samples[i].source, _OF_FINDING[samples[i].finding]) for i in indices]
        return _grouped(keys, [found[i] for i in indices])

    kept = [i for i in learnt if i not in leaking]
    about["pairs"] = {
        "name": dataset_name(pairs),
        "sources": sorted(sources),
        "train": len(kept),
        "dropped": len(leaking),
    }
    held_out = [i for i in others if samples[i].split == "val"]
    return FieldData(fields=fields, pairs=of(kept), val={**val, **of(held_out)}, about=about)


def paired_sources(samples: Sequence[Sample], fewest: int = FEWEST) -> set[str]:
    """Return the sources that have enough training images of both NORMAL and OTHER_PNEUMONIA."""
    counts = Counter((s.source, s.finding) for s in samples if s.split == "train" and s.source)
    return {
        source
        for source, _ in counts
        if min(counts[source, finding] for finding in _OF_FINDING) >= fewest
    }


def find_fields(
    samples: Sequence[Sample],
    finder: Finder,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[FloatArray, list[LungField]]:
    """Read whole X-rays and cut out their lungs.

    Returns
    -------
    pixels, fields
        float32 (N, S, S, 1), what the finder was shown; and the fields in the same order.
    """
    pixels = np.empty((len(samples), finder.spec.size_px, finder.spec.size_px, 1), np.float32)
    fields: list[LungField] = []

    def read(index: int) -> FloatArray:
        path = samples[index].path
        try:
            whole = read_radiograph(path).pixels
        except (FileRejected, OSError) as error:
            raise DatasetError(f"{path}: {error}") from error
        pixels[index] = preprocess(whole, finder.spec)
        return whole

    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        # In parts: X-rays at their own size would fill the memory.
        for part in np.array_split(np.arange(len(samples)), max(1, -(-len(samples) // _AT_ONCE))):
            wholes = list(pool.map(read, part.tolist()))
            chances = finder.find(pixels[part])
            for whole, chance in zip(wholes, chances, strict=True):
                fields.append(cut_field(whole, chance))
                if progress:
                    progress(1)
    return pixels, fields


def _ready(
    samples: Sequence[LabelledImage], progress: Callable[[int], None] | None
) -> list[LungField]:
    def read(sample: LabelledImage) -> LungField:
        pixels = cv2.imread(str(sample.path), cv2.IMREAD_GRAYSCALE)
        if pixels is None:
            raise DatasetError(f"{sample.path}: not an image that can be read")
        return ready_field(np.asarray(pixels, np.uint8))

    fields = []
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        for one in pool.map(read, samples):
            fields.append(one)
            if progress:
                progress(1)
    return fields


def _grouped(keys: Sequence[Group], fields: Sequence[LungField]) -> dict[Group, list[LungField]]:
    groups: dict[Group, list[LungField]] = defaultdict(list)
    for key, one in zip(keys, fields, strict=True):
        groups[key].append(one)
    return dict(sorted(groups.items()))


FIELDS_FAMILY = "Lung fields on EfficientNet-Lite0"
_FIELD_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FieldFitConfig(StepConfig):
    """Configuration of a training on lung fields.

    Attributes
    ----------
    pair_share
        Share of a batch that is of pairs within a source, 0..1.
    fewest
        Training images of each finding that a source must have to count as a pair.
    """

    size_px: int = 192
    steps: int = 500
    pair_share: float = 0.25
    fewest: int = FEWEST
    learning_rate: float = 1e-3
    weight_decay: float = 2e-2
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fewest < 1 or not 0 <= self.pair_share < 1:
            raise ConfigError("fewest must be at least 1, the share of pairs within 0..1")


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

    `metrics.json` holds, as `validation`, by source ROC-AUC of each class against each before it,
    by the opacity score and by the abnormality score.

    Parameters
    ----------
    location, pairs
        See `read_fields`.
    gate
        Run folder of `train gate`, or a bundle that has a gate: finds the lungs of `pairs`.
    progress
        Listeners; an epoch is the steps between two checkpoints.
    """
    if (pairs is None) != (gate is None):
        raise ConfigError("pairs of whole X-rays need a gate that finds their lungs, and it them")
    progress = progress or Progress()
    run = open_run(root, resume=resume, seed=fitting.seed)
    import keras

    # Fails early, before thousands of images are read, if ImageNet weights are not available.
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
            "family": FIELDS_FAMILY,
            "fit": asdict(fitting),
            "classes": list(FIELD_CLASSES),
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
        return draw_field_batch(groups, counts, fitting.size_px, rng)

    def learn(model: KerasModel, batch: tuple[FloatArray, FloatArray], step: int) -> float:
        return learn_fields(model, *batch, (fitting.seed, step))

    def keep(model: KerasModel) -> None:
        fresh = partial(build_field_network, fitting.size_px, imagenet=False)
        save_without_optimizer(model, fresh, run.model)

    fit_steps(build, fitting, run, draw=draw, learn=learn, keep=keep, progress=progress)


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
            found.setdefault(source, {})[f"{FIELD_CLASSES[high]} vs {FIELD_CLASSES[low]}"] = {
                "opacity": round(roc_auc(is_high, opacity_logit(both)), 4),
                "abnormal": round(roc_auc(is_high, abnormal_logit(both)), 4),
            }
    return found


def class_logits(model: KerasModel, fields: list[LungField], size_px: int) -> FloatArray:
    """Return the logits of `CLASSES`, float32 (N, 3), of fields as they are."""
    parts = [
        np.stack([plain_view(one, size_px) for one in fields[start : start + _FIELD_BATCH]])
        for start in range(0, len(fields), _FIELD_BATCH)
    ]
    shown = [np.asarray(model(part[..., np.newaxis], training=False)) for part in parts]
    return np.concatenate(shown).astype(np.float32)

"""Data set prepared for a run (splits, leaks, pixels), and conclusion of the run: calibration.

Retraining, test.
"""

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.errors import DatasetError
from lungwatch.files import write_atomic
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import (
    LabelMap,
    Sample,
    dataset_name,
    describe,
    licences,
    load_dataset,
    select,
)
from lungwatch.training.data.duplicates import LeakPolicy, apply_leaks, find_leaks
from lungwatch.training.data.pixels import FloatArray, KerasModel, read_pixels, targets
from lungwatch.training.data.splits import DataRecord, LearntImages, learnt_of, prefixes
from lungwatch.training.evaluation.calibration import apply_calibration, calibrate
from lungwatch.training.evaluation.evaluation import Scored, evaluate_logits, evaluate_pixels
from lungwatch.training.evaluation.metrics import figures
from lungwatch.training.evaluation.plots import draw_plots, plot_history
from lungwatch.training.evaluation.scorers import KerasScorer, Scorer, predict_logits
from lungwatch.training.fitting.run import Progress, RunFolder
from lungwatch.training.fitting.tasks import FitData, fit, sampling_weights
from lungwatch.training.fitting.trainer import FitConfig, FitState
from lungwatch.training.networks.backbones import Normalisation, Standardisation
from lungwatch.training.networks.weights import load_keras


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Samples with their pixels, float32 (N, S, S, 1), 0..1; N may be 0."""

    samples: Sequence[Sample]
    pixels: FloatArray

    @property
    def targets(self) -> FloatArray:
        """1 for COVID and 0 for the rest, float32 (N,)."""
        return targets(self.samples)

    def take(self, indices: Sequence[int]) -> "Part":
        """Return the part with these samples only."""
        chosen = list(indices)
        if len(chosen) == len(self.samples):
            return self
        return Part(samples=[self.samples[i] for i in chosen], pixels=self.pixels[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Prepared data set: the parts that train, stop and test a network.

    Attributes
    ----------
    name
        Of the data set.
    folder
        What its file names are relative to.
    spec
        The preprocessing of the pixels.
    train, val
        Both hold both classes; training images that leak are left out already.
    test
        Empty if the data set has no such split. Only the final model may see it.
    left_out
        What of the other splits is from the source left out; empty without one.
    data
        What the run's configuration says about the data.
    files
        All files of the data set.
    """

    name: str
    folder: Path
    spec: PreprocessSpec
    train: Part
    val: Part
    test: Part
    left_out: Part
    data: dict[str, Any]
    files: DataRecord

    @property
    def relearnt(self) -> list[int]:
        """Validation images that a final network learns from too, by their position."""
        held_back = set(self.held_back)
        chosen = [i for i in range(len(self.val.samples)) if i not in held_back]
        part = self.val.take(chosen)
        if self.data["leaks"] == "allow" or not chosen:
            return chosen
        back = self.val.take(self.held_back)
        leaks = find_leaks(part.samples, part.pixels, back.samples, back.pixels)
        leaking = {leak.train for leak in leaks}
        return [i for at, i in enumerate(chosen) if at not in leaking]

    @property
    def held_back(self) -> list[int]:
        """Validation images that calibrate a final network, by their position.

        A third of the patients (of the images, where those are unknown) with and without a
        COVID image, always the same; all, should a third not hold both classes.
        """
        return hold_back(self.val.samples, self.folder)

    def settle(self, normalisation: Normalisation) -> Standardisation:
        """Return the grey levels' mean and spread that a normalisation takes from the data."""
        return normalisation.settle(self.train.pixels, (self.val.pixels, self.test.pixels))

    def record(self, *, retrained: bool = False, builds_on: Sequence[Path] = ()) -> DataRecord:
        """Return the record for the run folder.

        Parameters
        ----------
        retrained
            Whether the final network learns from validation images too.
        builds_on
            Run folders whose networks go into this one.
        """
        more = self.val.take(self.relearnt).samples if retrained else []
        learnt = LearntImages(
            train=self._digests([*self.train.samples, *more]),
            val=self._digests(self.val.samples),
        )
        for place in builds_on:
            learnt |= learnt_of(place) or LearntImages()
        return replace(self.files, learnt=learnt)

    def _digests(self, samples: Sequence[Sample]) -> frozenset[bytes]:
        return prefixes(self.files.row(sample.path, self.folder).sha256 for sample in samples)

    def fit_data(self) -> FitData:
        """Train on the training split, measure on the validation split."""
        return FitData(
            train_pixels=self.train.pixels,
            train_targets=self.train.targets,
            train_weights=sampling_weights(self.train.samples),
            val_pixels=self.val.pixels,
            val_targets=self.val.targets,
        )

    def retrain_data(self) -> FitData:
        """Train on both, but for what calibrates, with nothing left to stop by."""
        more = self.val.take(self.relearnt)
        samples = [*self.train.samples, *more.samples]
        return FitData(
            train_pixels=np.concatenate([self.train.pixels, more.pixels]),
            train_targets=targets(samples),
            train_weights=sampling_weights(samples),
        )


def prepare(
    location: Path,
    spec: PreprocessSpec,
    *,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    labels: LabelMap | None = None,
    need_test: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Read a data set's splits.

    Parameters
    ----------
    location
        See `load_dataset`.
    spec
        The network's preprocessing.
    leave_out
        A source none of whose images the network may learn from or stop by.
    leaks
        What to do about training and validation images that show an X-ray or a patient of the
        test split or of the source left out, and training images that do of the validation
        split; see `duplicates`.
    labels
        What labels mean that are no finding; see `load_dataset`.
    need_test
        Refuse a data set whose test split is missing or holds one class only.

    Raises
    ------
    DatasetError
        If a needed split is empty or holds one class only, there is no such source, there is a
        leak, or a file is unreadable; it is named.
    """
    samples = load_dataset(location, labels)
    name = dataset_name(location)
    kept = _without(samples, leave_out, name)
    chosen = {split: select(kept, split, name) for split in ("train", "val")}
    test = [s for s in samples if s.split == "test"]
    if need_test:
        select(samples, "test", name)
    hidden = [s for s in samples if s.split != "test" and s.source == leave_out]

    on_read = progress.on_read if progress else None

    def read(part: Sequence[Sample]) -> Part:
        return Part(samples=part, pixels=read_pixels(part, spec, progress=on_read))

    train, val, tested = read(chosen["train"]), read(chosen["val"]), read(test)
    left_out = read(hidden)
    unseen = [tested, left_out] if leaks != "allow" else []
    clean_val = val.take(_clean(val, unseen, leaks))
    clean_train = train.take(_clean(train, [clean_val, *unseen], leaks))
    for part, split in ((clean_train, "train"), (clean_val, "val")):
        select(part.samples, None, f"{name}: split {split!r} without its leaks")
    folder = location if location.is_dir() else location.parent
    return Prepared(
        name=name,
        files=DataRecord.of(samples, [sample.finding for sample in samples], folder),
        folder=folder,
        spec=spec,
        train=clean_train,
        val=clean_val,
        test=tested,
        left_out=left_out,
        data={
            "name": name,
            "train": describe(clean_train.samples),
            "val": describe(clean_val.samples),
            "licences": licences(clean_train.samples),
            "left_out": leave_out,
            "leaks": leaks,
            **({"label_map": labels.to_dict()} if labels and labels.meanings else {}),
            "dropped": {
                "train": len(train.samples) - len(clean_train.samples),
                "val": len(val.samples) - len(clean_val.samples),
            },
        },
    )


def hold_back(samples: Sequence[Sample], folder: Path) -> list[int]:
    """Choose a third of validation images, by patient and class; see `Prepared.held_back`."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        inside = sample.path.is_relative_to(folder)
        name = sample.path.relative_to(folder).as_posix() if inside else sample.path.name
        groups.setdefault(
            f"{sample.source}/{sample.patient}\0{'' if sample.patient else name}", []
        ).append(index)
    chosen: list[int] = []
    for positive in (True, False):
        kind = [
            key
            for key, members in groups.items()
            if any(samples[i].positive for i in members) == positive
        ]
        kind.sort(key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())
        for key in kind[: math.ceil(len(kind) / 3)]:
            chosen += groups[key]
    if len({samples[i].positive for i in chosen}) < 2:
        return list(range(len(samples)))
    return sorted(chosen)


def _without(samples: Iterable[Sample], source: str | None, name: str) -> list[Sample]:
    samples = list(samples)
    known = sorted({s.source for s in samples if s.source})
    if source is not None and source not in known:
        there = ", ".join(known) or "none are stated"
        raise DatasetError(f"{name} has no source {source!r} to leave out (sources: {there})")
    return [s for s in samples if source is None or s.source != source]


def _clean(part: Part, others: Sequence[Part], policy: LeakPolicy) -> list[int]:
    if not others:
        return list(range(len(part.samples)))
    return apply_leaks(
        part.samples,
        part.pixels,
        [sample for other in others for sample in other.samples],
        np.concatenate([other.pixels for other in others]),
        policy,
    )


def evaluate_left_out(scorer: Scorer, prepared: Prepared, source: str) -> dict[str, Any]:
    """Measure a network on all images of the source left out.

    Its COVID images stand against test images of the other sources without COVID, or, should
    it have none, its images against COVID of the others: how the network does on a place it
    never saw.

    Parameters
    ----------
    scorer
        The network.
    prepared
        The data set, made ready without the source.
    source
        Its name.

    Returns
    -------
    dict
        As `evaluation.evaluate_pixels` gives it.
    """
    own = [s for s in prepared.test.samples if s.source == source]
    has_covid = any(s.positive for s in [*prepared.left_out.samples, *own])
    rest = prepared.test.take(
        [
            index
            for index, sample in enumerate(prepared.test.samples)
            if sample.source == source or sample.positive != has_covid
        ]
    )
    return evaluate_pixels(
        scorer,
        [*prepared.left_out.samples, *rest.samples],
        np.concatenate([prepared.left_out.pixels, rest.pixels]),
    )


VALIDATION = "validation split"
RETRAINED_ON = "train and two thirds of val"


def evaluate_rest(
    run: RunFolder, metrics: dict[str, Any], prepared: Prepared, leave_out: str | None
) -> dict[str, Any]:
    """Add the figures on the `test` split and on the source `left_out`, where there are any.

    Returns
    -------
    dict
        What is written to `metrics.json`.
    """
    # Threshold and calibration are read from there.
    run.write("metrics.json", metrics)
    scorer = KerasScorer(run.root)
    if prepared.test.samples:
        metrics["test"] = evaluate_pixels(scorer, prepared.test.samples, prepared.test.pixels)
    if leave_out:
        metrics["left_out"] = evaluate_left_out(scorer, prepared, leave_out)
    run.write("metrics.json", metrics)
    return metrics


def calibrate_outputs(targets: FloatArray, logits: FloatArray) -> dict[str, Any]:
    """Fix calibration and threshold on validation images.

    Parameters
    ----------
    targets, logits
        0 and 1, and binary logits, shape (N,), of images the network did not learn from.

    Returns
    -------
    dict
        Part of `metrics.json`: `calibration`, `decision`, and the `validation` figures.
    """
    calibration, decision = calibrate(targets, logits)
    probabilities = apply_calibration(calibration, logits)
    return {
        "calibration": asdict(calibration),
        "decision": asdict(decision),
        "validation": figures(targets, probabilities, decision.threshold).to_dict(),
    }


def calibrate_on(
    part: Part, prepared: Prepared, logits: Callable[[FloatArray], FloatArray]
) -> dict[str, Any]:
    """Calibrate on validation images, all or some; also say which, as `calibrated_on`."""
    images, of = len(part.samples), len(prepared.val.samples)
    some = f"{images} of {of} images of the {VALIDATION} that the network did not learn from"
    return {
        "calibrated_on": VALIDATION if images == of else some,
        **calibrate_outputs(part.targets, logits(part.pixels)),
    }


def calibrate_final(model: KerasModel, prepared: Prepared, *, retrained: bool) -> dict[str, Any]:
    """Calibrate a final network on validation images that it did not learn from."""
    part = prepared.val.take(prepared.held_back) if retrained else prepared.val
    return {
        "trained_on": RETRAINED_ON if retrained else "train",
        **calibrate_on(part, prepared, lambda pixels: predict_logits(model, pixels)),
    }


def conclude(run: RunFolder, state: FitState, prepared: Prepared) -> dict[str, Any]:
    """Calibrate a run's best network on validation data, and write metrics and plot.

    Returns
    -------
    dict
        What is written to `metrics.json`.
    """
    model = load_keras(run.model)
    metrics = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "parameters": int(model.count_params()),
        **calibrate_on(prepared.val, prepared, lambda pixels: predict_logits(model, pixels)),
    }
    run.write("metrics.json", metrics)
    plot_history(state.history, run.root / "history.png")
    return metrics


PREDICTIONS = "predictions.csv"
CONFUSION = "confusion.png"


def retrain(
    build: Callable[[], KerasModel],
    data: FitData,
    fitting: FitConfig,
    chosen: FitState,
    run: RunFolder,
    *,
    progress: Progress | None = None,
) -> FitState:
    """Train a fresh network for as many epochs as the chosen one took to its best.

    The learning rate is halved where it was halved then; nothing stops early.

    Parameters
    ----------
    build
        Makes the network; the caller seeds TensorFlow.
    data
        Training and validation images, without anything to stop by.
    fitting
        How the chosen network was trained.
    chosen
        What became of that.
    run
        A begun run folder to fill.
    """
    rates = tuple(row["learning_rate"] for row in chosen.history[: chosen.best_epoch])
    fixed = replace(fitting, epochs=chosen.best_epoch, patience=None, learning_rates=rates)
    return fit(build, data, fixed, run, progress=progress)


def test_final(run: RunFolder, metrics: dict[str, Any], test: Part, folder: Path) -> dict[str, Any]:
    """Load a finished run's network from disk and measure it on the test split.

    Fills `predictions.csv` (file, finding, positive, logit, probability, covid), one row an
    image, and `confusion.png`.

    Parameters
    ----------
    run
        With `config.json` and `model.keras`.
    metrics
        What `metrics.json` is to hold besides; `calibration` and `decision` among it.
    test
        Images that neither the network nor any choice about it has seen.
    folder
        What the file names in the table are relative to.

    Returns
    -------
    dict
        What is written to `metrics.json`: `metrics` and the figures as `test`.
    """
    # The threshold is read from there, as every later user of the run reads it.
    run.write("metrics.json", metrics)
    scorer = KerasScorer(run.root)
    scored = Scored(
        samples=test.samples, judgement=scorer.judgement, logits=scorer.logits(test.pixels)
    )
    write_atomic(run.root / PREDICTIONS, _table(scored, folder).encode())
    write_atomic(run.root / CONFUSION, draw_plots(scored)["confusion"])
    tested = {**metrics, "test": evaluate_logits(scored.judgement, scored.samples, scored.logits)}
    run.write("metrics.json", tested)
    return tested


def _table(scored: Scored, folder: Path) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "finding", "positive", "logit", "probability", "covid"))
    answers = zip(scored.samples, scored.logits, scored.probabilities, scored.called, strict=True)
    for sample, logit, probability, called in answers:
        inside = sample.path.is_relative_to(folder)
        file = sample.path.relative_to(folder) if inside else Path(sample.path.name)
        numbers = (np.format_float_positional(value, precision=6) for value in (logit, probability))
        writer.writerow(
            (file.as_posix(), sample.finding, int(sample.positive), *numbers, int(called))
        )
    return text.getvalue()

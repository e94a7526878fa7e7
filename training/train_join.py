"""Join trained networks into one: the whole of `lungwatch train join`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lungwatch.errors import ConfigError
from lungwatch.training.conclude import calibrated_on, judge
from lungwatch.training.data.dataset import LabelMap, select
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.splits import LearntImages, learnt_of, prefix
from lungwatch.training.evaluation.evaluation import evaluate_pixels
from lungwatch.training.evaluation.scorers import KerasScorer, load_keras
from lungwatch.training.joined import Member, join_networks
from lungwatch.training.keras_file import save_keras
from lungwatch.training.left_out import measure_left_out
from lungwatch.training.lung_box import learn_box
from lungwatch.training.lung_view import FINER, MARGIN
from lungwatch.training.prepare import Prepared, prepare
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow

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
        The data set whose validation split calibrates; see `load_dataset`.
    root
        The run folder to fill.
    lungs
        Run folder of `train lungs`: the joint network then sees the box of the lungs alone,
        from an input of twice the side, and finds it by itself (`lungwatch.training.lung_box`).
        None shows it the whole image.
    leave_out, leaks, labels
        See `lungwatch.training.prepare.prepare`. What is left out must be what the runs were
        trained without.
    resume
        Do it again in `root`, if it was begun with the same configuration.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`; with a source left out, its figures are in it as
        `left_out`; with `lungs`, how well the boxes fit, as `lung_box`.

    Raises
    ------
    ConfigError
        If there are fewer than two runs, their preprocessing or the source left out differs,
        or `root` holds another.
    NotFoundError, ModelError
        If a run is not finished, or the networks do not fit together.
    DatasetError
        If a split is missing or empty, holds one class only, leaks, or a file is unreadable.
    MissingExtraError
        If TensorFlow is not installed.
    """
    if len(runs) < _FEWEST:
        raise ConfigError("give at least two runs to join")
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow()
    scorers = [KerasScorer(path) for path in runs]
    if unfinished := [path for path, s in zip(runs, scorers, strict=True) if not s.calibrated]:
        raise ConfigError(f"{unfinished[0]} is no finished run")
    spec = scorers[0].judgement.preprocess
    if any(scorer.judgement.preprocess != spec for scorer in scorers):
        raise ConfigError("the runs' preprocessing differs; their networks cannot share an input")
    for path, scorer in zip(runs, scorers, strict=True):
        _check_left_out(path, scorer.config.get("data", {}).get("left_out"), leave_out)
    members = [
        Member(name=f"member_{n}", model=scorer.model, calibration=scorer.judgement.calibration)
        for n, scorer in enumerate(scorers, start=1)
    ]
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
    model = join_networks(members, finder=found and found.finder)
    save_keras(model, run.model)
    scorer = KerasScorer(root)
    verdict = judge(unseen.targets, scorer.logits(unseen.pixels))
    metrics = {
        "best_epoch": max(s.metrics["best_epoch"] for s in scorers),
        "epochs": max(s.metrics["epochs"] for s in scorers),
        "parameters": int(model.count_params()),
        "calibrated_on": calibrated_on(len(unseen.samples), len(prepared.val.samples)),
        **({"lung_box": found.to_dict()} if found else {}),
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

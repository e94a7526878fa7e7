"""Train a network on a backbone from elsewhere: the whole of `lungwatch train transfer`."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.dataset import dataset_name, describe, licences, load_dataset, select
from lungwatch.training.fit import FitConfig, FitData, FitState, fit
from lungwatch.training.foreign import KerasModel
from lungwatch.training.pixels import read_pixels, targets
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.sampling import sampling_weights
from lungwatch.training.scorers import load_keras
from lungwatch.training.train_baseline import Progress, conclude
from lungwatch.training.transfer import TransferConfig, build_transfer, unfreeze

Phase = Literal["frozen", "fine-tuned"]
FROZEN: Phase = "frozen"
FINE_TUNED: Phase = "fine-tuned"


def train_transfer(
    location: Path,
    root: Path,
    *,
    network: TransferConfig,
    frozen: FitConfig | None,
    tuning: FitConfig | None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the head, then the backbone; calibrate the better of both, and measure.

    Parameters
    ----------
    location
        The data set, with the splits train and val; see `load_dataset`.
    root
        The run folder to fill; each phase has a run folder of its own in it.
    network
        The network's shape and origin.
    frozen
        How to train the head on the backbone as it comes; None leaves this phase out.
    tuning
        How to train the unfrozen part together with the head; None likewise. The result is
        kept only if its calibrated validation loss is below that of the frozen phase.
    resume
        Continue the run that is in `root`.
    progress
        Listeners; epochs count on through both phases.

    Returns
    -------
    dict
        What is written to `metrics.json`: as `train_baseline`, and `phase`, the kept one.

    Raises
    ------
    DatasetError
        If a split is missing or empty, holds one class only, or a file is unreadable.
    ConfigError
        If both phases are left out, `root` holds another run, or the backbone cannot be had.
    MissingExtraError
        If TensorFlow is not installed.
    """
    progress = progress or Progress()
    last = tuning or frozen
    if last is None:
        raise ConfigError("nothing to train: give the frozen phase or fine-tuning some epochs")
    samples = load_dataset(location)
    name = dataset_name(location)
    train = select(samples, "train", name)
    val = select(samples, "val", name)
    spec = PreprocessSpec(size_px=network.size_px)
    prepare_tensorflow(last.seed)
    # Fails early, before hundreds of images are read, if the backbone cannot be had.
    fresh = build_transfer(network)
    run = RunFolder(root=root)
    config = {
        "family": f"{network.backbone}, transfer",
        "network": {**asdict(network), "weights": Path(network.weights).name},
        "fit": asdict(last),
        "fit_frozen": asdict(frozen) if frozen else None,
        "fit_tuning": asdict(tuning) if tuning else None,
        "preprocess": spec.to_dict(),
        "data": {
            "name": name,
            "train": describe(train),
            "val": describe(val),
            "licences": licences(train),
        },
    }
    run.begin(config, resume=resume)
    data = FitData(
        train_pixels=read_pixels(train, spec, progress=progress.on_read),
        train_targets=targets(train),
        train_weights=sampling_weights(train),
        val_pixels=read_pixels(val, spec, progress=progress.on_read),
        val_targets=targets(val),
    )

    build: Callable[[], KerasModel] = lambda: fresh  # noqa: E731
    done: dict[Phase, FitState] = {}
    if frozen:
        folder = _phase(run, FROZEN, {**config, "fit": asdict(frozen)})
        done[FROZEN] = fit(build, data, frozen, folder, **_listeners(progress, 0))
        build = lambda: load_keras(folder.model)  # noqa: E731
    if tuning:
        start = build

        def unfrozen() -> KerasModel:
            model = start()
            unfreeze(model, network.unfreeze)
            return model

        folder_tuned = _phase(run, FINE_TUNED, {**config, "fit": asdict(tuning)})
        before = done[FROZEN].epoch if frozen else 0
        done[FINE_TUNED] = fit(unfrozen, data, tuning, folder_tuned, **_listeners(progress, before))
    kept, state = join(done)
    _copy(RunFolder(root=run.root / kept).model, run.model)
    _write_history(run, done)
    metrics = {"phase": kept, **conclude(run, state, data.val_pixels, data.val_targets)}
    run.write("metrics.json", metrics)
    return metrics


def join(done: dict[Phase, FitState]) -> tuple[Phase, FitState]:
    """Say which phase is kept, and count both as one run.

    Returns
    -------
    phase, state
        The phase with the lowest calibrated validation loss, the earlier one on a tie; and
        the history of all, epochs counted through.
    """
    kept = min(done, key=lambda phase: done[phase].best_val_loss)
    rows: list[dict[str, float]] = []
    best = 0
    for phase, state in done.items():
        if phase == kept:
            best = len(rows) + state.best_epoch
        rows += [{**row, "epoch": len(rows) + row["epoch"]} for row in state.history]
    return kept, replace(done[kept], epoch=len(rows), best_epoch=best, history=rows)


def _phase(run: RunFolder, phase: Phase, config: dict[str, Any]) -> RunFolder:
    folder = RunFolder(root=run.root / phase)
    folder.begin(config, resume=True)
    return folder


def _listeners(progress: Progress, before: int) -> dict[str, Any]:
    on_batch, on_epoch = progress.on_batch, progress.on_epoch
    return {
        "on_batch": on_batch and (lambda epoch, *rest: on_batch(before + epoch, *rest)),
        "on_epoch": on_epoch and (lambda row: on_epoch({**row, "epoch": before + row["epoch"]})),
    }


def _write_history(run: RunFolder, done: dict[Phase, FitState]) -> None:
    # A resumed run reads its rows from JSON, where their keys are sorted.
    rows = [
        {"phase": phase, "epoch": row["epoch"], **dict(sorted(row.items()))}
        for phase, state in done.items()
        for row in state.history
    ]
    run.write_table("history.csv", rows)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)

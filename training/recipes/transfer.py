"""Recipe `train transfer`: a pretrained backbone, first frozen, then fine-tuned."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lungwatch.errors import ConfigError
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.evaluation.plots import plot_history
from lungwatch.training.fitting.frozen import (
    FINE_TUNED,
    FROZEN,
    FrozenPhase,
    HeadChoice,
    HeadConfig,
    Phase,
    best_phase,
)
from lungwatch.training.fitting.preparation import (
    Prepared,
    calibrate_final,
    prepare,
    retrain,
    test_final,
)
from lungwatch.training.fitting.run import Progress, RunFolder, prepare_tensorflow
from lungwatch.training.fitting.search import Space
from lungwatch.training.fitting.tasks import fit
from lungwatch.training.fitting.trainer import FitConfig, FitState
from lungwatch.training.networks.backbones import (
    BACKBONE,
    Normalisation,
    TransferConfig,
    blocks_of,
    build_transfer,
    load_backbone,
    unfreeze,
)
from lungwatch.training.networks.weights import load_keras

_RETRAINED = "retrained"


def retrain_phases(
    kept: Phase,
    done: dict[Phase, FitState],
    phase: FrozenPhase,
    *,
    choice: HeadChoice,
    tuning: FitConfig | None,
    unfrozen_blocks: int | None,
    config: dict[str, Any],
) -> Path:
    """Repeat what led to the kept network on training and validation images.

    Parameters
    ----------
    kept, done
        The phase whose network is kept, and what became of each.
    phase
        The frozen one; its run folder gets a folder `retrained`.
    choice
        The head that the frozen phase came to.
    tuning, unfrozen_blocks
        How the backbone was fine-tuned, and how many of its last blocks; None: all of them.
    config
        The run's.

    Returns
    -------
    Path
        Of the final network.
    """
    folder = RunFolder(root=phase.run.root / _RETRAINED)
    folder.begin(config, resume=True)
    head = RunFolder(root=folder.root / FROZEN) if FROZEN in done else None
    if head and not head.model.exists():
        head.root.mkdir(exist_ok=True)
        phase.save(*phase.retrain(done[FROZEN], choice), head)
    if kept == FROZEN and head:
        return head.model
    assert tuning is not None  # the kept phase is fine-tuning
    prepare_tensorflow(tuning.seed)
    retrain(
        unfrozen(
            (lambda: load_keras(head.model)) if head else (lambda: phase.build(choice.dropout)),
            unfrozen_blocks,
        ),
        phase.prepared.retrain_data(),
        tuning,
        done[FINE_TUNED],
        folder,
        progress=phase.progress,
    )
    return folder.model


def unfrozen(start: Callable[[], KerasModel], last: int | None) -> Callable[[], KerasModel]:
    """Make a function that builds a network and lets its last blocks, or all (None), learn."""

    def build() -> KerasModel:
        model = start()
        unfreeze(model, last)
        return model

    return build


def train_transfer(
    location: Path,
    root: Path,
    *,
    network: TransferConfig,
    frozen: HeadConfig | None,
    tuning: FitConfig | None,
    grid: Space | None = None,
    retrain: bool = True,
    normalisation: Normalisation | None = None,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    labels: LabelMap | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the head, then the backbone; keep the better, retrain it on all, test it once.

    Parameters
    ----------
    location
        The data set, with the splits train and val, and test if there is one; see
        `load_dataset`.
    root
        The run folder to fill; each phase has a folder of its own in it.
    network
        The network's shape and origin.
    frozen
        How to train the head on the backbone as it comes; None leaves this phase out.
    tuning
        How to train the unfrozen part together with the head; None likewise. The result is
        kept only if its calibrated validation loss is below that of the frozen phase.
    grid
        Values of batch size, learning rate and dropout to try with the backbone frozen; see
        `frozen`.
    retrain
        Repeat what was kept on training and validation images together, for as many epochs
        and without stopping early. Calibration and threshold stay those that were fixed on
        the validation images before.
    normalisation
        Of the grey levels; None leaves them to the backbone's own scaling.
    leave_out, leaks, labels
        See `preparation.prepare`.
    resume
        Continue the run that is in `root`.
    progress
        Listeners; epochs count on through both phases.

    Returns
    -------
    dict
        What is written to `metrics.json`: as `train_baseline`; and `phase`, the kept one,
        `head`, its parameters, and `trained`, what of the backbone learnt.

    Raises
    ------
    DatasetError
        If a split is missing or empty, holds one class only, leaks, or a file is unreadable.
    ConfigError
        If both phases are left out, `root` holds another run, or the backbone cannot be had.
    MissingExtraError
        If TensorFlow, Optuna, or the package with the weights, is not installed.
    """
    progress = progress or Progress()
    last = tuning or frozen
    if last is None:
        raise ConfigError("nothing to train: give the frozen phase or fine-tuning some epochs")
    if grid is not None and frozen is None:
        raise ConfigError("a grid is searched with the backbone frozen: give that some epochs")
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(last.seed)
    # Fails early, before hundreds of images are read, if the backbone cannot be had.
    backbone = load_backbone(network.backbone, network.weights, network.size_px)
    prepared = prepare(
        location,
        PreprocessSpec(size_px=network.size_px),
        leave_out=leave_out,
        leaks=leaks,
        labels=labels,
        progress=progress,
    )
    settled = (
        normalisation.settle(prepared.train.pixels, (prepared.val.pixels, prepared.test.pixels))
        if normalisation
        else None
    )
    config = {
        "family": f"{network.backbone}, transfer",
        "network": {**asdict(network), "weights": Path(network.weights).name},
        "fit": asdict(last),
        "fit_frozen": asdict(frozen) if frozen else None,
        "fit_tuning": asdict(tuning) if tuning else None,
        "grid": {name: asdict(ladder) for name, ladder in grid.items()} if grid else None,
        "retrain": retrain,
        "normalisation": {"kind": normalisation.kind, **asdict(settled)}
        if normalisation and settled
        else None,
        "preprocess": prepared.spec.to_dict(),
        "data": prepared.data,
    }
    run.begin(
        config,
        resume=resume,
        record=prepared.record(retrained=retrain, builds_on=[Path(network.weights)]),
    )
    if (root / "metrics.json").exists():
        # What is finished is tested already, once.
        return run.read("metrics.json")

    untouched = backbone.model.get_weights()

    def fresh(dropout: float) -> KerasModel:
        backbone.model.set_weights(untouched)
        shape = replace(network, dropout=dropout)
        return build_transfer(shape, settled, backbone=backbone)

    phase = FrozenPhase(
        prepared=prepared,
        build=fresh,
        dense_units=network.dense_units,
        seed=last.seed,
        run=run,
        progress=progress,
    )
    done: dict[Phase, FitState] = {}
    choice = HeadChoice(config=frozen or HeadConfig(), dropout=network.dropout)
    if frozen:
        done[FROZEN], choice = phase.train(choice, grid, {**config, "fit": asdict(frozen)})
    if tuning:
        folder = RunFolder(root=root / FINE_TUNED)
        folder.begin({**config, "fit": asdict(tuning)}, resume=True)
        prepare_tensorflow(tuning.seed)
        done[FINE_TUNED] = fit(
            unfrozen(
                (lambda: load_keras(phase.folder.model))
                if frozen
                else (lambda: fresh(choice.dropout)),
                network.unfreeze,
            ),
            prepared.fit_data(),
            tuning,
            folder,
            progress=_shifted(progress, done[FROZEN].epoch if frozen else 0),
        )
    kept, state = best_phase(done)
    chosen = load_keras(root / kept / "model.keras")
    if retrain:
        final = retrain_phases(
            kept,
            done,
            phase,
            choice=choice,
            tuning=tuning,
            unfrozen_blocks=network.unfreeze,
            config=config,
        )
    else:
        final = root / kept / "model.keras"
    run.adopt(final)
    _write_history(run, done)
    boundary = done[FROZEN].epoch if len(done) > 1 else None
    plot_history(state.history, run.root / "history.png", boundary=boundary)
    metrics = {
        "phase": kept,
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "val_loss": {phase: found.best_val_loss for phase, found in done.items()},
        "head": choice.to_dict() if frozen else None,
        "trained": _trained(chosen, kept, network.unfreeze),
        "parameters": int(chosen.count_params()),
        **calibrate_final(load_keras(final), prepared, retrained=retrain),
    }
    if _is_testable(prepared):
        metrics = test_final(run, metrics, prepared.test, prepared.folder)
    else:
        run.write("metrics.json", metrics)
    phase.forget_features()
    return metrics


def _trained(model: KerasModel, kept: Phase, last: int | None) -> dict[str, Any]:
    """Say what of the backbone learnt: its blocks, and the layers in them that have weights."""
    if kept == FROZEN:
        return {"unfreeze": 0, "blocks": [], "layers": []}
    layers = unfreeze(model, last)
    blocks = [block.name for block in blocks_of(model.get_layer(BACKBONE))]
    return {
        "unfreeze": "all" if last is None else last,
        "blocks": blocks if last is None else blocks[-last:],
        "layers": layers,
    }


def _is_testable(prepared: Prepared) -> bool:
    return len(set(prepared.test.targets.tolist())) > 1


def _shifted(progress: Progress, before: int) -> Progress:
    """Return listeners that count on from the epochs of the phase before."""
    on_batch, on_epoch = progress.on_batch, progress.on_epoch
    return Progress(
        on_batch=on_batch and (lambda epoch, *rest: on_batch(before + epoch, *rest)),
        on_epoch=on_epoch and (lambda row: on_epoch({**row, "epoch": before + row["epoch"]})),
    )


def _write_history(run: RunFolder, done: dict[Phase, FitState]) -> None:
    # A resumed run reads its rows from JSON, where their keys are sorted.
    rows = [
        {"phase": phase, "epoch": row["epoch"], **dict(sorted(row.items()))}
        for phase, state in done.items()
        for row in state.history
    ]
    run.write_table("history.csv", rows)

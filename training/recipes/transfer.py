"""Recipe `train transfer`: a pretrained backbone, first frozen, then fine-tuned."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferPhases:
    """The phases of a run: what became of each, and how the kept one leads to the final network.

    Attributes
    ----------
    frozen
        The phase with the backbone frozen.
    choice
        The head that it came to.
    tuning, unfreeze
        How the backbone is fine-tuned, and how many of its last blocks; None: all of them.
    config
        The run's.
    done
        The state of each phase that was trained.
    """

    frozen: FrozenPhase
    choice: HeadChoice
    tuning: FitConfig | None
    unfreeze: int | None
    config: dict[str, Any]
    done: dict[Phase, FitState]

    def fine_tune(self, tuning: FitConfig) -> None:
        """Train the unfrozen part and the head, after the frozen phase if there was one."""
        root, progress = self.frozen.run.root, self.frozen.progress
        folder = RunFolder(root=root / FINE_TUNED)
        folder.begin({**self.config, "fit": asdict(tuning)}, resume=True)
        prepare_tensorflow(tuning.seed)
        before = self.done[FROZEN].epoch if FROZEN in self.done else 0
        self.done[FINE_TUNED] = fit(
            self._unfrozen(self.frozen.folder if FROZEN in self.done else None),
            self.frozen.prepared.fit_data(),
            tuning,
            folder,
            progress=_shifted(progress, before),
        )

    def retrain(self, kept: Phase) -> Path:
        """Repeat what led to the kept network on training and validation images.

        Returns
        -------
        Path
            Of the final network, in the folder `retrained` of the run.
        """
        folder = RunFolder(root=self.frozen.run.root / _RETRAINED)
        folder.begin(self.config, resume=True)
        head = RunFolder(root=folder.root / FROZEN) if FROZEN in self.done else None
        if head and not head.model.exists():
            head.root.mkdir(exist_ok=True)
            self.frozen.save(*self.frozen.retrain(self.done[FROZEN], self.choice), head)
        if kept == FROZEN and head:
            return head.model
        assert self.tuning is not None  # the kept phase is fine-tuning
        prepare_tensorflow(self.tuning.seed)
        retrain(
            self._unfrozen(head),
            self.frozen.prepared.retrain_data(),
            self.tuning,
            self.done[FINE_TUNED],
            folder,
            progress=self.frozen.progress,
        )
        return folder.model

    def finish(self, *, retrained: bool) -> dict[str, Any]:
        """Calibrate and test the better phase's network; return the metrics."""
        run, prepared = self.frozen.run, self.frozen.prepared
        kept, state = best_phase(self.done)
        final = run.root / kept / "model.keras"
        chosen = load_keras(final)
        if retrained:
            final = self.retrain(kept)
        run.adopt(final)
        _write_history(run, self.done)
        boundary = self.done[FROZEN].epoch if len(self.done) > 1 else None
        plot_history(state.history, run.root / "history.png", boundary=boundary)
        metrics = {
            "phase": kept,
            "best_epoch": state.best_epoch,
            "epochs": state.epoch,
            "val_loss": {name: found.best_val_loss for name, found in self.done.items()},
            "head": self.choice.to_dict() if FROZEN in self.done else None,
            "trained": _trained(chosen, kept, self.unfreeze),
            "parameters": int(chosen.count_params()),
            **calibrate_final(load_keras(final), prepared, retrained=retrained),
        }
        if len(set(prepared.test.targets.tolist())) > 1:
            return test_final(run, metrics, prepared.test, prepared.folder)
        run.write("metrics.json", metrics)
        return metrics

    def _unfrozen(self, head: RunFolder | None) -> Callable[[], KerasModel]:
        """Make what builds the network of a phase, its last blocks, or all (None), trainable."""

        def build() -> KerasModel:
            model = load_keras(head.model) if head else self.frozen.build(self.choice.dropout)
            unfreeze(model, self.unfreeze)
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
    network
        The network's shape and origin.
    frozen
        How to train the head on the backbone as it comes; None leaves this phase out.
    tuning
        How to train the unfrozen part together with the head; None likewise. The result is
        kept only if its calibrated validation loss is below that of the frozen phase.
    grid
        Values of batch size, learning rate and dropout to try with the backbone frozen.
    retrain
        Repeat what was kept on training and validation images together, for as many epochs
        and without stopping early.
    normalisation
        Of the grey levels; None leaves them to the backbone's own scaling.
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
    # Fails early, before hundreds of images are read, if the backbone is not available.
    backbone = load_backbone(network.backbone, network.weights, network.size_px)
    spec = PreprocessSpec(size_px=network.size_px)
    prepared = prepare(
        location, spec, leave_out=leave_out, leaks=leaks, labels=labels, progress=progress
    )
    settled = prepared.settle(normalisation) if normalisation else None
    kind = normalisation.kind if normalisation else None
    config = {
        "family": f"{network.backbone}, transfer",
        "network": {**asdict(network), "weights": Path(network.weights).name},
        "fit": asdict(last),
        "fit_frozen": frozen and asdict(frozen),
        "fit_tuning": tuning and asdict(tuning),
        "grid": {name: asdict(choices) for name, choices in grid.items()} if grid else None,
        "retrain": retrain,
        "normalisation": settled and {"kind": kind, **asdict(settled)},
        "preprocess": prepared.spec.to_dict(),
        "data": prepared.data,
    }
    record = prepared.record(retrained=retrain, builds_on=[Path(network.weights)])
    run.begin(config, resume=resume, record=record)
    if (root / "metrics.json").exists():
        # A finished run was tested already, and is tested once only.
        return run.read("metrics.json")
    untouched = backbone.model.get_weights()

    def fresh(dropout: float) -> KerasModel:
        backbone.model.set_weights(untouched)
        return build_transfer(replace(network, dropout=dropout), settled, backbone=backbone)

    phase = FrozenPhase(
        prepared=prepared,
        build=fresh,
        dense_units=network.dense_units,
        seed=last.seed,
        run=run,
        progress=progress,
    )
    return _train_phases(phase, config, network, frozen, tuning, grid=grid, retrained=retrain)


def _train_phases(
    phase: FrozenPhase,
    config: dict[str, Any],
    network: TransferConfig,
    frozen: HeadConfig | None,
    tuning: FitConfig | None,
    *,
    grid: Space | None,
    retrained: bool,
) -> dict[str, Any]:
    done: dict[Phase, FitState] = {}
    choice = HeadChoice(config=frozen or HeadConfig(), dropout=network.dropout)
    if frozen:
        done[FROZEN], choice = phase.train(choice, grid, {**config, "fit": asdict(frozen)})
    phases = TransferPhases(
        frozen=phase,
        choice=choice,
        tuning=tuning,
        unfreeze=network.unfreeze,
        config=config,
        done=done,
    )
    if tuning:
        phases.fine_tune(tuning)
    metrics = phases.finish(retrained=retrained)
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

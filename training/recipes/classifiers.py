"""Recipes `train baseline`, a CNN from scratch, and `train transfer`, on a pretrained backbone."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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
    conclude,
    prepare,
    retrain,
    test_final,
)
from lungwatch.training.fitting.run import Progress, RunFolder, open_run, prepare_tensorflow
from lungwatch.training.fitting.search import (
    Choices,
    Number,
    Outcome,
    Parameter,
    Range,
    SearchConfig,
    SearchResult,
    Space,
    Trial,
    search,
)
from lungwatch.training.fitting.tasks import fit
from lungwatch.training.fitting.trainer import FitConfig, FitState
from lungwatch.training.networks.backbones import (
    BACKBONE,
    BaselineConfig,
    Normalisation,
    Standardisation,
    TransferConfig,
    blocks_of,
    build_baseline,
    build_transfer,
    load_backbone,
    unfreeze,
)
from lungwatch.training.networks.weights import load_keras

# `width` multiplies the number of filters of every block.
TUNE_RANGES: dict[str, Parameter] = {
    "learning_rate": Range(low=3e-4, high=3e-3, lowest=1e-5, highest=3e-2, log=True),
    "width": Range(low=0.5, high=1.5, lowest=0.25, highest=3.0),
    "dense_units": Range(low=32, high=256, lowest=8, highest=1024, log=True, integer=True),
    "dropout": Range(low=0.1, high=0.6, lowest=0.0, highest=0.9),
}

TUNE_GRID: dict[str, Parameter] = {
    "learning_rate": Choices(rungs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), first=1, last=2),
    "width": Choices(rungs=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0), first=1, last=2),
    "dense_units": Choices(rungs=(16, 32, 64, 128, 256, 512, 1024), first=2, last=3),
    "dropout": Choices(rungs=(0.0, 0.2, 0.4, 0.6, 0.8), first=1, last=2),
}


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Configuration of a hyper-parameter search for the baseline.

    Attributes
    ----------
    search
        See `SearchConfig`.
    epochs
        Most epochs of a trial.
    retrain
        Retrain the final network on training and validation images; otherwise the best
        trial's is the final one.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    epochs: int = 20
    retrain: bool = True

    @property
    def space(self) -> dict[str, Parameter]:
        """Parameters that the sampler chooses from."""
        return TUNE_GRID if self.search.sampler == "grid" else TUNE_RANGES


def tune(
    prepared: Prepared,
    config: TuneConfig,
    run: RunFolder,
    *,
    standardisation: Standardisation,
    network: BaselineConfig,
    fitting: FitConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search, retrain and test; every trial has a run folder of its own under `trials`.

    Calibration and threshold are the final network's own, fixed on validation images that it did
    not learn from: a third of them, held back, when it is retrained.

    Parameters
    ----------
    prepared
        The data, test split included.
    config
        How to tune.
    run
        A begun run folder; what it holds of an interrupted tuning is not done again.
    standardisation
        The network's first layer.
    network, fitting
        Shape and training, but for what is searched for.

    Returns
    -------
    dict
        What is written to `metrics.json`.
    """
    progress = progress or Progress()
    trial_fitting = replace(fitting, epochs=config.epochs)
    data = prepared.fit_data()

    def builder(parameters: dict[str, Number]) -> Callable[[], KerasModel]:
        shape = shape_of(network, parameters)
        return lambda: build_baseline(shape, **asdict(standardisation))

    def objective(trial: Trial) -> Outcome:
        import keras

        keras.backend.clear_session()
        prepare_tensorflow(trial.seed)
        how = _fitting(trial_fitting, trial)
        folder = _folder(run, trial)
        folder.begin({"parameters": trial.parameters, "fit": asdict(how)}, resume=True)
        state = fit(
            builder(trial.parameters),
            data,
            how,
            folder,
            progress=progress,
        )
        return Outcome(value=state.best_val_loss, epochs=state.best_epoch)

    found = search(config.space, objective, config.search, run, on_trial=progress.on_trial)
    folder = _folder(run, found.best)
    _forget_models(run, keep=folder)
    state = FitState(**folder.read("state.json"))
    if config.retrain:
        prepare_tensorflow(fitting.seed)
        state = retrain(
            builder(found.best.parameters),
            prepared.retrain_data(),
            replace(_fitting(trial_fitting, found.best), seed=fitting.seed),
            state,
            run,
            progress=progress,
        )
    else:
        for name in ("model.keras", "history.csv", "state.json"):
            run.adopt(folder.root / name)
    final = load_keras(run.model)
    plot_history(state.history, run.root / "history.png")
    metrics = {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "parameters": int(final.count_params()),
        "search": _summary(found),
        **calibrate_final(final, prepared, retrained=config.retrain),
    }
    return test_final(run, metrics, prepared.test, prepared.folder)


def shape_of(network: BaselineConfig, parameters: dict[str, Number]) -> BaselineConfig:
    """Return the network's shape with a trial's parameters; filters come in fours."""
    width = parameters["width"]
    return replace(
        network,
        filters=tuple(4 * max(1, round(filters * width / 4)) for filters in network.filters),
        dense_units=int(parameters["dense_units"]),
        dropout=float(parameters["dropout"]),
    )


def _fitting(fitting: FitConfig, trial: Trial) -> FitConfig:
    rate = float(trial.parameters["learning_rate"])
    return replace(fitting, learning_rate=rate, seed=trial.seed)


def _folder(run: RunFolder, trial: Trial) -> RunFolder:
    return RunFolder(root=run.root / "trials" / f"{trial.number:04d}")


def _forget_models(run: RunFolder, *, keep: RunFolder) -> None:
    for model in (run.root / "trials").glob("*/model.keras"):
        if model.parent != keep.root:
            model.unlink()


def _summary(found: SearchResult) -> dict[str, Any]:
    failed = sum(row["state"] == "failed" for row in found.rows)
    return {
        "trials": len(found.rows),
        "failed": failed,
        "rounds": 1 + max(row["round"] for row in found.rows),
        "best": {
            "number": found.best.number,
            "parameters": found.best.parameters,
            "value": found.outcome.value,
            "epochs": found.outcome.epochs,
        },
    }


_FAMILY = "baseline CNN"


def train_baseline(
    location: Path,
    root: Path,
    *,
    network: BaselineConfig,
    fitting: FitConfig,
    normalisation: Normalisation | None = None,
    leave_out: str | None = None,
    leaks: LeakPolicy = "refuse",
    labels: LabelMap | None = None,
    tuning: TuneConfig | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, calibrate on the validation split, and measure; or tune, retrain and test.

    Parameters
    ----------
    network
        The network's shape.
    normalisation
        Of grey levels; by default with the training set's mean and standard deviation.
    tuning
        How to tune (see `tune`), which needs a test split; None trains the network as it is.
    resume
        Continue the run that is in `root`; without tuning, `fitting.epochs` may have grown.
    """
    progress = progress or Progress()
    normalisation = normalisation or Normalisation()
    run = open_run(root, resume=resume, seed=fitting.seed)
    prepared = prepare(
        location,
        PreprocessSpec(size_px=network.size_px),
        leave_out=leave_out,
        leaks=leaks,
        labels=labels,
        need_test=tuning is not None,
        progress=progress,
    )
    standardisation = prepared.settle(normalisation)
    config = {
        "family": _FAMILY,
        "network": asdict(network),
        "fit": asdict(fitting),
        "tuning": asdict(tuning) if tuning else None,
        "normalisation": {"kind": normalisation.kind, **asdict(standardisation)},
        "preprocess": prepared.spec.to_dict(),
        "data": prepared.data,
    }
    run.begin(
        config,
        resume=resume,
        may_grow=() if tuning else ("fit.epochs",),
        record=prepared.record(retrained=tuning is not None and tuning.retrain),
    )
    if tuning:
        if (root / "metrics.json").exists() and "test" in run.read("metrics.json"):
            # The final network is tested once.
            return run.read("metrics.json")
        return tune(
            prepared,
            tuning,
            run,
            standardisation=standardisation,
            network=network,
            fitting=fitting,
            progress=progress,
        )
    state = fit(
        lambda: build_baseline(network, **asdict(standardisation)),
        prepared.fit_data(),
        fitting,
        run,
        keep_checkpoint=True,
        progress=progress,
    )
    return conclude(run, state, prepared)


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
    run = open_run(root, resume=resume, seed=last.seed)
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

"""Recipe `train baseline`: a CNN from scratch, with or without a hyper-parameter search."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.evaluation.plots import plot_history
from lungwatch.training.fitting.preparation import (
    Prepared,
    calibrate_final,
    conclude,
    prepare,
    retrain,
    test_final,
)
from lungwatch.training.fitting.run import Progress, RunFolder, prepare_tensorflow
from lungwatch.training.fitting.search import (
    Choices,
    Number,
    Outcome,
    Parameter,
    Range,
    SearchConfig,
    SearchResult,
    Trial,
    search,
)
from lungwatch.training.fitting.tasks import fit
from lungwatch.training.fitting.trainer import FitConfig, FitState
from lungwatch.training.networks.backbones import (
    BaselineConfig,
    Normalisation,
    Standardisation,
    build_baseline,
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
    """How to tune.

    Attributes
    ----------
    search
        See `SearchConfig`.
    epochs
        Most epochs of a trial.
    retrain
        Train the final network anew on training and validation images; otherwise the best
        trial's is the final one.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    epochs: int = 20
    retrain: bool = True

    @property
    def space(self) -> dict[str, Parameter]:
        """What the sampler may choose from."""
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
    progress
        Listeners.

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
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(fitting.seed)
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

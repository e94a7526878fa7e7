"""Train the baseline on a data set: the whole of `lungwatch train baseline`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.baseline import BaselineConfig, build_baseline
from lungwatch.training.conclude import conclude
from lungwatch.training.data.dataset import LabelMap
from lungwatch.training.data.duplicates import LeakPolicy
from lungwatch.training.fit import fit
from lungwatch.training.fit_config import FitConfig
from lungwatch.training.normalisation import Normalisation
from lungwatch.training.prepare import prepare
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder
from lungwatch.training.runtime import prepare_tensorflow
from lungwatch.training.tune import TuneConfig, tune

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
    location
        The data set, with the splits train and val, for tuning also test; see `load_dataset`.
    root
        The run folder to fill.
    network, fitting
        The network's shape and how to train it.
    normalisation
        Of grey levels; by default with the training set's mean and standard deviation.
    leave_out, leaks, labels
        See `lungwatch.training.prepare.prepare`.
    tuning
        How to tune (see `lungwatch.training.tune.tune`); None trains the network as it is.
    resume
        Continue the run that is in `root`; without tuning, `fitting.epochs` may have grown.
    progress
        Listeners.

    Returns
    -------
    dict
        What is written to `metrics.json`: `best_epoch`, `epochs`, `calibration`, `decision`,
        what they were `calibrated_on`, and the figures on `validation`; after tuning also
        `search` and the figures on `test`.

    Raises
    ------
    DatasetError
        If a split is missing or empty, holds one class only, leaks, or a file is unreadable.
    ConfigError
        If `root` holds another run.
    MissingExtraError
        If TensorFlow, or for tuning Optuna, is not installed.
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
    standardisation = normalisation.settle(
        prepared.train.pixels, (prepared.val.pixels, prepared.test.pixels)
    )
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
        on_batch=progress.on_batch,
        on_epoch=progress.on_epoch,
    )
    return conclude(run, state, prepared.val.pixels, prepared.val.targets)

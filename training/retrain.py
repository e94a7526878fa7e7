"""The final network: from scratch on training and validation images, then tested once."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.files import write_atomic
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.evaluation.evaluation import Scored, evaluate_logits
from lungwatch.training.evaluation.evaluation_plots import draw_plots
from lungwatch.training.evaluation.scorers import KerasScorer
from lungwatch.training.fit import fit
from lungwatch.training.fit_config import FitConfig, FitData
from lungwatch.training.fit_state import FitState
from lungwatch.training.prepare import Part
from lungwatch.training.progress import Progress
from lungwatch.training.run import RunFolder

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
    progress
        Listeners.
    """
    progress = progress or Progress()
    rates = tuple(row["learning_rate"] for row in chosen.history[: chosen.best_epoch])
    fixed = replace(fitting, epochs=chosen.best_epoch, patience=None, learning_rates=rates)
    return fit(build, data, fixed, run, on_batch=progress.on_batch, on_epoch=progress.on_epoch)


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

"""What a training ends with: probability, threshold, figures, plot."""

from dataclasses import asdict, dataclass
from typing import Any

from lungwatch.contract import Calibration, Decision
from lungwatch.training.data.pixels import FloatArray
from lungwatch.training.data.plots import plot_history
from lungwatch.training.evaluation.calibration import choose_decision, fit_calibration
from lungwatch.training.evaluation.metrics import Figures, figures, sigmoid
from lungwatch.training.evaluation.scorers import load_keras, predict_logits
from lungwatch.training.fit_state import FitState
from lungwatch.training.run import RunFolder

VALIDATION = "validation split"
RETRAINED_ON = "train and two thirds of val"


def calibrated_on(images: int, of: int) -> str:
    """Name the images that fixed calibration and threshold: validation images, all or some."""
    if images == of:
        return VALIDATION
    return f"{images} of {of} images of the {VALIDATION} that the network did not learn from"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a network's answers are read, and how it did on the images that this was fixed on."""

    calibration: Calibration
    decision: Decision
    validation: Figures

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as metrics.json holds them."""
        return {
            "calibration": asdict(self.calibration),
            "decision": asdict(self.decision),
            "validation": self.validation.to_dict(),
        }


def judge(targets: FloatArray, logits: FloatArray) -> Verdict:
    """Fix calibration and threshold on validation images.

    Parameters
    ----------
    targets, logits
        0 and 1, and binary logits, shape (N,), of images the network did not learn from.
    """
    calibration = fit_calibration(targets, logits)
    probabilities = sigmoid(calibration.slope * logits + calibration.intercept)
    decision = choose_decision(targets, probabilities)
    return Verdict(
        calibration=calibration,
        decision=decision,
        validation=figures(targets, probabilities, decision.threshold),
    )


def conclude(
    run: RunFolder, state: FitState, val_pixels: FloatArray, val_targets: FloatArray
) -> dict[str, Any]:
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
        "calibrated_on": VALIDATION,
        **judge(val_targets, predict_logits(model, val_pixels)).to_dict(),
    }
    run.write("metrics.json", metrics)
    plot_history(state.history, run.root / "history.png")
    return metrics

"""Refusal of degenerate networks: diverged, constant, or no better than chance."""

import numpy as np

from lungwatch.contract import Calibration
from lungwatch.errors import ModelError
from lungwatch.training.foreign import KerasModel
from lungwatch.training.metrics import roc_auc
from lungwatch.training.pixels import FloatArray

# A validation area up to this is about chance: 200 images of either class have a standard error
# of 0.03 there.
CHANCE_AUC = 0.55
_CONSTANT = 1e-6


def check_weights(model: KerasModel, name: str) -> None:
    """Refuse weights that are no finite numbers.

    Raises
    ------
    ModelError
        If there are any; the first layer is named.
    """
    for weight in model.weights:
        if not np.isfinite(np.asarray(weight)).all():
            raise ModelError(
                f"{name}: weights of {weight.path} are not finite: the training diverged; train "
                "anew with a smaller learning rate"
            )


def check_varied(logits: FloatArray, name: str) -> None:
    """Refuse a network that gives the same logit, (N,), for different images.

    Raises
    ------
    ModelError
        If it does, or gives what is no finite number.
    """
    if not np.isfinite(logits).all():
        raise ModelError(f"{name} answers with what is no finite number: the training diverged")
    if len(logits) > 1 and float(np.ptp(logits)) < _CONSTANT:
        raise ModelError(f"{name} gives all {len(logits)} images the same answer: train anew")


def check_validation(area: float, calibration: Calibration, name: str) -> None:
    """Refuse a network that does not tell the classes apart on validation images.

    Raises
    ------
    ModelError
        If its area under the ROC curve is about chance or less, or no rising calibration fits.
    """
    if not area > CHANCE_AUC:
        raise ModelError(
            f"{name} has ROC-AUC {area:.3f} on validation images, not above {CHANCE_AUC}: no "
            "better than chance; it is not exported"
        )
    # `fit_calibration` gives the identity, which no fit gives, where the slope is not above 0.
    if calibration == Calibration():
        raise ModelError(
            f"{name} scores COVID lower on validation images: no calibration with a slope above 0 "
            "fits; it is not exported"
        )


def check_answers(
    truth: FloatArray, logits: FloatArray, calibration: Calibration, name: str
) -> None:
    """Refuse validation answers, (N,), that are constant or no better than chance.

    Raises
    ------
    ModelError
        If they are.
    """
    check_varied(logits, name)
    check_validation(roc_auc(truth, logits), calibration, name)

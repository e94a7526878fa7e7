"""Rates of a trained content gate before export: kept and refused."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.foreign import KerasModel
from lungwatch.training.gate_checks import (
    Familiarity,
    GateLook,
    choose_thresholds,
    exposures,
    first_failures,
    turned_copies,
)
from lungwatch.training.gate_data import GateData
from lungwatch.training.gate_images import GateXray, exposed, no_chest
from lungwatch.training.gate_network import answering_network, look_with
from lungwatch.training.pixels import FloatArray

_NO_CHESTS = 400


def measure_gate(
    model: KerasModel, data: GateData, spec: PreprocessSpec, *, seed: int
) -> dict[str, Any]:
    """Measure a network as a gate, with thresholds of its own.

    Parameters
    ----------
    model
        Of `lungwatch.training.gate_network.build_gate_network`.
    data
        What it was trained on, and what measures it.
    spec
        Its preprocessing.
    seed
        Of the pictures that are drawn.

    Returns
    -------
    dict
        `parameters`; `thresholds`, chosen on the validation split; `rates`, for each set of
        pictures their number, how many are kept, and how many each check refuses first; `dice`
        of the lungs on the masks held out.
    """
    answering = answering_network(model)

    def look(pixels: FloatArray) -> GateLook:
        return look_with(answering, pixels)

    train, val = look(data.train.pixels), look(data.val.pixels)
    familiarity = Familiarity.of(train.embedding)
    exposed_val = [look(pixels) for pixels in exposures(data.val.pixels)]
    thresholds = choose_thresholds(train, val, exposed_val, familiarity)
    checks = thresholds.checks()

    def rate(found: GateLook) -> dict[str, Any]:
        refused = first_failures(thresholds.scores(found, familiarity), checks)
        pictures = len(found.chances)
        return {
            "pictures": pictures,
            "kept": pictures - refused.total(),
            "refused": dict(refused.most_common()),
        }

    rates = {"validation": rate(val)}
    for name, pixels in turned_copies(data.val.pixels).items():
        rates[f"validation, {name}"] = rate(look(pixels))
    rates["drawn and cut"] = rate(look(_no_chests(data.val.xrays, spec, seed)))
    if len(data.left_out.samples):
        rates["left out"] = rate(look(data.left_out.pixels))
        for name, pixels in turned_copies(data.left_out.pixels).items():
            rates[f"left out, {name}"] = rate(look(pixels))
    return {
        "parameters": int(model.count_params()),
        "thresholds": thresholds.to_dict(),
        "rates": rates,
        "dice": round(lung_dice(look, data.held_out.pixels, data.held_out.xrays), 4),
    }


def lung_dice(
    look: Callable[[FloatArray], GateLook], pixels: FloatArray, xrays: Sequence[GateXray]
) -> float:
    """Return the mean Dice coefficient of the lungs found and the lungs drawn, 0..1.

    Parameters
    ----------
    look
        Asks a gate about preprocessed pictures.
    pixels, xrays
        The X-rays, preprocessed, and with their drawings.
    """
    found = look(pixels).lungs
    scores = []
    for field, xray in zip(found, xrays, strict=True):
        assert xray.lungs is not None
        side = (xray.lungs.shape[1], xray.lungs.shape[0])
        mask = cv2.resize(field, side, interpolation=cv2.INTER_LINEAR) >= 0.5
        drawn = xray.lungs >= 128
        both = int(mask.sum()) + int(drawn.sum())
        scores.append(2.0 * int((mask & drawn).sum()) / max(both, 1))
    return float(np.mean(scores))


def _no_chests(xrays: Sequence[GateXray], spec: PreprocessSpec, seed: int) -> FloatArray:
    rng = np.random.default_rng([seed, 0])
    return np.stack(
        [preprocess(exposed(no_chest(xrays, rng), rng), spec) for _ in range(_NO_CHESTS)]
    )

"""The overlay of a scored file: which map is drawn, on which scale, with which words."""

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import COVID, NEGATIVE, ModelContract
from lungwatch.daemon.judging import Judged
from lungwatch.daemon.overlay import OverlayText, on_common_scale, render_overlay
from lungwatch.daemon.records import Classified, Scores
from lungwatch.preprocess import content_of


def draw_result(
    classified: Classified, judged: Judged, contract: ModelContract, *, side_by_side: bool
) -> NDArray[np.uint8]:
    """Draw what the model and its gate say of a picture.

    Parameters
    ----------
    classified, judged
        Scores, preview and remarks.
    contract
        Of the model that scored it.
    side_by_side
        Whether the untouched X-ray lies beside the one under the map.

    Returns
    -------
    numpy.ndarray
        uint8 RGB, shape (H, W, 3). The map is COVID's, on the scale of all images of the model
        where the graph and the contract tell it; a negative answer has none.
    """
    prepared, scores = classified.prepared, classified.scores
    cam, is_common = _map(scores, contract)
    text = OverlayText(
        label=scores.label,
        probability=scores.probability,
        decision=contract.decision,
        model=contract.id,
        sha256=prepared.claim.sha256,
        flags=judged.flags,
        gate_score=judged.plausibility.gate_score,
        lung_share=judged.plausibility.lung_share,
        common_scale=is_common,
        sides_known=prepared.orientation_known,
    )
    # A map under a negative answer would look like a lesion.
    drawn = (
        None if scores.label == NEGATIVE else content_of(cam, prepared.shape, contract.preprocess)
    )
    return render_overlay(preview=prepared.preview, cam=drawn, text=text, side_by_side=side_by_side)


def _map(scores: Scores, contract: ModelContract) -> tuple[NDArray[np.float32], bool]:
    """Return the map for COVID, and whether it is on the model's common scale."""
    index = contract.labels.index(COVID)
    cam, reference = scores.cam[index], contract.map_reference
    if scores.cam_peak is None or reference is None:
        return cam, False
    return on_common_scale(cam, float(scores.cam_peak[index]), reference), True

"""The overlay of a scored file: which map is drawn, on which scale, with which words."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import COVID, NEGATIVE, OPACITY, ModelContract
from lungwatch.daemon.judging import Judged
from lungwatch.daemon.overlay import FindingText, OverlayText, on_common_scale, render_overlay
from lungwatch.daemon.records import Classified, Scores
from lungwatch.flags import Flag
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
        where the graph and the contract tell it. A negative answer has none, but for that of
        its opacity where the graph gives one.
    """
    prepared, scores = classified.prepared, classified.scores
    shown = _map(scores, judged, contract)
    text = OverlayText(
        label=scores.label,
        probability=scores.probability,
        decision=contract.decision,
        model=contract.id,
        sha256=prepared.claim.sha256,
        flags=judged.flags,
        gate_score=judged.plausibility.gate_score,
        lung_share=judged.plausibility.lung_share,
        common_scale=shown is not None and shown.is_common,
        sides_known=prepared.orientation_known,
        findings=tuple(
            FindingText(
                name=one.name, probability=scores.further[one.name], threshold=one.threshold
            )
            for one in contract.findings
        ),
        opacity_map=scores.label == NEGATIVE and shown is not None,
    )
    drawn = None if shown is None else content_of(shown.cam, prepared.shape, contract.preprocess)
    return render_overlay(preview=prepared.preview, cam=drawn, text=text, side_by_side=side_by_side)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Map:
    """A map, float32 (side, side), 0..1, and whether it is on the model's common scale."""

    cam: NDArray[np.float32]
    is_common: bool


def _map(scores: Scores, judged: Judged, contract: ModelContract) -> _Map | None:
    """Return the map that belongs to the answer."""
    if scores.label != NEGATIVE:
        index = contract.labels.index(COVID)
        return _scaled(scores.cam[index], scores.cam_peak, index, contract.map_reference)
    # COVID's map under a negative answer would look like a lesion.
    opacity = contract.finding(OPACITY)
    if Flag.OTHER_OPACITY not in judged.flags or opacity is None or scores.further_cams is None:
        return None
    index = contract.findings.index(opacity)
    return _scaled(scores.further_cams[index], scores.further_peaks, index, opacity.map_reference)


def _scaled(
    cam: NDArray[np.float32],
    peaks: NDArray[np.float32] | None,
    index: int,
    reference: float | None,
) -> _Map:
    if peaks is None or reference is None:
        return _Map(cam=cam, is_common=False)
    return _Map(cam=on_common_scale(cam, float(peaks[index]), reference), is_common=True)

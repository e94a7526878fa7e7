"""Recording of a scored file: flags and plausibility, overlay, and database row."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import COVID, NEGATIVE, OPACITY, ModelContract
from lungwatch.daemon.overlay.render import encode_png, on_common_scale, render_overlay
from lungwatch.daemon.overlay.text import FindingText, OverlayText
from lungwatch.daemon.pipeline.model import ModelInUse
from lungwatch.daemon.pipeline.records import Classified, Scores
from lungwatch.daemon.stage import Context, crashpoint
from lungwatch.db.models import Plausibility
from lungwatch.errors import Flag, flags_in_order
from lungwatch.files import make_dirs, write_atomic
from lungwatch.preprocess import (
    LEAST_SHARE_INSIDE,
    content_of,
    has_partial_lungs,
    lung_area_of,
    lung_mask,
    share_inside,
)


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Remarks on one result.

    Attributes
    ----------
    plausibility
        The gate's figures.
    flags
        Each once, in the order of `Flag`.
    """

    plausibility: Plausibility
    flags: tuple[Flag, ...]


def assess(classified: Classified, contract: ModelContract) -> Assessment:
    """Collect the remarks of reader, gate and maps on a scored image."""
    scores = classified.scores
    flags = set(classified.prepared.flags)
    if not scores.cam[contract.labels.index(NEGATIVE if scores.label == NEGATIVE else COVID)].any():
        flags.add(Flag.EMPTY_MAP)
    opacity = contract.finding(OPACITY)
    is_opaque = opacity is not None and opacity.is_present(scores.further[OPACITY])
    if scores.label == NEGATIVE and is_opaque:
        flags.add(Flag.OTHER_OPACITY)
    gate, answer = contract.gate, classified.gate
    if gate is None or answer is None:
        return Assessment(
            plausibility=Plausibility(), flags=flags_in_order({*flags, Flag.NOT_GATED})
        )
    if answer.verdict.flag is not None:
        flags.add(answer.verdict.flag)
    shape = classified.prepared.shape
    mask = lung_mask(answer.lungs, shape, gate.preprocess)
    if has_partial_lungs(mask, gate.lung_area):
        flags.add(Flag.PARTIAL_LUNGS)
    cam = content_of(scores.cam[contract.labels.index(COVID)], shape, contract.preprocess)
    share = share_inside(cam, mask.astype("float32"))
    if share is not None and share < LEAST_SHARE_INSIDE and scores.label != NEGATIVE:
        flags.add(Flag.ATTENTION_OUTSIDE_LUNGS)
    found = Plausibility(
        gate_score=answer.verdict.score, lung_area=lung_area_of(mask), lung_share=share
    )
    return Assessment(plausibility=found, flags=flags_in_order(flags))


def draw_result(
    classified: Classified, assessment: Assessment, contract: ModelContract, *, side_by_side: bool
) -> NDArray[np.uint8]:
    """Draw the results of the model and its gate on an image.

    Parameters
    ----------
    classified, assessment
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
    cam, is_common = _map_for(scores, assessment, contract)
    text = OverlayText(
        label=scores.label,
        probability=scores.probability,
        decision=contract.decision,
        model=contract.id,
        sha256=prepared.claim.sha256,
        flags=assessment.flags,
        gate_score=assessment.plausibility.gate_score,
        lung_share=assessment.plausibility.lung_share,
        common_scale=is_common,
        sides_known=prepared.orientation_known,
        findings=tuple(
            FindingText(
                name=one.name, probability=scores.further[one.name], threshold=one.threshold
            )
            for one in contract.findings
        ),
        opacity_map=scores.label == NEGATIVE and cam is not None,
    )
    drawn = None if cam is None else content_of(cam, prepared.shape, contract.preprocess)
    return render_overlay(preview=prepared.preview, cam=drawn, text=text, side_by_side=side_by_side)


def _map_for(
    scores: Scores, assessment: Assessment, contract: ModelContract
) -> tuple[NDArray[np.float32] | None, bool]:
    """Return the map to draw, float32 (side, side), 0..1, and whether its scale is the model's."""
    if scores.label != NEGATIVE:
        index = contract.labels.index(COVID)
        cam, peaks, reference = scores.cam[index], scores.cam_peak, contract.map_reference
    else:
        # COVID's map under a negative answer would look like a lesion.
        opacity = contract.finding(OPACITY)
        is_opaque = Flag.OTHER_OPACITY in assessment.flags
        if not is_opaque or opacity is None or scores.further_cams is None:
            return None, False
        index = contract.findings.index(opacity)
        cam, peaks = scores.further_cams[index], scores.further_peaks
        reference = opacity.map_reference
    if peaks is None or reference is None:
        return cam, False
    return on_common_scale(cam, float(peaks[index]), reference), True


def _write_overlay(
    classified: Classified, assessment: Assessment, contract: ModelContract, context: Context
) -> tuple[Path, str]:
    """Draw and write a file's overlay; return its place and its SHA-256."""
    claim = classified.prepared.claim
    overlay = context.home.overlay_path(claim.sha256, claim.received_at, contract.id)
    make_dirs(overlay.parent)
    side_by_side = context.config.overlay_side_by_side
    picture = draw_result(classified, assessment, contract, side_by_side=side_by_side)
    encoded = encode_png(picture)
    write_atomic(overlay, encoded)
    return overlay, hashlib.sha256(encoded).hexdigest()


def redraw_overlay(classified: Classified, model: ModelInUse, context: Context) -> bool:
    """Draw the overlay of a result that is done again; the result's values stay.

    Returns
    -------
    bool
        False if the result says something else than the model now: it has no overlay then.

    Raises
    ------
    OSError
        If the overlay cannot be written.
    """
    scores, contract = classified.scores, model.classifier.contract
    assessment = assess(classified, contract)
    overlay, overlay_sha256 = _write_overlay(classified, assessment, contract, context)
    crashpoint("overlaid")
    is_kept = context.writer.call(
        lambda: context.store.restore_overlay(
            result_id=classified.prepared.claim.result_id,
            label=scores.label,
            probability=scores.probability,
            threshold=contract.decision.threshold,
            flags=assessment.flags,
            overlay=context.home.relative(overlay),
            overlay_sha256=overlay_sha256,
        )
    )
    if not is_kept:
        overlay.unlink(missing_ok=True)
    return is_kept


def record_result(classified: Classified, model: ModelInUse, context: Context) -> int:
    """Write a scored file's overlay, then its row; repeatable until the row is written.

    Returns
    -------
    int
        Milliseconds from the claim to the row.

    Raises
    ------
    OSError
        If the overlay cannot be written.
    """
    claim, scores = classified.prepared.claim, classified.scores
    home, contract, drift = context.home, model.classifier.contract, model.classifier.drift
    assessment = assess(classified, contract)
    overlay, overlay_sha256 = _write_overlay(classified, assessment, contract, context)
    crashpoint("overlaid")

    duration_ms, now = context.elapsed_ms(claim.started_s), context.clock.now()
    decision = contract.decision
    context.writer.call(
        lambda: context.store.record(
            result_id=claim.result_id,
            meta=classified.prepared.meta,
            label=scores.label,
            probability=scores.probability,
            logit=scores.logit,
            threshold=decision.threshold,
            uncertain=(decision.uncertain_low, decision.uncertain_high),
            findings=scores.findings,
            calibration=None if model.calibration is None else model.calibration.id,
            plausibility=assessment.plausibility,
            components=drift.components(scores.embedding) if drift else None,
            flags=assessment.flags,
            overlay=home.relative(overlay),
            overlay_sha256=overlay_sha256,
            duration_ms=duration_ms,
            now=now,
        )
    )
    crashpoint("recorded")
    return duration_ms

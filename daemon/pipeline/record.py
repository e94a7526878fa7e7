"""Recording of a scored file: flags and plausibility, overlay, and database row."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.comparison import DriftReference
from lungwatch.contract import COVID, NEGATIVE, OPACITY, ModelContract
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.overlay.render import encode_png, on_common_scale, render_overlay
from lungwatch.daemon.overlay.text import FindingText, OverlayText
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.records import Classified, Recorded, Scores
from lungwatch.daemon.retry import Clock
from lungwatch.daemon.stage import DatabaseWriter, crashpoint
from lungwatch.db.models import Plausibility
from lungwatch.db.results import Store
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
    """The remarks on one result.

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
    """Sum up what reading, the gate and the maps say of a scored picture."""
    scores = classified.scores
    flags = set(classified.prepared.flags)
    if not scores.cam[contract.labels.index(NEGATIVE if scores.label == NEGATIVE else COVID)].any():
        flags.add(Flag.EMPTY_MAP)
    if scores.label == NEGATIVE and _is_opaque(scores, contract):
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


def _is_opaque(scores: Scores, contract: ModelContract) -> bool:
    """Whether the model finds an opacity; False for a model that does not look for one."""
    opacity = contract.finding(OPACITY)
    return opacity is not None and opacity.is_present(scores.further[OPACITY])


def draw_result(
    classified: Classified, judged: Assessment, contract: ModelContract, *, side_by_side: bool
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
    shown = _map_for(scores, judged, contract)
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
class _ScaledMap:
    """A map, float32 (side, side), 0..1, and whether it is on the model's common scale."""

    cam: NDArray[np.float32]
    is_common: bool


def _map_for(scores: Scores, judged: Assessment, contract: ModelContract) -> _ScaledMap | None:
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
) -> _ScaledMap:
    if peaks is None or reference is None:
        return _ScaledMap(cam=cam, is_common=False)
    return _ScaledMap(cam=on_common_scale(cam, float(peaks[index]), reference), is_common=True)


class Recorder:
    """Writes overlay, row and file place, in the order that a crash can be taken up from.

    Parameters
    ----------
    contract
        With the probability and the decision that are in force.
    calibration
        The site calibration that they come from; None for the bundle's own.
    """

    def __init__(
        self,
        *,
        home: Home,
        store: Store,
        writer: DatabaseWriter,
        filing: Filing,
        clock: Clock,
        contract: ModelContract,
        calibration: str | None = None,
        drift: DriftReference | None = None,
        side_by_side: bool = True,
    ) -> None:
        self._home = home
        self._store = store
        self._writer = writer
        self._filing = filing
        self._clock = clock
        self._contract = contract
        self._calibration = calibration
        self._drift = drift
        self._side_by_side = side_by_side

    def record(self, classified: Classified) -> Recorded:
        """Write the overlay and the row; repeatable until the row is written.

        Raises
        ------
        OSError
            If the overlay cannot be written.
        """
        claim, scores = classified.prepared.claim, classified.scores
        decision = self._contract.decision
        judged = assess(classified, self._contract)
        components = self._drift.components(scores.embedding) if self._drift else None
        overlay = self._home.overlay_path(claim.sha256, claim.received_at, self._contract.id)
        make_dirs(overlay.parent)
        picture = draw_result(classified, judged, self._contract, side_by_side=self._side_by_side)
        write_atomic(overlay, encode_png(picture))
        crashpoint("overlaid")

        duration_ms = round((self._clock.monotonic() - claim.started_s) * 1000)
        now = self._clock.now()
        self._writer.call(
            lambda: self._store.record(
                result_id=claim.result_id,
                meta=classified.prepared.meta,
                label=scores.label,
                probability=scores.probability,
                logit=scores.logit,
                threshold=decision.threshold,
                uncertain=(decision.uncertain_low, decision.uncertain_high),
                findings=scores.findings,
                calibration=self._calibration,
                plausibility=judged.plausibility,
                components=components,
                flags=judged.flags,
                overlay=self._home.relative(overlay),
                duration_ms=duration_ms,
                now=now,
            )
        )
        crashpoint("recorded")
        return Recorded(
            claim=claim,
            label=scores.label,
            probability=scores.probability,
            duration_ms=duration_ms,
        )

    def file(self, recorded: Recorded) -> None:
        """Move a recorded file to its place and say so; repeatable until it is moved.

        Raises
        ------
        OSError
            If the file cannot be moved.
        """
        claim = recorded.claim
        self._filing.file(
            result_id=claim.result_id,
            sha256=claim.sha256,
            received_at=claim.received_at,
            path=claim.path,
        )
        event(
            "filed",
            claim.sha256,
            label=recorded.label,
            probability=recorded.probability,
            duration_ms=recorded.duration_ms,
        )

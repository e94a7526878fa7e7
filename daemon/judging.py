"""Plausibility and flags of a scored picture, from gate, lungs and map."""

from dataclasses import dataclass

from lungwatch.contract import COVID, NEGATIVE, ModelContract
from lungwatch.daemon.records import Classified
from lungwatch.flags import Flag, in_order
from lungwatch.lungfield import LEAST_SHARE_INSIDE, area_of, is_partial, lung_mask, share_inside
from lungwatch.plausibility import Plausibility
from lungwatch.preprocess import content_of


@dataclass(frozen=True, kw_only=True)
class Judged:
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


def judge(classified: Classified, contract: ModelContract) -> Judged:
    """Sum up what reading, the gate and the maps say of a scored picture."""
    scores = classified.scores
    flags = set(classified.prepared.flags)
    if not scores.cam[contract.labels.index(NEGATIVE if scores.label == NEGATIVE else COVID)].any():
        flags.add(Flag.EMPTY_MAP)
    gate, answer = contract.gate, classified.gate
    if gate is None or answer is None:
        return Judged(plausibility=Plausibility(), flags=in_order({*flags, Flag.NOT_GATED}))
    if answer.verdict.flag is not None:
        flags.add(answer.verdict.flag)
    shape = classified.prepared.shape
    mask = lung_mask(answer.lungs, shape, gate.preprocess)
    if is_partial(mask, gate.lung_area):
        flags.add(Flag.PARTIAL_LUNGS)
    cam = content_of(scores.cam[contract.labels.index(COVID)], shape, contract.preprocess)
    share = share_inside(cam, mask.astype("float32"))
    if share is not None and share < LEAST_SHARE_INSIDE and scores.label != NEGATIVE:
        flags.add(Flag.ATTENTION_OUTSIDE_LUNGS)
    found = Plausibility(gate_score=answer.verdict.score, lung_area=area_of(mask), lung_share=share)
    return Judged(plausibility=found, flags=in_order(flags))

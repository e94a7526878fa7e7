"""Release gate: everything that a model has to show before it ships, in one table.

Each figure stands with its interval and its bound, and beside what can be had without looking at
the lungs. A check that could not be made is named with the reason; the gate is passed when no
check fails and every criterion was measured at least once.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import LungwatchError, MissingExtraError
from lungwatch.training.bootstrap import Bootstrap
from lungwatch.training.gate_rates import AS_IS, VARIANTS, Gate, image_files, look_at, rates
from lungwatch.training.lesions import measure_lesions
from lungwatch.training.randomised import compare_randomised
from lungwatch.training.release_answers import ask, count_images
from lungwatch.training.release_checks import check_set, wilson
from lungwatch.training.release_criteria import Check, Criteria, Verdict, overall
from lungwatch.training.samples import Sample, Split
from lungwatch.training.scorers import Scorer

RELEASE_GATE_VERSION = 1
_ROC_AUC = "ROC-AUC"
# What of `measure_lesions` answers which criterion.
_LESIONS = {
    "peak_on_lesion": "peak_on_lesion",
    "peak_above_random": "peak_above_random_point",
    "peak_above_other_map": "peak_above_other_map",
    "map_on_lesion": "map_on_lesion",
    "likeness_of_maps": "likeness_of_maps",
}
_SHUFFLED = {"map_shuffled_head": "head", "map_shuffled_all": "all"}
_GATE = ("gate_keeps", "gate_refuses_altered", "gate_refuses_other")

Tables = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """What the gate measures on.

    Attributes
    ----------
    data, split
        Data sets that the model did not learn from, and the part of each; None for all of it.
    lesion_masks
        Folder with drawn opacities; None for none.
    left_out
        Figures of networks that were trained without a source, as tables: title, row, column.
    refuse
        Folders of pictures that are no frontal chest X-ray.
    criteria
        What is required.
    bootstrap
        How the intervals are made.
    """

    data: Sequence[Path]
    split: Split | None = "test"
    lesion_masks: Path | None = None
    left_out: Tables = field(default_factory=dict)
    refuse: Sequence[Path] = ()
    criteria: Criteria = field(default_factory=Criteria)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)


@dataclass(frozen=True, kw_only=True)
class ReleaseResult:
    """What a model shows.

    Attributes
    ----------
    model, model_sha256
        Its name, and the digest of its files.
    data
        Names of the data sets, with the split.
    checks
        Every check, in the order of the criteria.
    lesions, shuffled
        All that was measured on drawn opacities and of shuffled weights; empty if nothing was.
    """

    model: str
    model_sha256: str
    data: tuple[str, ...]
    checks: tuple[Check, ...]
    lesions: dict[str, Any] = field(default_factory=dict)
    shuffled: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the gate is passed; "not_measured" if nothing fails but something is missing."""
        return overall(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and for a contract's metrics."""
        counts = Counter(check.verdict for check in self.checks)
        return {
            "release_gate": RELEASE_GATE_VERSION,
            "note": RESEARCH_USE_ONLY,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "data": list(self.data),
            "verdict": self.verdict,
            "counts": {name: counts[name] for name in ("pass", "fail", "not_measured")},
            "checks": [check.to_dict() for check in self.checks],
            "lesions": self.lesions,
            "shuffled": self.shuffled,
        }


def run_release_gate(
    scorer: Scorer,
    request: ReleaseRequest,
    *,
    model_sha256: str,
    gate: Gate | None = None,
    on_total: Callable[[int], Callable[[int], None]] | None = None,
) -> ReleaseResult:
    """Measure everything that the gate asks for.

    Parameters
    ----------
    scorer
        The model.
    request
        What it is measured on.
    model_sha256
        Digest of the model's files; see `lungwatch.training.score_cache.model_digest`.
    gate
        The bundle's content gate, which also finds the lungs; None if there is none.
    on_total
        Told the number of images before the first is read; returns what is told of each.

    Raises
    ------
    DatasetError
        If data cannot be used.
    ModelError
        If the model answers with what is no number.
    MissingExtraError
        If scikit-learn is not installed.
    """
    criteria, bootstrap = request.criteria, request.bootstrap
    total = sum(count_images(location, request.split) for location in request.data)
    progress = on_total(total) if on_total else None
    checks: list[Check] = []
    samples: list[Sample] = []
    for location in request.data:
        answers = ask(
            scorer, location, request.split, gate=gate, seed=bootstrap.seed, progress=progress
        )
        checks += check_set(answers, criteria, bootstrap)
        samples += answers.samples
        del answers
    checks += check_left_out(request.left_out, criteria)
    lesions, shuffled, found = _lesions(scorer, request)
    checks += found
    checks += _content_gate(gate, samples, request)
    order = [criterion.name for criterion in criteria.all]
    checks.sort(key=lambda check: order.index(check.criterion.name))
    return ReleaseResult(
        model=scorer.judgement.name,
        model_sha256=model_sha256,
        data=tuple(
            f"{location.resolve().name}/{request.split or 'all'}" for location in request.data
        ),
        checks=tuple(checks),
        lesions=lesions,
        shuffled=shuffled,
    )


def check_left_out(tables: Tables, criteria: Criteria) -> Iterator[Check]:
    """Hold figures of sources left out of training to their bounds.

    Tables whose title says "left out" are taken, and of them rows with a column "ROC-AUC": a row
    that names NORMAL is the external figure, one that says "itself" the figure within the source;
    other rows stand beside. Columns "low" and "high" are the interval, if there are any.
    """
    seen = set()
    for title, rows in tables.items():
        figures = {row: cells for row, cells in rows.items() if _ROC_AUC in cells}
        if "left out" not in title or not figures:
            continue
        source = title.split(" left out")[0]
        beside = {row: cells[_ROC_AUC] for row, cells in figures.items()}
        for row, cells in figures.items():
            within = "itself" in row and "NORMAL" not in row
            if not within and "NORMAL" not in row:
                continue
            name = "left_out_within" if within else "left_out_auc"
            ends = (cells["low"], cells["high"]) if {"low", "high"} <= set(cells) else None
            others = {other: value for other, value in beside.items() if other != row}
            seen.add(name)
            yield criteria.judge(name, source, cells[_ROC_AUC], ends, beside=others)
    for name in ("left_out_auc", "left_out_within"):
        if name not in seen:
            yield criteria.skip(name, "all", "no figures of a source left out are given")


def check_lesions(
    found: dict[str, Any], shuffled: dict[str, Any] | str, criteria: Criteria
) -> Iterator[Check]:
    """Hold what was measured on drawn opacities to its bounds.

    Parameters
    ----------
    found
        Of `lungwatch.training.lesions.measure_lesions`.
    shuffled
        Of `lungwatch.training.randomised.compare_randomised`, or why there is nothing.
    """
    on, cases = found["data"], found["images"] - found["without_map"]
    beside = {
        name: found[name]
        for name in ("random_point_of_lungs", "other_map_peak", "other_map_share")
        if found[name] is not None
    }
    for name, key in _LESIONS.items():
        yield criteria.judge(
            name, on, found[key], found["intervals"].get(key), cases=cases, beside=beside
        )
    for name, depth in _SHUFFLED.items():
        if isinstance(shuffled, str):
            yield criteria.skip(name, on, shuffled)
            continue
        table = shuffled[depth]
        similar = {} if table["similarity"] is None else {"SSIM": table["similarity"]}
        yield criteria.judge(
            name,
            on,
            table["correlation"],
            table["intervals"].get("correlation"),
            cases=table["images"],
            beside=similar,
        )


def _lesions(
    scorer: Scorer, request: ReleaseRequest
) -> tuple[dict[str, Any], dict[str, Any], list[Check]]:
    criteria, names = request.criteria, [*_LESIONS, *_SHUFFLED]
    if request.lesion_masks is None:
        reason = "no drawn opacities are given"
        return {}, {}, [criteria.skip(name, "all", reason) for name in names]
    found, maps, images = measure_lesions(scorer, request.lesion_masks, request.bootstrap)
    shuffled: dict[str, Any] = {}
    reason = ""
    try:
        pixels = np.stack([image.pixels for image in images])
        shuffled = compare_randomised(scorer, pixels, maps, request.bootstrap)
    except MissingExtraError:
        raise
    except LungwatchError as error:
        reason = str(error)
    checks = list(check_lesions(found, reason or shuffled, criteria))
    return found, shuffled, checks


def _content_gate(
    gate: Gate | None, samples: Sequence[Sample], request: ReleaseRequest
) -> Iterator[Check]:
    criteria = request.criteria
    if gate is None:
        yield from (criteria.skip(name, "all", "no content gate") for name in _GATE)
        return
    paths = [sample.path.absolute() for sample in samples]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    looked = look_at(gate, root, paths, variants=tuple(VARIANTS))
    for variant in VARIANTS:
        kept = [one.reason is None for one in looked if one.variant == variant]
        if variant == AS_IS:
            yield _share(criteria, "gate_keeps", "all images", sum(kept), len(kept))
        elif kept:
            refused = len(kept) - sum(kept)
            yield _share(criteria, "gate_refuses_altered", variant, refused, len(kept))
    for folder in request.refuse:
        # Of more than one folder, the last rate is of all together.
        *_, rate = rates(look_at(gate, folder, image_files(folder)))
        refused = rate.pictures - rate.kept
        name = folder.resolve().name
        yield _share(criteria, "gate_refuses_other", name, refused, rate.pictures)
    if not request.refuse:
        yield criteria.skip("gate_refuses_other", "all", "no such pictures are given")


def _share(criteria: Criteria, name: str, on: str, hits: int, cases: int) -> Check:
    beside = {"pictures": float(cases)}
    return criteria.judge(name, on, hits / cases, wilson(hits, cases), cases=cases, beside=beside)

"""Release gate: every check of a model before it ships, in one table.

Each figure stands with its interval and its bound, and beside the same figure without the lungs.
A check that could not be made is named with the reason; the gate is passed when no check fails
and every criterion was measured at least once.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import ConfigError, LungwatchError, MissingExtraError
from lungwatch.training.data.check import cross_validate, features_of
from lungwatch.training.data.dataset import Sample, Split
from lungwatch.training.evaluation.gate_rates import (
    AS_IS,
    VARIANTS,
    Gate,
    gate_outcomes,
    image_files,
    rates,
)
from lungwatch.training.evaluation.maps import compare_randomised, measure_lesions
from lungwatch.training.evaluation.metrics import (
    Bootstrap,
    area_interval,
    figures,
    intervals,
    mean_interval,
    roc_auc,
)
from lungwatch.training.evaluation.release_data import (
    Answers,
    Criteria,
    CriterionCheck,
    Verdict,
    collect_answers,
    count_images,
    overall,
)
from lungwatch.training.evaluation.scorers import Scorer
from lungwatch.training.fitting.run import RunFolder

_ROWS = {
    "COVID vs NORMAL": "against NORMAL",
    "COVID vs OTHER_PNEUMONIA": "against other pneumonias",
}
_NORMAL, _COVID, _OTHER = "NORMAL", "COVID", "OTHER_PNEUMONIA"
_Z = 1.959964
_Mask = NDArray[np.bool_]
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


def read_left_out_run(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Read what `lungwatch train guided --leave-out SOURCE` measured on the source left out.

    Returns
    -------
    dict
        Title -> row -> column -> number; see `lungwatch.export.card`.

    Raises
    ------
    ConfigError
        If the folder is no such run.
    """
    run = RunFolder(root=folder)
    if not (folder / "metrics.json").is_file() or not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no finished run: it has no metrics.json")
    measured = run.read("metrics.json").get("left_out")
    source = run.read("config.json").get("data", {}).get("left_out")
    if not measured or not source:
        raise ConfigError(f"{folder} was not trained without a source (--leave-out)")
    rows = {}
    for probe, found in measured["probes"].items():
        if probe in _ROWS:
            rows[_ROWS[probe]] = {"ROC-AUC": float(found["roc_auc"])}
        elif probe == f"COVID vs OTHER_PNEUMONIA within {source}":
            rows[f"against other pneumonias of {source} itself"] = {
                "ROC-AUC": float(found["roc_auc"])
            }
    if not rows:
        raise ConfigError(f"{folder}: nothing of COVID was measured on {source}")
    return {f"{source} left out of training": rows}


def check_set(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> list[CriterionCheck]:
    """Make all checks that one data set allows."""
    steps: tuple[Callable[[Answers, Criteria, Bootstrap], Iterator[CriterionCheck]], ...] = (
        check_discrimination,
        check_calls,
        check_lungs,
        check_embedding,
        check_calibration,
        check_changes,
    )
    return [check for step in steps for check in step(answers, criteria, bootstrap)]


def check_discrimination(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """ROC-AUC over all images, adults, each source and each view, beside the confounds'."""
    everything = np.ones(len(answers.samples), dtype=np.bool_)
    parts: list[tuple[str, str, _Mask]] = [("auc", answers.name, everything)]
    adults = _adults(answers)
    if not adults.all():
        parts.append(("auc", f"{answers.name}, adults", adults))
    sources = answers.sources
    within = [
        ("within_source", f"{answers.name}, {source}", sources == source)
        for source in sorted(set(sources.tolist()) - {""})
        if 0 < answers.positive[sources == source].sum() < (sources == source).sum()
    ]
    views = np.array(answers.views, dtype=np.str_)
    within += [
        ("within_view", f"{answers.name}, {view}", views == view)
        for view in ("AP", "PA")
        if (views == view).any()
    ]
    for name, on, inside in parts + within:
        fewer = _fewer(answers.positive[inside])
        if fewer < criteria[name].fewest:
            yield criteria.judge(name, on, None, cases=fewer)
            continue
        target, scores = answers.positive[inside], answers.logits[inside]
        area = roc_auc(target, scores)
        around = area_interval(target, scores, bootstrap)
        beside = told_without_lungs(answers, inside, bootstrap.seed)
        yield criteria.judge(name, on, area, around, cases=fewer, beside=beside)
        best = max(beside.values(), default=None)
        if best is None:
            yield criteria.skip("above_confounds", on, "too few patients to cross-validate")
            continue
        above = [end - best for end in around] if around else None
        yield criteria.judge("above_confounds", on, area - best, above, cases=fewer, beside=beside)
    for name in ("within_source", "within_view"):
        if not any(part[0] == name for part in within):
            what = "source with both classes" if name == "within_source" else "view is known"
            yield criteria.skip(name, answers.name, f"no {what}")


def told_without_lungs(answers: Answers, inside: _Mask, seed: int) -> dict[str, float]:
    """Return the ROC-AUC, 0.5..1, of size, border, histogram and view alone for COVID.

    By a cross-validated logistic regression that keeps patients together; the view as it is,
    among the images whose view is known.
    """
    chosen = np.flatnonzero(inside)
    positive, groups = answers.positive[chosen], answers.groups[chosen]
    found = {}
    for name, columns in features_of([answers.scans[int(index)] for index in chosen]).items():
        areas = cross_validate(columns, positive, groups, seed)
        if areas:
            found[name] = round(max(0.5, float(np.mean(areas))), 6)
    views = np.array(answers.views, dtype=np.str_)[chosen]
    known = views != ""
    if known.any() and 0 < positive[known].sum() < known.sum():
        area = roc_auc(positive[known], views[known] == "AP")
        found["view"] = round(max(area, 1.0 - area), 6)
    return found


def check_calls(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """Shares of adults with each finding that are called COVID."""
    del bootstrap
    threshold = answers.judgement.decision.threshold
    called = answers.probabilities(answers.logits) >= threshold
    adults = _adults(answers)
    on = answers.name if answers.adults is None else f"{answers.name}, adults"
    for name, finding in (
        ("sensitivity", _COVID),
        ("normal_called", _NORMAL),
        ("other_called", _OTHER),
    ):
        inside = adults & (answers.findings == finding)
        if not inside.any():
            yield criteria.skip(name, on, f"no images of {finding}")
            continue
        yield _share(criteria, name, on, int(called[inside].sum()), int(inside.sum()))


def check_lungs(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """ROC-AUC with the lungs blacked out, and with nothing but the lungs."""
    for name, logits in (("lungs_blacked_out", answers.black), ("lungs_alone", answers.alone)):
        if logits is None:
            yield criteria.skip(name, answers.name, "nothing finds lungs: no content gate")
            continue
        found = ~np.isnan(logits)
        target = answers.positive[found]
        fewer = _fewer(target)
        if fewer < criteria[name].fewest:
            yield criteria.judge(name, answers.name, None, cases=fewer)
            continue
        area = roc_auc(target, logits[found])
        around = area_interval(target, logits[found], bootstrap)
        if name == "lungs_blacked_out" and area < 0.5:
            # A score that is reliably wrong carries as much information as one that is right.
            area, around = 1.0 - area, [1.0 - around[1], 1.0 - around[0]] if around else None
        beside = {
            "images with lungs found": float(found.mean()),
            "ROC-AUC as it is": roc_auc(target, answers.logits[found]),
        }
        yield criteria.judge(name, answers.name, area, around, cases=fewer, beside=beside)


def check_embedding(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """ROC-AUC of source and view predicted from the embedding, among images of one class."""
    if answers.embeddings is None:
        for name in ("source_in_embedding", "view_in_embedding"):
            yield criteria.skip(name, answers.name, "the model gives no embedding")
        return
    views = np.array(answers.views, dtype=np.str_)
    for name, words in (("source_in_embedding", answers.sources), ("view_in_embedding", views)):
        checks = [
            _embedded(answers, criteria, (name, words), finding, bootstrap.seed)
            for finding in sorted(set(answers.findings.tolist()))
        ]
        found = [check for check in checks if check is not None]
        yield from found
        if not found:
            fewest = criteria[name].fewest
            what = f"too few: no finding with two of {fewest} images or more"
            yield criteria.skip(name, answers.name, what)


def _embedded(
    answers: Answers,
    criteria: Criteria,
    words: tuple[str, NDArray[np.str_]],
    finding: str,
    seed: int,
) -> CriterionCheck | None:
    name, words_of = words
    assert answers.embeddings is not None
    inside = answers.findings == finding
    kinds, counts = np.unique(words_of[inside & (words_of != "")], return_counts=True)
    kinds = kinds[counts >= criteria[name].fewest]
    if len(kinds) < 2:
        return None
    chosen = np.flatnonzero(inside & np.isin(words_of, kinds))
    columns, groups = answers.embeddings[chosen], answers.groups[chosen]
    by_kind = {
        str(kind): cross_validate(columns, words_of[chosen] == kind, groups, seed)
        # Of two kinds, one against the other is the other against the one.
        for kind in (kinds if len(kinds) > 2 else kinds[:1])
    }
    areas = [area for found in by_kind.values() for area in found]
    on = f"{answers.name}, {finding}"
    if not areas:
        return criteria.skip(name, on, "too few patients to cross-validate")
    mean, error = float(np.mean(areas)), float(np.std(areas)) / np.sqrt(len(areas))
    around = [max(0.0, mean - _Z * error), min(1.0, mean + _Z * error)]
    beside = {kind: round(float(np.mean(found)), 6) for kind, found in by_kind.items() if found}
    cases = int(min(counts[counts >= criteria[name].fewest]))
    return criteria.judge(name, on, mean, around, cases=cases, beside=beside)


def check_calibration(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """Calibration error over all images, and within each source that has both classes."""
    probabilities = answers.probabilities(answers.logits)
    sources = answers.sources
    everything = np.ones(len(sources), dtype=np.bool_)
    parts = [(answers.name, everything)]
    parts += [
        (f"{answers.name}, {source}", sources == source)
        for source in sorted(set(sources.tolist()) - {""})
    ]
    for on, inside in parts:
        target, p = answers.positive[inside], probabilities[inside]
        if not _fewer(target):
            yield criteria.skip("calibration", on, "one class only")
            continue
        threshold = answers.judgement.decision.threshold
        error = figures(target, p, threshold).ece
        around = intervals(target, p, threshold, bootstrap).get("ece")
        beside = {"mean probability": float(p.mean()), "share of COVID": float(target.mean())}
        yield criteria.judge(
            "calibration", on, error, around, cases=int(inside.sum()), beside=beside
        )


def check_changes(
    answers: Answers, criteria: Criteria, bootstrap: Bootstrap
) -> Iterator[CriterionCheck]:
    """Decisions and scores after changes that leave the finding as it is."""
    before = answers.probabilities(answers.logits)
    threshold = answers.judgement.decision.threshold
    for change, (indices, logits) in answers.changed.items():
        on = f"{answers.name}, {change}"
        after = answers.probabilities(logits)
        flipped = (after >= threshold) != (before[indices] >= threshold)
        yield _share(criteria, "decisions_flipped", on, int(flipped.sum()), len(flipped))
        moved = np.abs(after - before[indices])
        around = None
        if bootstrap.resamples and len(moved):
            rng = np.random.default_rng(bootstrap.seed)
            around = mean_interval(moved, rng, bootstrap.resamples)
        beside = {"mean change with its sign": float((after - before[indices]).mean())}
        yield criteria.judge(
            "score_shift", on, float(moved.mean()), around, cases=len(moved), beside=beside
        )


def wilson(hits: int, cases: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent cases.

    Source: Wilson 1927.
    """
    share = hits / cases
    middle = (share + _Z**2 / (2 * cases)) / (1 + _Z**2 / cases)
    half = _Z * np.sqrt(share * (1 - share) / cases + _Z**2 / (4 * cases**2)) / (1 + _Z**2 / cases)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _share(
    criteria: Criteria, name: str, on: str, hits: int, cases: int, *, unit: str = "cases"
) -> CriterionCheck:
    beside = {unit: float(cases)}
    return criteria.judge(name, on, hits / cases, wilson(hits, cases), cases=cases, beside=beside)


def _adults(answers: Answers) -> _Mask:
    if answers.adults is None:
        return np.ones(len(answers.samples), dtype=np.bool_)
    return np.array(answers.adults, dtype=np.bool_)


def _fewer(positive: _Mask) -> int:
    return int(min(positive.sum(), (~positive).sum()))


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """Request of the release gate: data, criteria, intervals.

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
    """Result of the release gate.

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
    checks: tuple[CriterionCheck, ...]
    lesions: dict[str, Any] = field(default_factory=dict)
    shuffled: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Overall verdict; "not_measured" if nothing fails but a criterion was not measured."""
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
    """Measure every criterion of the gate.

    Parameters
    ----------
    scorer
        The model.
    request
        What it is measured on.
    model_sha256
        Digest of the model's files; see `scorers.model_digest`.
    gate
        The bundle's content gate, which also finds the lungs; None if there is none.
    on_total
        Called with the number of images before the first is read; returns the progress callback.

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
    checks: list[CriterionCheck] = []
    samples: list[Sample] = []
    for location in request.data:
        answers = collect_answers(
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


def check_left_out(tables: Tables, criteria: Criteria) -> Iterator[CriterionCheck]:
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
) -> Iterator[CriterionCheck]:
    """Hold what was measured on drawn opacities to its bounds.

    Parameters
    ----------
    found
        Of `maps.measure_lesions`.
    shuffled
        Of `maps.compare_randomised`, or why there is nothing.
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
) -> tuple[dict[str, Any], dict[str, Any], list[CriterionCheck]]:
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
) -> Iterator[CriterionCheck]:
    criteria = request.criteria
    if gate is None:
        yield from (criteria.skip(name, "all", "no content gate") for name in _GATE)
        return
    paths = [sample.path.absolute() for sample in samples]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    outcomes = gate_outcomes(gate, root, paths, variants=tuple(VARIANTS))
    for variant in VARIANTS:
        kept = [one.reason is None for one in outcomes if one.variant == variant]
        if variant == AS_IS:
            yield _share(
                criteria, "gate_keeps", "all images", sum(kept), len(kept), unit="pictures"
            )
        elif kept:
            refused = len(kept) - sum(kept)
            yield _share(
                criteria, "gate_refuses_altered", variant, refused, len(kept), unit="pictures"
            )
    for folder in request.refuse:
        # Of more than one folder, the last rate is of all together.
        *_, rate = rates(gate_outcomes(gate, folder, image_files(folder)))
        refused = rate.pictures - rate.kept
        name = folder.resolve().name
        yield _share(criteria, "gate_refuses_other", name, refused, rate.pictures, unit="pictures")
    if not request.refuse:
        yield criteria.skip("gate_refuses_other", "all", "no such pictures are given")

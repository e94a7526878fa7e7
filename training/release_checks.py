"""Checks of the release gate on one data set: figures from a model's answers, held to bounds."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.bootstrap import Bootstrap, area_interval, interval, intervals
from lungwatch.training.confounds import cross_validate, features_of
from lungwatch.training.metrics import expected_calibration_error, roc_auc
from lungwatch.training.release_answers import Answers
from lungwatch.training.release_criteria import Check, Criteria

_NORMAL, _COVID, _OTHER = "NORMAL", "COVID", "OTHER_PNEUMONIA"
_Z = 1.959964
_Mask = NDArray[np.bool_]


def check_set(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> list[Check]:
    """Make all checks that one data set allows."""
    steps: tuple[Callable[[Answers, Criteria, Bootstrap], Iterator[Check]], ...] = (
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
) -> Iterator[Check]:
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
        around = area_interval(target, scores, bootstrap) if bootstrap.resamples else None
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
    """Return how well size, border, histogram and view alone tell COVID, ROC-AUC, 0.5..1.

    By a cross-validated logistic regression that keeps patients together; the view as it is,
    among the images whose view is known.
    """
    chosen = np.flatnonzero(inside)
    positive, groups = answers.positive[chosen], answers.groups[chosen]
    found = {}
    for name, columns in features_of([answers.looks[int(index)] for index in chosen]).items():
        areas = cross_validate(columns, positive, groups, seed)
        if areas:
            found[name] = round(max(0.5, float(np.mean(areas))), 6)
    views = np.array(answers.views, dtype=np.str_)[chosen]
    known = views != ""
    if known.any() and 0 < positive[known].sum() < known.sum():
        area = roc_auc(positive[known], views[known] == "AP")
        found["view"] = round(max(area, 1.0 - area), 6)
    return found


def check_calls(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> Iterator[Check]:
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
        yield _rate(criteria, name, on, int(called[inside].sum()), int(inside.sum()))


def check_lungs(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> Iterator[Check]:
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
        around = area_interval(target, logits[found], bootstrap) if bootstrap.resamples else None
        if name == "lungs_blacked_out" and area < 0.5:
            # A score that is reliably wrong knows as much as one that is reliably right.
            area, around = 1.0 - area, [1.0 - around[1], 1.0 - around[0]] if around else None
        beside = {
            "images with lungs found": float(found.mean()),
            "ROC-AUC as it is": roc_auc(target, answers.logits[found]),
        }
        yield criteria.judge(name, answers.name, area, around, cases=fewer, beside=beside)


def check_embedding(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> Iterator[Check]:
    """How well source and view are told from the embedding, among images of one finding."""
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
) -> Check | None:
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
) -> Iterator[Check]:
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
        error = expected_calibration_error(target, p)
        threshold = answers.judgement.decision.threshold
        around = intervals(target, p, threshold, bootstrap)["ece"] if bootstrap.resamples else None
        beside = {"mean probability": float(p.mean()), "share of COVID": float(target.mean())}
        yield criteria.judge(
            "calibration", on, error, around, cases=int(inside.sum()), beside=beside
        )


def check_changes(answers: Answers, criteria: Criteria, bootstrap: Bootstrap) -> Iterator[Check]:
    """Decisions and scores after changes that leave the finding as it is."""
    before = answers.probabilities(answers.logits)
    threshold = answers.judgement.decision.threshold
    for change, (indices, logits) in answers.changed.items():
        on = f"{answers.name}, {change}"
        after = answers.probabilities(logits)
        flipped = (after >= threshold) != (before[indices] >= threshold)
        yield _rate(criteria, "decisions_flipped", on, int(flipped.sum()), len(flipped))
        moved = np.abs(after - before[indices])
        around = None
        if bootstrap.resamples and len(moved):
            draws = np.random.default_rng(bootstrap.seed).integers(
                0, len(moved), (bootstrap.resamples, len(moved))
            )
            around = interval(moved[draws].mean(axis=1))
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


def _rate(criteria: Criteria, name: str, on: str, hits: int, cases: int) -> Check:
    beside = {"cases": float(cases)}
    return criteria.judge(name, on, hits / cases, wilson(hits, cases), cases=cases, beside=beside)


def _adults(answers: Answers) -> _Mask:
    if answers.adults is None:
        return np.ones(len(answers.samples), dtype=np.bool_)
    return np.array(answers.adults, dtype=np.bool_)


def _fewer(positive: _Mask) -> int:
    return int(min(positive.sum(), (~positive).sum()))

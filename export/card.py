"""Model card of a bundle, and the tables that it takes from elsewhere.

The text is in `templates/`; the figures come from the contract, from tables measured elsewhere,
and from the release gate.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import OPACITY, ModelContract
from lungwatch.errors import ConfigError
from lungwatch.training.evaluation.gate_rates import FAMILIAR, FRONTAL, LUNGS, POLARITY, UPRIGHT
from lungwatch.training.evaluation.metrics import FEWEST
from lungwatch.training.evaluation.release_data import read_json
from lungwatch.training.evaluation.release_gate import RELEASE_GATE_VERSION
from lungwatch.training.evaluation.report import template_environment

# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
FIGURES = "figures"
# Title of a table -> row -> column -> number.
FigureTables: TypeAlias = dict[str, dict[str, dict[str, float]]]
_GATE_QUESTIONS = {
    FRONTAL: "is it a frontal chest X-ray, however it lies?",
    UPRIGHT: "is it upright? (else turned by 90°, 180° or 270°)",
    POLARITY: "is air dark? (else the grey values are inverted)",
    LUNGS: "is enough of the picture lung? (0.5 stands for 5 %)",
    FAMILIAR: "is it near the X-rays that the gate learnt from? (0.5 stands for the largest "
    "distance that passes)",
}
# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
RELEASE_GATE = "release_gate"
_VERDICTS = {
    "pass": "The gate is passed: no check fails, and every requirement was measured.",
    "fail": "**The gate is not passed.** What fails is a reason to distrust the model there.",
    "not_measured": "**The gate is not passed**: nothing fails, but something was not measured.",
}
_KEYS = ("name", "title", "on", "value", "interval", "bound", "at_least", "judged", "verdict")
_RULES = {"youden": "Youden", "balanced": "largest smaller one of sensitivity and specificity"}
_GUIDES = {
    "exchange_histograms": "Histograms exchanged between sources: share of images",
    "group_robust": "Groups of finding and source weighed by their loss (group DRO): step",
    "domain_adversarial": "Domain-adversarial training: weight",
}
_FIGURES = {
    "ROC-AUC": "roc_auc",
    "PR-AUC": "pr_auc",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "F1": "f1",
    "ECE": "ece",
    "Brier": "brier",
    "uncertain": "uncertain",
}


def read_figures(file: Path) -> FigureTables:
    """Read tables from JSON: {"title": {"row": {"column": number}}}.

    Raises
    ------
    ConfigError
        If it is unreadable, or not of that form.
    """
    return check_figures(read_json(file), str(file))


def check_figures(values: object, where: str) -> FigureTables:
    """Make sure that values are tables of numbers.

    Raises
    ------
    ConfigError
        If they are not; the message names the place within `where`.
    """
    return {
        title: {
            row: {column: _number(cell, at) for column, cell, at in _items(cells, in_row)}
            for row, cells, in_row in _items(rows, in_table)
        }
        for title, rows, in_table in _items(values, where)
    }


def of_data_sets(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured on data sets at the export, without what comes from elsewhere."""
    # The names of data sets hold a "/"; tables and the release gate have one of their own.
    return {name: found for name, found in metrics.items() if "/" in name}


def _items(values: object, where: str) -> list[tuple[str, Any, str]]:
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f'{where} holds no tables of the form {{"title": {{"row": {{"column": number}}}}}}'
        )
    for name in values:
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{where}: {name!r} is no name for a table, row or column")
    return [(name, value, f"{where}: {name}") for name, value in values.items()]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}, not a number")
    return value


def read_release_gate(file: Path) -> dict[str, Any]:
    """Read what `lungwatch evaluate --gate` wrote, as it goes into a contract's metrics.

    Of each check its reason, its value, interval, bound and verdict and the figures beside it are
    kept; why the bound is where it is stands in `docs/release-gate.md`.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds something else.
    """
    values = read_json(file)
    if not isinstance(values, dict) or values.get("release_gate") != RELEASE_GATE_VERSION:
        raise ConfigError(
            f"{file} is no release gate of this version: make it with `lungwatch evaluate --gate`"
        )
    try:
        checks = [_check(check) for check in values["checks"]]
        told = {key: values[key] for key in ("model", "model_sha256", "data", "verdict", "counts")}
        _require_verdict(told["verdict"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is no complete release gate: {error}") from error
    return {"release_gate": RELEASE_GATE_VERSION, **told, "checks": checks}


def require_same_model(result: Mapping[str, Any], model_sha256: str, where: str) -> None:
    """Make sure that a release gate was measured on this model.

    Parameters
    ----------
    result
        Of `read_release_gate`.
    model_sha256
        Of `lungwatch.training.evaluation.scorers.model_digest`.
    where
        What the message calls the model.

    Raises
    ------
    ConfigError
        If it was another.
    """
    if result["model_sha256"] != model_sha256:
        raise ConfigError(
            f"the release gate was measured on {result['model']}, whose files are not those of "
            f"{where}: run `lungwatch evaluate {where} … --gate` again"
        )


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: check[key] for key in _KEYS}
    _require_verdict(found["verdict"])
    numbers = [found["bound"], *(found["interval"] or ()), *check["beside"].values()]
    if found["value"] is not None:
        numbers.append(found["value"])
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{found['name']} holds what is no number")
    beside = {name: round(float(value), 4) for name, value in check["beside"].items()}
    return {**found, "reason": check["reason"], "beside": beside}


def _require_verdict(word: object) -> None:
    if word not in _VERDICTS:
        raise ValueError(f"verdict {word!r} is none")


def write_card(contract: ModelContract, notes: str = "") -> str:
    """Write the card in Markdown, from the contract alone and notes on the data.

    The text is in `templates/card.md.j2`.

    Source: Mitchell et al. 2019, Model Cards for Model Reporting.
    """
    environment = template_environment(__package__, html=False)
    environment.filters |= {"oneline": _one_line, "escape_pipe": _escape_pipe}
    measured, about = of_data_sets(contract.metrics), contract.provenance
    return environment.get_template("card.md.j2").render(
        contract=contract,
        notice=RESEARCH_USE_ONLY,
        measured=measured,
        columns=_FIGURES,
        intervals={name: one for name, one in measured.items() if one.get("intervals")},
        fewest=FEWEST,
        findings=[
            (name, finding, found)
            for name, one in measured.items()
            for finding, found in one.get("findings", {}).items()
        ],
        finding_columns={name: key for name, key in _FIGURES.items() if key != "uncertain"},
        opacity=OPACITY,
        tables=contract.metrics.get(FIGURES),
        release=contract.metrics.get(RELEASE_GATE),
        verdicts=_VERDICTS,
        gate_questions=_GATE_QUESTIONS,
        rule=_RULES[about.get("threshold_rule", "youden")],
        notes=notes.strip(),
        phases=_phases(about) if "phase" in about else (),
        guides=_GUIDES,
        kept=_kept(about) if "fit" in about else "",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escape_pipe(text: str) -> str:
    return _one_line(text).replace("|", r"\|")


def _kept(provenance: Mapping[str, Any]) -> str:
    epochs, best = provenance["epochs"], provenance["best_epoch"]
    if provenance["fit"].get("keep") == "last":
        return f"the last weights of {epochs} epochs are kept"
    if provenance.get("trained_on", "train") != "train":
        through = ", counted through all phases" if "phase" in provenance else ""
        return (
            f"the final network learnt from {provenance['trained_on']}, for as many epochs as led "
            "to the lowest calibrated validation loss without the latter: "
            f"{best}{through}"
        )
    return f"best of {epochs} epochs by calibrated validation loss: {best}"


def _phases(provenance: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what was trained in each phase of transfer learning, and how."""
    unfrozen = provenance["network"]["unfreeze"]
    part = f"its last {unfrozen} blocks" if unfrozen else "all of it"
    phases = (
        ("the head alone", provenance["fit_frozen"]),
        (f"the backbone ({part}, batch norm in inference mode) with it", provenance["fit_tuning"]),
    )
    return [(what, fit) for what, fit in phases if fit]

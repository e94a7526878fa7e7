"""The section of a model card on the release gate, and its place in a contract's metrics."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungwatch.errors import ConfigError
from lungwatch.training.release_gate import RELEASE_GATE_VERSION

# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
RELEASE_GATE = "release_gate"

_WORDS = {"pass": "pass", "fail": "**FAIL**", "not_measured": "not measured"}
_VERDICTS = {
    "pass": "The gate is passed: no check fails, and every requirement was measured.",
    "fail": "**The gate is not passed.** What fails is a reason to distrust the model there.",
    "not_measured": "**The gate is not passed**: nothing fails, but something was not measured.",
}
_KEYS = ("name", "title", "on", "value", "interval", "bound", "at_least", "judged", "verdict")


def read_release_gate(file: Path) -> dict[str, Any]:
    """Read what `lungwatch evaluate --gate` wrote, as it goes into a contract's metrics.

    Of each check its reason, its value, interval, bound and verdict and the figures beside it are
    kept; why the bound is where it is stands in `docs/release-gate.md`.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error
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
        Of `lungwatch.training.score_cache.model_digest`.
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
            f"{where}: run `lungwatch evaluate {where} … --gate` anew"
        )


def release_gate_markdown(result: Mapping[str, Any]) -> str:
    """Draw the table of a release gate in Markdown, failures first among what needs reading."""
    counts = result["counts"]
    lines = [
        _VERDICTS[result["verdict"]]
        + f" {counts['pass']} checks pass, {counts['fail']} fail, {counts['not_measured']} were "
        f"not measured. Measured on {result['model']}, data: {', '.join(result['data'])}.",
        "",
        "| check | on | value | 95 % interval | bound | verdict | beside |",
        "|---|---|---|---|---|---|---|",
    ]
    for check in result["checks"]:
        ends = check["interval"]
        sign = "≥" if check["at_least"] else "≤"
        bound = f"{sign} {check['bound']:g}" + (", lower end" if check["judged"] == "low" else "")
        reason = f": {check['reason']}" if check["reason"] else ""
        cells = (
            check["title"],
            check["on"],
            "" if check["value"] is None else f"{check['value']:.3f}",
            f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "",
            bound,
            _WORDS[check["verdict"]] + reason,
            ", ".join(f"{name} {value:.3g}" for name, value in check["beside"].items()),
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


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
    if word not in _WORDS:
        raise ValueError(f"verdict {word!r} is none")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")

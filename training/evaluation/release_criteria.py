"""Release criteria: what a model must reach before it ships, each with its bound and the reason.

The bounds stand in `release_criteria.toml` beside this file and nowhere else. A file of other
bounds may be given to `lungwatch evaluate --gate`; what was in force is written beside every value.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from lungwatch.errors import ConfigError

Verdict = Literal["pass", "fail", "not_measured"]
Judged = Literal["value", "low"]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One requirement.

    Attributes
    ----------
    name
        Key, for files and for other bounds.
    title
        For people.
    bound
        What the value is held to.
    at_least
        Whether the value must reach the bound, or else must not exceed it.
    fewest
        Fewest cases, of each class where there are classes, for the value to be judged.
    judged
        What is held to the bound: the value, or the lower end of its 95 % interval.
    why
        Where the bound comes from.
    """

    name: str
    title: str
    bound: float
    at_least: bool = True
    fewest: int = 10
    judged: Judged = "value"
    why: str

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> "Criterion":
        """Read a criterion's table of the TOML file."""
        given = dict(values)
        at_least = "at_least" in given
        bound = float(given.pop("at_least" if at_least else "at_most"))
        return cls(name=name, bound=bound, at_least=at_least, **given)


CRITERIA: tuple[Criterion, ...] = tuple(
    Criterion.of(name, values)
    for name, values in tomllib.loads(
        (resources.files(__package__) / "release_criteria.toml").read_text(encoding="utf-8")
    ).items()
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One requirement, and what a model reaches.

    Attributes
    ----------
    criterion
        Name, title, bound, direction: see `Criterion`.
    on
        On what it was measured: a data set, a part of it, a change of the images.
    value, interval
        What was found, and its 95 % interval; None where it was not measured, or has none.
    verdict
        "pass", "fail" or "not_measured".
    reason
        Why it was not measured; empty otherwise.
    beside
        Figures to compare the value with, by name.
    """

    criterion: Criterion
    on: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    verdict: Verdict
    reason: str = ""
    beside: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the criterion's own."""
        told = asdict(self.criterion)
        return {
            "name": told.pop("name"),
            "title": told.pop("title"),
            "on": self.on,
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "verdict": self.verdict,
            "reason": self.reason,
            "beside": self.beside,
            **told,
        }


class Criteria:
    """A set of criteria that values are held to; each name occurs once."""

    def __init__(self, criteria: Sequence[Criterion] = CRITERIA) -> None:
        self._by_name = {criterion.name: criterion for criterion in criteria}

    def __getitem__(self, name: str) -> Criterion:
        return self._by_name[name]

    @property
    def all(self) -> tuple[Criterion, ...]:
        """Every criterion, in order."""
        return tuple(self._by_name.values())

    def judge(
        self,
        name: str,
        on: str,
        value: float | None,
        interval: Sequence[float] | None = None,
        *,
        cases: int | None = None,
        beside: dict[str, float] | None = None,
    ) -> Check:
        """Hold a value to its bound.

        Parameters
        ----------
        name
            Of the criterion.
        on
            On what it was measured.
        value, interval
            What was found; None, or NaN, where it cannot be computed.
        cases
            How many it rests on, the smaller class where there are two; None if unknown, which
            is not held against it.
        beside
            Figures to compare it with.
        """
        criterion, beside = self[name], beside or {}
        reason = ""
        if cases is not None and cases < criterion.fewest:
            reason = f"too few: {cases}, at least {criterion.fewest} are needed"
        elif value is None or not math.isfinite(value):
            reason = "cannot be computed"
        elif criterion.judged == "low" and interval is None:
            reason = "no interval: --bootstrap is 0"
        if reason or value is None:
            return self.skip(name, on, reason, beside)
        held = interval[0] if criterion.judged == "low" and interval else value
        reached = held >= criterion.bound if criterion.at_least else held <= criterion.bound
        return Check(
            criterion=criterion,
            on=on,
            value=round(float(value), 6),
            interval=(round(float(interval[0]), 6), round(float(interval[1]), 6))
            if interval
            else None,
            verdict="pass" if reached else "fail",
            beside=beside,
        )

    def skip(
        self, name: str, on: str, reason: str, beside: dict[str, float] | None = None
    ) -> Check:
        """Record that nothing was measured, and why."""
        return Check(
            criterion=self[name],
            on=on,
            verdict="not_measured",
            reason=reason,
            beside=beside or {},
        )


def overall(checks: Sequence[Check]) -> Verdict:
    """Sum up: "fail" if any check fails, "not_measured" if a criterion was measured nowhere."""
    if any(check.verdict == "fail" for check in checks):
        return "fail"
    measured = {check.criterion.name for check in checks if check.verdict == "pass"}
    if {check.criterion.name for check in checks} - measured:
        return "not_measured"
    return "pass" if checks else "not_measured"


def read_criteria(file: Path | None) -> Criteria:
    """Return the criteria, with other bounds from a JSON file {"name": bound}.

    Raises
    ------
    ConfigError
        If the file cannot be read, a name is unknown, or a bound is no number.
    """
    if file is None:
        return Criteria()
    values = read_json(file)
    if not isinstance(values, dict):
        raise ConfigError(f'{file} is not of the form {{"auc": 0.9}}')
    names = [criterion.name for criterion in CRITERIA]
    for name, bound in values.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; nearest is {near[0]!r}" if near else f"; there are: {', '.join(names)}"
            raise ConfigError(f"{file}: no criterion {name!r}{hint}")
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            raise ConfigError(f"{file}: {name} is {bound!r}, not a number")
        if not math.isfinite(bound):
            raise ConfigError(f"{file}: {name} is {bound!r}, not a finite number")
    return Criteria(
        [replace(one, bound=float(values.get(one.name, one.bound))) for one in CRITERIA]
    )


def read_json(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a file that the user names.

    Raises
    ------
    ConfigError
        If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error

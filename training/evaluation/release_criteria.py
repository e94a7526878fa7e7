"""Release criteria: what a model must reach before it ships.

Each with its bound and the reason.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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


_FOREIGN = "the best honest external figure in the literature is 0.90 (DeepCOVID-XR)"

_CHANCE = "what is told without lungs was not read off the lungs; 0.5 is chance"

_MAP = "a third of the lungs is opacity, so 0.34 is what a random point of them has"

_SHIFT = "such changes happen between two machines and do not change the finding"


CRITERIA: tuple[Criterion, ...] = (
    Criterion(name="auc", title="ROC-AUC, COVID against others", bound=0.90, why=_FOREIGN),
    Criterion(
        name="left_out_auc",
        title="ROC-AUC of a source left out of training",
        bound=0.93,
        why="against normal images; what a hospital that is new to the model may expect",
    ),
    Criterion(
        name="left_out_within",
        title="ROC-AUC within a source left out of training",
        bound=0.72,
        why="the source is new and gives nothing away",
    ),
    Criterion(
        name="within_source",
        title="ROC-AUC within one source",
        bound=0.72,
        why="within a source, the source gives nothing away",
    ),
    Criterion(
        name="within_view",
        title="ROC-AUC within one view",
        bound=0.75,
        why="within AP or PA, the view gives nothing away",
    ),
    Criterion(
        name="above_confounds",
        title="ROC-AUC above what size, border, histogram or view alone give",
        bound=0.01,
        judged="low",
        why="a figure that does not beat the best of them proves nothing",
    ),
    Criterion(
        name="sensitivity",
        title="COVID called COVID, adults",
        bound=0.90,
        fewest=20,
        why="at the threshold fixed on validation data, abstention ignored",
    ),
    Criterion(
        name="normal_called",
        title="normal images called COVID, adults",
        bound=0.05,
        at_least=False,
        fewest=20,
        why="at the threshold fixed on validation data, abstention ignored",
    ),
    Criterion(
        name="other_called",
        title="other pneumonias called COVID, adults",
        bound=0.20,
        at_least=False,
        fewest=20,
        why="they look alike; more than one in five is the source's doing",
    ),
    Criterion(
        name="lungs_blacked_out",
        title="ROC-AUC with the lungs blacked out (distance from chance)",
        bound=0.60,
        at_least=False,
        why=_CHANCE,
    ),
    Criterion(
        name="lungs_alone",
        title="ROC-AUC with everything but the lungs black",
        bound=0.75,
        why="the finding is in the lungs",
    ),
    Criterion(
        name="source_in_embedding",
        title="ROC-AUC of the source, read off the embedding within one finding",
        bound=0.75,
        at_least=False,
        fewest=20,
        why="what the embedding does not know, the answer cannot use; 0.5 is chance",
    ),
    Criterion(
        name="view_in_embedding",
        title="ROC-AUC of AP against PA, read off the embedding within one finding",
        bound=0.60,
        at_least=False,
        fewest=20,
        why="as for the source; the view goes with the finding at most hospitals",
    ),
    Criterion(
        name="calibration",
        title="calibration error (ECE) within one source",
        bound=0.05,
        at_least=False,
        fewest=50,
        why="with fewer images the error's own bias is as large as the bound",
    ),
    Criterion(
        name="peak_on_lesion",
        title="peak of the map on a drawn opacity",
        bound=0.65,
        fewest=30,
        why=_MAP,
    ),
    Criterion(
        name="peak_above_random",
        title="peak on an opacity, above a random point of the lungs",
        bound=0.0,
        fewest=30,
        judged="low",
        why=_MAP,
    ),
    Criterion(
        name="peak_above_other_map",
        title="peak on an opacity, above another patient's map",
        bound=0.0,
        fewest=30,
        judged="low",
        why="a map that would do as well for another patient explains nothing of this one",
    ),
    Criterion(
        name="map_on_lesion",
        title="share of the map on drawn opacities",
        bound=0.50,
        fewest=30,
        why=_MAP,
    ),
    Criterion(
        name="likeness_of_maps",
        title="correlation of different patients' maps",
        bound=0.30,
        at_least=False,
        fewest=30,
        why="maps that are alike show where lungs are, not where the disease is",
    ),
    Criterion(
        name="map_shuffled_head",
        title="correlation of the map with that of a head with shuffled weights",
        bound=0.50,
        at_least=False,
        fewest=30,
        why="Adebayo et al. 2018: a map that survives it does not come from what was learnt",
    ),
    Criterion(
        name="map_shuffled_all",
        title="correlation of the map with that of a network with shuffled weights",
        bound=0.20,
        at_least=False,
        fewest=30,
        why="as for the head",
    ),
    Criterion(
        name="decisions_flipped",
        title="decisions changed",
        bound=0.05,
        at_least=False,
        fewest=50,
        why=_SHIFT,
    ),
    Criterion(
        name="score_shift",
        title="mean change of the probability",
        bound=0.05,
        at_least=False,
        fewest=50,
        why=_SHIFT,
    ),
    Criterion(
        name="gate_keeps",
        title="frontal chest X-rays kept by the content gate",
        bound=0.98,
        fewest=50,
        why="what the gate refuses gets no answer",
    ),
    Criterion(
        name="gate_refuses_altered",
        title="turned or inverted copies refused by the content gate",
        bound=0.98,
        fewest=50,
        why="the network was never shown such images, and answers them all the same",
    ),
    Criterion(
        name="gate_refuses_other",
        title="pictures of something else refused by the content gate",
        bound=0.95,
        fewest=50,
        why="the network answers 95 % of such pictures with a label",
    ),
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
        Figures to hold the value against, by name.
    """

    criterion: Criterion
    on: str
    value: float | None
    interval: tuple[float, float] | None
    verdict: Verdict
    reason: str = ""
    beside: dict[str, float]

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
    """A set of criteria that values are held to.

    Parameters
    ----------
    criteria
        Each name once.
    """

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
            Figures to hold it against.
        """
        criterion = self[name]
        if cases is not None and cases < criterion.fewest:
            reason = f"too few: {cases}, at least {criterion.fewest} are needed"
            return self._not_measured(criterion, on, reason, beside)
        if value is None or not math.isfinite(value):
            return self._not_measured(criterion, on, "cannot be computed", beside)
        held = value
        if criterion.judged == "low":
            if interval is None:
                return self._not_measured(criterion, on, "no interval: --bootstrap is 0", beside)
            held = interval[0]
        reached = held >= criterion.bound if criterion.at_least else held <= criterion.bound
        return Check(
            criterion=criterion,
            on=on,
            value=round(float(value), 6),
            interval=(round(float(interval[0]), 6), round(float(interval[1]), 6))
            if interval
            else None,
            verdict="pass" if reached else "fail",
            beside=beside or {},
        )

    def skip(self, name: str, on: str, reason: str) -> Check:
        """Say that nothing was measured, and why."""
        return self._not_measured(self[name], on, reason, None)

    def _not_measured(
        self, criterion: Criterion, on: str, reason: str, beside: dict[str, float] | None
    ) -> Check:
        return Check(
            criterion=criterion,
            on=on,
            value=None,
            interval=None,
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
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error
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

"""Populations of results: distributions of figures and counts of tags, for drift."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lungwatch.db.driftrows import DriftRow
from lungwatch.driftreference import GATE_ACCEPTED, figures_of
from lungwatch.twosample import Difference, Distribution, compare_tags, compare_values

_SIZE_STEP_PX = 500
_LONGEST_TAG = 64


@dataclass(frozen=True, kw_only=True)
class Population:
    """Some results, summed up.

    Attributes
    ----------
    name
        For people.
    values
        Distributions by figure (`lungwatch.driftreference.figures_of`).
    tags
        Counts by tag and value; an empty value where the file is silent.
    """

    name: str
    values: Mapping[str, Distribution]
    tags: Mapping[str, Mapping[str, int]]

    def shifts(self, reference: "Population") -> dict[str, Difference]:
        """Test every figure and tag that both sides have enough of."""
        answers: dict[str, Difference | None] = {}
        for what, values in reference.values.items():
            if what in self.values:
                answers[what] = compare_values(self.values[what], values)
        for what, counts in reference.tags.items():
            if what in self.tags:
                answers[what] = compare_tags(self.tags[what], counts)
        return {what: shift for what, shift in answers.items() if shift is not None}


class Columns:
    """Figures and tags of results, read once, so that many windows of them cost little.

    Parameters
    ----------
    rows
        In the order of the windows.
    """

    def __init__(self, rows: Sequence[DriftRow]) -> None:
        self._values: dict[str, list[float | None]] = defaultdict(lambda: [None] * len(rows))
        self._tags: dict[str, list[str]] = defaultdict(list)
        for index, row in enumerate(rows):
            for figure, value in _figures(row).items():
                self._values[figure][index] = value
            for tag, category in _tags(row).items():
                self._tags[tag].append(category)

    def population(
        self, name: str, start: int, stop: int, *, only: str | None = None
    ) -> Population:
        """Sum up the rows from `start` to before `stop`; of one figure or tag, if asked for."""
        values = {
            figure: [value for value in column[start:stop] if value is not None]
            for figure, column in self._values.items()
            if only in (None, figure)
        }
        return Population(
            name=name,
            values={figure: Distribution.of(found) for figure, found in values.items() if found},
            tags={
                tag: Counter(column[start:stop])
                for tag, column in self._tags.items()
                if only in (None, tag)
            },
        )


def population_of(name: str, rows: Sequence[DriftRow]) -> Population:
    """Sum up all rows."""
    return Columns(rows).population(name, 0, len(rows))


def station_of(row: DriftRow) -> str:
    """Return the station that a result is of; empty where the file is silent."""
    return _shortened(row.station)


def _figures(row: DriftRow) -> dict[str, float]:
    return figures_of(
        logit=row.logit,
        gate_score=row.gate_score,
        lung_area=row.lung_area,
        lung_share=row.lung_share,
        components=row.components,
    )


def _tags(row: DriftRow) -> dict[str, str]:
    longest = max(row.rows or 0, row.columns or 0)
    size = f"about {round(longest / _SIZE_STEP_PX) * _SIZE_STEP_PX} px" if longest else ""
    return {
        "gate": row.reason or GATE_ACCEPTED,
        "station": station_of(row),
        "view": _shortened(row.view_position),
        "modality": _shortened(row.modality),
        "equipment": _shortened(row.manufacturer_model),
        "polarity": _shortened(row.photometric),
        "format": _shortened(row.format),
        "size": size,
        "bits": str(row.bits_stored or ""),
    }


def _shortened(text: str | None) -> str:
    return (text or "").strip()[:_LONGEST_TAG]

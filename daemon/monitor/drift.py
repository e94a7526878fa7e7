"""Drift: newest results of a model against a reference, by station."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Engine

from lungwatch.bundle import DRIFT_FILE
from lungwatch.comparison import (
    GATE_ACCEPTED,
    Difference,
    Distribution,
    DriftReference,
    alarms,
    compare_tags,
    compare_values,
    figures_of,
)
from lungwatch.daemon.retry import Clock
from lungwatch.db.statistics import DriftRow, drift_rows
from lungwatch.errors import ModelError

_SIZE_STEP_PX = 500
_LONGEST_TAG = 64


@dataclass(frozen=True, kw_only=True)
class Population:
    """Summary of some results.

    Attributes
    ----------
    name
        For people.
    values
        Distributions by figure (`lungwatch.comparison.figures_of`).
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


class ResultColumns:
    """Figures and tags of results by column, so that many windows of them cost little.

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
        """Summarise rows `start` to before `stop`; of one figure or tag if `only` names it."""
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
    """Summarise all rows."""
    return ResultColumns(rows).population(name, 0, len(rows))


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


FALSE_ALARM_RATE = 0.001
"""Share of windows of one station that alarm without any shift, at most."""
WINDOW = 100
"""Newest results that are compared."""
LEAST_WINDOW = 30
"""Fewest results of a window that is compared before it is full."""
BASELINE = 300
"""First results of a site, which are its reference; a station in them has its own."""
STATION_BASELINE = 100
"""Fewest results of a station's own reference, completed by later ones."""
SPAN = 2000
"""Results that are read at either end; a rarer station has fewer."""
_STEP = 10
_REFRESH_S = 60.0
ReferenceChoice = Literal["site", "bundle"]


@dataclass(frozen=True, kw_only=True)
class DriftTest:
    """One figure or tag of one window against the reference.

    Attributes
    ----------
    station
        Empty for all stations together.
    what
        A figure ("logit", "component_1") or a tag ("view").
    statistic, p, reference_count, window_count, told
        See `lungwatch.comparison.Difference`.
    alarm
        Whether it alarms, all tests of the window considered.
    since
        End of the first of the windows that alarm without a break until now, looked at every
        10 results; None without an alarm.
    """

    station: str
    what: str
    statistic: float
    p: float
    reference_count: int
    window_count: int
    told: str
    alarm: bool
    since: datetime | None


@dataclass(frozen=True, kw_only=True)
class DriftWindow:
    """One window: of a station, or of all.

    Attributes
    ----------
    reference
        What it was compared with.
    results
        How many of the newest results are in it.
    """

    station: str
    reference: str
    results: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift of one model at one time.

    Attributes
    ----------
    reference
        "site" or "bundle".
    false_alarm_rate
        Of each window without any shift.
    window
        Results that a full window has.
    waiting_for
        Results still missing before anything is tested; 0 once something is.
    scopes
        All stations together first, then those with enough results.
    tests
        In the order of the scopes; what alarms first.
    """

    reference: ReferenceChoice
    false_alarm_rate: float
    window: int
    waiting_for: int
    scopes: tuple[DriftWindow, ...]
    tests: tuple[DriftTest, ...]

    @property
    def alarms(self) -> tuple[DriftTest, ...]:
        """The tests that alarm."""
        return tuple(test for test in self.tests if test.alarm)

    def summary(self) -> str:
        """Return one line, for people."""
        if self.waiting_for:
            return f"not told yet: {self.waiting_for} more results are needed"
        found = (
            f"{len(self.tests)} tests of {len(self.scopes)} windows against the {self.reference}"
        )
        if not self.alarms:
            return f"none: {found}"
        names = [f"{test.station or 'all stations'}: {test.what}" for test in self.alarms]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return (
            f"{', '.join(names[:4])}{more} differ from the {self.reference}'s reference: look at "
            "the images and `lungwatch results stats --drift`"
        )


def examine_drift(
    engine: Engine,
    model_sha256: str,
    bundle: DriftReference | None = None,
    *,
    reference: ReferenceChoice = "site",
    since: datetime | None = None,
) -> Drift:
    """Compare the newest results of a model with a reference.

    Parameters
    ----------
    model_sha256
        Of the model's file.
    bundle
        The bundle's own reference; needed for `reference` "bundle".
    reference
        "site": the first 300 results of the model. A station that is among them is compared with
        its own of those, or, where they are fewer than 100, with its first 100; one that came
        later with all 300. "bundle": the model's training population.
    since
        When the site's reference begins; None for the model's first use.

    Raises
    ------
    ModelError
        If the bundle's own reference is asked for and it has none.
    DatabaseError
        If the database cannot be read.
    """
    if reference == "bundle" and bundle is None:
        raise ModelError(
            f"the bundle has no {DRIFT_FILE}: `lungwatch model renew --reference` makes one, or "
            'compare with the site\'s first results (drift_reference = "site")'
        )
    oldest, newest = drift_rows(
        engine,
        model_sha256,
        first=SPAN if reference == "site" else 0,
        last=SPAN,
        since=since if reference == "site" else None,
    )
    if reference == "bundle":
        assert bundle is not None
        name = f"bundle ({bundle.source})"
        trained = Population(name=name, values=bundle.values, tags=bundle.tags)
        return _examine(newest, reference, lambda _: (trained, frozenset()), 0)
    return _examine(newest, reference, _SiteReferences(oldest), BASELINE - len(oldest))


class DriftWatch:
    """Drift, examined at most once a minute. For one thread at a time.

    Parameters
    ----------
    look
        See `examine_drift`; may raise LungwatchError.
    clock
        The machine's.
    """

    def __init__(self, look: Callable[[], Drift], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._looked_s: float | None = None
        self._found: Drift | None = None

    def __call__(self) -> Drift:
        """Return the drift as of at most a minute ago."""
        now_s = self._clock.monotonic()
        if self._found is None or self._looked_s is None or now_s - self._looked_s >= _REFRESH_S:
            self._found, self._looked_s = self._look(), now_s
        return self._found


class _SiteReferences:
    """References from a site's first results: of all stations, and of each station in them."""

    def __init__(self, oldest: Sequence[DriftRow]) -> None:
        first = oldest[:BASELINE]
        self._all = population_of("the site's first results", first)
        self._ids = frozenset(row.id for row in first)
        own: dict[str, list[DriftRow]] = defaultdict(list)
        for number, row in enumerate(oldest):
            station = station_of(row)
            known = number < BASELINE
            if known or (station in own and len(own[station]) < STATION_BASELINE):
                own[station].append(row)
        self._own = {
            station: (population_of("its own first results", rows), frozenset(r.id for r in rows))
            for station, rows in own.items()
            if station
        }

    def __call__(self, station: str) -> tuple[Population, frozenset[int]]:
        """Return a station's reference, and the ids of its results."""
        return self._own.get(station, (self._all, self._ids))


def _examine(
    newest: Sequence[DriftRow],
    choice: ReferenceChoice,
    reference_of: Callable[[str], tuple[Population, frozenset[int]]],
    missing: int,
) -> Drift:
    by_station: dict[str, list[DriftRow]] = {"": list(newest)}
    for row in newest:
        if station := station_of(row):
            by_station.setdefault(station, []).append(row)
    scopes: list[DriftWindow] = []
    tests: list[DriftTest] = []
    fresh = 0
    for station in sorted(by_station):
        population, used = reference_of(station)
        rows = [row for row in by_station[station] if row.id not in used]
        if not station:
            fresh = len(rows)
        if missing > 0 or len(rows) < LEAST_WINDOW:
            continue
        if compared := _compare(station, rows, population):
            results = min(len(rows), WINDOW)
            scopes.append(DriftWindow(station=station, reference=population.name, results=results))
            tests += compared
    return Drift(
        reference=choice,
        false_alarm_rate=FALSE_ALARM_RATE,
        window=WINDOW,
        waiting_for=0 if scopes else max(0, missing) + max(0, LEAST_WINDOW - fresh),
        scopes=tuple(scopes),
        tests=tuple(tests),
    )


def _compare(station: str, rows: Sequence[DriftRow], reference: Population) -> list[DriftTest]:
    """Test the newest window of a station, `rows` being its results, the newest first."""
    columns = ResultColumns(rows)
    found = columns.population(station, 0, WINDOW).shifts(reference)
    if station:  # one value, by definition
        found.pop("station", None)
    alarming = alarms([shift.p for shift in found.values()], FALSE_ALARM_RATE)
    compared = [
        DriftTest(
            station=station,
            what=what,
            statistic=shift.statistic,
            p=shift.p,
            reference_count=shift.reference_count,
            window_count=shift.window_count,
            told=shift.told,
            alarm=alarm,
            since=_since(rows, columns, what, reference, FALSE_ALARM_RATE / len(found))
            if alarm
            else None,
        )
        for (what, shift), alarm in zip(found.items(), alarming, strict=True)
    ]
    return sorted(compared, key=lambda one: (not one.alarm, one.p))


def _since(
    rows: Sequence[DriftRow],
    columns: ResultColumns,
    what: str,
    reference: Population,
    p_bound: float,
) -> datetime:
    """Return the end of the first window of the unbroken row of alarms of one figure or tag."""
    since = rows[0].finished_at
    for start in range(_STEP, len(rows) - LEAST_WINDOW + 1, _STEP):
        shift = columns.population("", start, start + WINDOW, only=what).shifts(reference).get(what)
        if shift is None or shift.p > p_bound:
            break
        since = rows[start].finished_at
    return since

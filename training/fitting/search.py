"""Hyper-parameter search: spaces, samplers, and a table with a row for each trial."""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np

from lungwatch.errors import ConfigError, LungwatchError, MissingExtraError
from lungwatch.training.evaluation.plots import plot_search
from lungwatch.training.fitting.run import RunFolder
from lungwatch.training.fitting.trainer import DivergedError

Number = int | float


# A value this near to the end of a range, as a share of its width, lies at its edge.
_EDGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers between two, both included.

    Attributes
    ----------
    low, high
        The range at first.
    lowest, highest
        The hard limits of its extension.
    log
        Whether ratios count, not differences.
    integer
        Whole numbers only.
    """

    low: Number
    high: Number
    lowest: Number
    highest: Number
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.lowest <= self.low < self.high <= self.highest:
            raise ConfigError("a range needs lowest <= low < high <= highest")
        if self.log and self.lowest <= 0:
            raise ConfigError("a logarithmic range lies above 0")

    def extended(self, best: Number) -> Self:
        """Return the range, half as wide again on the side at whose edge the best value lies."""
        low, high, at = (self._scaled(value) for value in (self.low, self.high, best))
        margin, step = _EDGE * (high - low), 0.5 * (high - low)
        if at <= low + margin:
            return replace(self, low=max(self.lowest, self._unscaled(low - step)))
        if at >= high - margin:
            return replace(self, high=min(self.highest, self._unscaled(high + step)))
        return self

    def _scaled(self, value: Number) -> float:
        return math.log(value) if self.log else float(value)

    def _unscaled(self, value: float) -> Number:
        number = math.exp(value) if self.log else value
        return round(number) if self.integer else number


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A few numbers on a ladder of more.

    Attributes
    ----------
    rungs
        All numbers there are, ascending: the first and the last are the hard limits.
    first, last
        The positions among them of the lowest and the highest number in use.
    """

    rungs: tuple[Number, ...]
    first: int
    last: int

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ConfigError("the numbers to choose from must ascend")
        if not 0 <= self.first <= self.last < len(self.rungs):
            raise ConfigError("the numbers in use are not among those to choose from")

    @property
    def log(self) -> bool:
        """Whether the numbers differ by ratios rather than by differences."""
        return self.rungs[0] > 0 and self.rungs[-1] / self.rungs[0] >= 8

    @property
    def values(self) -> tuple[Number, ...]:
        """The numbers in use."""
        return self.rungs[self.first : self.last + 1]

    def extended(self, best: Number) -> Self:
        """Return the ladder with the next number beyond the edge at which the best value lies."""
        first, last = self.first, self.last
        if best == self.rungs[first]:
            first = max(0, first - 1)
        if best == self.rungs[last]:
            last = min(len(self.rungs) - 1, last + 1)
        return replace(self, first=first, last=last)


Parameter = Range | Choices

Space = Mapping[str, Parameter]


def extend(space: Space, best: Mapping[str, Number]) -> dict[str, Parameter]:
    """Return the space with every range extended at whose edge the best value lies."""
    return {name: parameter.extended(best[name]) for name, parameter in space.items()}


def describe_space(space: Space) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {name: asdict(parameter) for name, parameter in space.items()}


SamplerKind = Literal["random", "tpe", "grid"]

SAMPLER_KINDS: tuple[SamplerKind, ...] = get_args(SamplerKind)


# Trials drawn at random before the tree of Parzen estimators is asked.
_STARTUP = 8


@dataclass(frozen=True, kw_only=True)
class Known:
    """A finished trial; value None if it failed."""

    parameters: Mapping[str, Number]
    value: float | None


def propose(
    kind: SamplerKind, space: Space, known: Sequence[Known], *, seed: int
) -> dict[str, Number]:
    """Choose the parameters of the next trial.

    Source: random search, Bergstra & Bengio 2012; TPE, Bergstra et al. 2011, as in Optuna.

    Parameters
    ----------
    kind
        "random", "tpe" or "grid": the first combination not tried yet.
    space
        What to choose from.
    known
        The trials before.
    seed
        Of the search.

    Raises
    ------
    ConfigError
        If a grid is asked for and a parameter is a range, or all of the grid is tried.
    MissingExtraError
        If Optuna is not installed.
    """
    if kind == "grid":
        tried = [dict(trial.parameters) for trial in known]
        return next(point for point in grid(space) if point not in tried)
    optuna = _optuna()
    chance = derived_seed(seed, len(known))
    sampler = (
        optuna.samplers.RandomSampler(seed=chance)
        if kind == "random"
        else optuna.samplers.TPESampler(seed=chance, n_startup_trials=_STARTUP)
    )
    study = optuna.create_study(sampler=sampler)
    distributions = {name: _distribution(optuna, space[name]) for name in space}
    for trial in known:
        if trial.value is not None:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(trial.parameters),
                    distributions=distributions,
                    value=trial.value,
                )
            )
    return dict(study.ask(distributions).params)


def grid(space: Space) -> list[dict[str, Number]]:
    """List all combinations.

    Raises
    ------
    ConfigError
        If a parameter is a range.
    """
    choices = []
    for name, parameter in space.items():
        if not isinstance(parameter, Choices):
            raise ConfigError(f"a grid needs single values, but {name} is a range")
        choices.append(parameter.values)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*choices)]


def derived_seed(seed: int, number: int) -> int:
    """Return a seed for one trial, 0..2^31-1."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % 2**31)


def _distribution(optuna: Any, parameter: Any) -> Any:  # noqa: ANN401  # optional library
    if isinstance(parameter, Choices):
        return optuna.distributions.CategoricalDistribution(parameter.values)
    kind = (
        optuna.distributions.IntDistribution
        if parameter.integer
        else optuna.distributions.FloatDistribution
    )
    return kind(parameter.low, parameter.high, log=parameter.log)


def _optuna() -> Any:  # noqa: ANN401  # optional library
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("hyper-parameter search", "train") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


_STATE = "search.json"

TABLE = "search.csv"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search.

    Attributes
    ----------
    sampler
        See `search.propose`.
    trials
        In the first round; a grid has its own number. Each further round has half as many.
    extensions
        Most further rounds, each with the ranges extended at whose edge the best value lay.
    seed
        Of the proposals and of every trial's training.
    """

    sampler: SamplerKind = "tpe"
    trials: int = 20
    extensions: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        if self.trials < 1 or self.extensions < 0:
            raise ConfigError("a search needs at least 1 trial and 0 or more extensions")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to try: the parameters by name, and the seed to train with."""

    number: int
    round: int
    parameters: dict[str, Number]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial came to: the value, less being better, and the epochs it took to reach it."""

    value: float
    epochs: int


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best trial, and the table's rows (see `search`)."""

    best: Trial
    outcome: Outcome
    rows: tuple[dict[str, Any], ...]


def search(
    space: Space,
    objective: Callable[[Trial], Outcome],
    config: SearchConfig,
    run: RunFolder,
    *,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Try parameters for the lowest value; go on from what `run` holds of this search.

    After every trial its row is in `search.csv`: number, the parameters, value, epochs, seconds,
    state (done, failed), round, and what went wrong. A search that was interrupted comes to the
    same table as one that was not, but for the seconds.

    Parameters
    ----------
    space
        What to choose from; no parameter may have the name of another column.
    objective
        Makes a trial, a fresh network each time. Should it diverge or break, the trial has
        failed and the search goes on; what the user has to mend (a LungwatchError, a full disk)
        ends it.
    config
        How.
    run
        A folder that exists.
    on_trial
        Called with each new row.

    Raises
    ------
    ConfigError
        If `run` holds another search, or every trial failed.
    MissingExtraError
        If Optuna is not installed.
    """
    header = {
        "sampler": config.sampler,
        "trials": config.trials,
        "extensions": config.extensions,
        "seed": config.seed,
        "space": describe_space(space),
    }
    table = _Table(run, header, tuple(space))
    current = dict(space)
    for round_ in range(config.extensions + 1):
        for number in _numbers(config, current, table.rows, round_):
            trial = Trial(
                number=number,
                round=round_,
                parameters=propose(
                    config.sampler, current, _known(table.rows, space), seed=config.seed
                ),
                seed=derived_seed(config.seed, number),
            )
            row = _run(trial, objective)
            table.append(row)
            if on_trial:
                on_trial(row)
        best = _best(table.rows[: _end(table.rows, round_)])
        wider = extend(current, {name: best[name] for name in space})
        if wider == current:
            break
        current = wider
    best = _best(table.rows)
    plot_search(
        table.rows,
        {name: parameter.log for name, parameter in space.items()},
        run.root / "search.png",
    )
    return SearchResult(
        best=Trial(
            number=best["number"],
            round=best["round"],
            parameters={name: best[name] for name in space},
            seed=derived_seed(config.seed, best["number"]),
        ),
        outcome=Outcome(value=best["value"], epochs=best["epochs"]),
        rows=tuple(table.rows),
    )


class _Table:
    """The rows so far, on disk after each; JSON is what is read again, CSV what people read."""

    def __init__(self, run: RunFolder, header: dict[str, Any], names: Sequence[str]) -> None:
        self._run, self._header = run, header
        self._columns = ("number", *names, "value", "epochs", "seconds", "state", "round", "error")
        self.rows: list[dict[str, Any]] = []
        if (run.root / _STATE).exists():
            before = run.read(_STATE)
            self.rows = before.pop("rows")
            if before != _plain(header):
                raise ConfigError(f"{run.root} holds a search with other settings")
            self._write()

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        self._run.write(_STATE, {**self._header, "rows": self.rows})
        if self.rows:
            rows = [{name: row[name] for name in self._columns} for row in self.rows]
            self._run.write_table(TABLE, rows)


def _numbers(
    config: SearchConfig, space: Space, rows: Sequence[dict[str, Any]], round_: int
) -> range:
    """Numbers of the trials that the round still lacks."""
    before = sum(row["round"] < round_ for row in rows)
    if config.sampler == "grid":
        # Every round's grid holds the one before.
        return range(len(rows), max(len(rows), len(grid(space))))
    planned = config.trials if round_ == 0 else math.ceil(config.trials / 2)
    return range(len(rows), max(len(rows), before + planned))


def _end(rows: Sequence[dict[str, Any]], round_: int) -> int:
    return sum(row["round"] <= round_ for row in rows)


def _known(rows: Sequence[dict[str, Any]], space: Space) -> list[Known]:
    return [
        Known(parameters={name: row[name] for name in space}, value=row["value"]) for row in rows
    ]


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        raise ConfigError(f"every trial of the search failed; the first: {rows[0]['error']}")
    return min(done, key=lambda row: (row["value"], row["number"]))


def _run(trial: Trial, objective: Callable[[Trial], Outcome]) -> dict[str, Any]:
    started = time.monotonic()
    outcome: Outcome | None = None
    error = ""
    try:
        outcome = objective(trial)
        if not math.isfinite(outcome.value):
            error, outcome = f"the value is {outcome.value}", None
    except DivergedError as diverged:
        error = str(diverged)
    except (LungwatchError, OSError):
        raise
    except Exception as broken:  # TensorFlow's own errors share no base class
        error = f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
    return {
        "number": trial.number,
        **trial.parameters,
        "value": outcome.value if outcome else None,
        "epochs": outcome.epochs if outcome else None,
        "seconds": round(time.monotonic() - started, 1),
        "state": "done" if outcome else "failed",
        "round": trial.round,
        "error": error,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain

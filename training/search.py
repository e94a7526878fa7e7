"""Hyper-parameter search: a table that grows by a row a trial and survives interruptions."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lungwatch.errors import ConfigError, LungwatchError
from lungwatch.training.data.plots import plot_search
from lungwatch.training.fit import DivergedError
from lungwatch.training.run import RunFolder
from lungwatch.training.sampler import Known, SamplerKind, derived_seed, grid, propose
from lungwatch.training.search_space import Number, Space, describe_space, extend

_STATE = "search.json"
TABLE = "search.csv"


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search.

    Attributes
    ----------
    sampler
        See `lungwatch.training.sampler.propose`.
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

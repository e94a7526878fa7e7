"""Hyper-parameter search: spaces, samplers, and a table with a row for each trial."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

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
    """A closed interval of numbers.

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
    """A section of an ascending list of numbers.

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
        """True if the numbers differ by ratios rather than by differences."""
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


SamplerKind = Literal["random", "tpe", "grid"]
TABLE = "search.csv"
# Trials drawn at random before the tree of Parzen estimators is asked.
_STARTUP = 8
# Attribute of Optuna's trials: the columns of the table besides parameters and value.
_NOTE = "row"
_NOTED = ("epochs", "seconds", "state", "round", "error")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Configuration of a search.

    Attributes
    ----------
    sampler
        "tpe" (Bergstra et al. 2011), "random" (Bergstra & Bengio 2012), or "grid": all
        combinations.
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
    """One trial: its parameters by name, and the seed to train with."""

    number: int
    round: int
    parameters: dict[str, Number]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a trial: the value, less being better, and the epochs it took to reach it."""

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

    Trials are kept by Optuna in `search.db`, a study for each round. After every trial its row
    is in `search.csv`: number, the parameters, value, epochs, seconds, state (done, failed),
    round, and what went wrong. A search that was interrupted comes to the same table as one
    that was not, but for the seconds.

    Parameters
    ----------
    space
        What to choose from; no parameter may have the name of another column.
    objective
        Makes a trial, a fresh network each time. If it diverges or breaks, the trial has failed
        and the search continues; an error that the user can correct (a LungwatchError, a full
        disk) ends it.
    config
        How.
    run
        A folder that exists.
    on_trial
        Called with each new row.

    Raises
    ------
    ConfigError
        If `run` holds another search, a grid is asked for and a parameter is a range, or every
        trial failed.
    MissingExtraError
        If Optuna is not installed.
    """
    with _storage(run) as storage:
        current = dict(space)
        rows: list[dict[str, Any]] = []
        for round_ in range(config.extensions + 1):
            study = _open_study(storage, round_, rows, current, describe_search(space, config))
            half = math.ceil(config.trials / 2)
            planned = len(rows) + (half if round_ else config.trials)
            if config.sampler == "grid":
                # Every round's grid holds the one before.
                planned = len(grid(current))
            rows = _rows(study, space)
            while len(rows) < planned:
                trial = _next_trial(study, current, config)
                _run(study, trial, objective, round_=round_, seed=config.seed)
                rows = _rows(study, space)
                run.write_table(TABLE, rows)
                if on_trial:
                    on_trial(rows[-1])
            best = _best(rows)
            wider = extend(current, {name: best[name] for name in space})
            if wider == current:
                break
            current = wider
    run.write_table(TABLE, rows)
    plot_search(
        rows,
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
        rows=tuple(rows),
    )


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


def describe_search(space: Space, config: SearchConfig) -> dict[str, Any]:
    """Return what a search depends on, as plain JSON values."""
    values = {**asdict(config), "space": {name: asdict(part) for name, part in space.items()}}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def derived_seed(seed: int, number: int) -> int:
    """Return a seed for one trial, 0..2^31-1."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % 2**31)


@contextlib.contextmanager
def _storage(run: RunFolder) -> Iterator[Any]:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("hyper-parameter search", "train") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{run.root / 'search.db'}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _open_study(
    storage: Any,  # noqa: ANN401  # optional library
    round_: int,
    before: Sequence[dict[str, Any]],
    space: Space,
    settings: dict[str, Any],
) -> Any:  # noqa: ANN401
    """Open the study of a round; its first trials are copies of those of the rounds before.

    Optuna refuses a parameter whose choices change within a study.
    """
    import optuna

    study = optuna.create_study(storage=storage, study_name=f"round {round_}", load_if_exists=True)
    if study.user_attrs.get("settings", settings) != settings:
        raise ConfigError("the run folder holds a search with other settings")
    if not study.user_attrs:
        study.set_user_attr("settings", settings)
    for row in before[len(study.trials) :]:
        study.add_trial(
            optuna.trial.create_trial(
                state=(
                    optuna.trial.TrialState.FAIL
                    if row["value"] is None
                    else optuna.trial.TrialState.COMPLETE
                ),
                value=row["value"],
                params={name: row[name] for name in space},
                distributions=_distributions(space),
                user_attrs={_NOTE: {name: row[name] for name in _NOTED}},
            )
        )
    return study


def _next_trial(study: Any, space: Space, config: SearchConfig) -> Any:  # noqa: ANN401
    """Return the trial that was interrupted, or a new one.

    A proposal depends on the seed, the trial's number and earlier results alone: the sampler is
    seeded for each, so that an interrupted search has no random state to lose.
    """
    import optuna

    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            return optuna.trial.Trial(study, trial._trial_id)  # noqa: SLF001  # no public way
    number = len(study.trials)
    chance = derived_seed(config.seed, number)
    if config.sampler == "grid":
        tried = [trial.params for trial in study.trials]
        point = next(point for point in grid(space) if point not in tried)
        study.enqueue_trial(point, skip_if_exists=True)
    elif config.sampler == "random":
        study.sampler = optuna.samplers.RandomSampler(seed=chance)
    else:
        study.sampler = optuna.samplers.TPESampler(seed=chance, n_startup_trials=_STARTUP)
    return study.ask(_distributions(space))


def _run(
    study: Any,  # noqa: ANN401  # optional library
    trial: Any,  # noqa: ANN401
    objective: Callable[[Trial], Outcome],
    *,
    round_: int,
    seed: int,
) -> None:
    """Run a trial and tell the study how it ended."""
    started = time.monotonic()
    outcome: Outcome | None = None
    error = ""
    try:
        outcome = objective(
            Trial(
                number=trial.number,
                round=round_,
                parameters=dict(trial.params),
                seed=derived_seed(seed, trial.number),
            )
        )
        if not math.isfinite(outcome.value):
            error, outcome = f"the value is {outcome.value}", None
    except DivergedError as diverged:
        error = str(diverged)
    except (LungwatchError, OSError):
        raise
    except Exception as broken:  # TensorFlow's own errors share no base class
        error = f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
    trial.set_user_attr(
        _NOTE,
        {
            "epochs": outcome.epochs if outcome else None,
            "seconds": round(time.monotonic() - started, 1),
            "state": "done" if outcome else "failed",
            "round": round_,
            "error": error,
        },
    )
    if outcome:
        study.tell(trial, outcome.value)
    else:
        import optuna

        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _rows(study: Any, space: Space) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return a row for each finished trial, in the columns of the table."""
    return [
        {
            "number": trial.number,
            **{name: trial.params[name] for name in space},
            "value": trial.value,
            **{name: trial.user_attrs[_NOTE][name] for name in _NOTED},
        }
        for trial in study.trials
        if trial.state.is_finished()
    ]


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["state"] == "done"]
    if not done:
        raise ConfigError(f"every trial of the search failed; the first: {rows[0]['error']}")
    return min(done, key=lambda row: (row["value"], row["number"]))


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, Any] = {}
    for name, part in space.items():
        if isinstance(part, Choices):
            found[name] = CategoricalDistribution(part.values)
        else:
            kind: Any = IntDistribution if part.integer else FloatDistribution
            found[name] = kind(part.low, part.high, log=part.log)
    return found

"""Which parameters to try next; it depends on the seed, the number and earlier results alone.

Every proposal comes from a fresh study and a freshly seeded sampler that is told the earlier
results: a search that was interrupted has no state of a random generator to lose.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lungwatch.errors import ConfigError, MissingExtraError
from lungwatch.training.search_space import Ladder, Number, Space

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
        if not isinstance(parameter, Ladder):
            raise ConfigError(f"a grid needs single values, but {name} is a range")
        choices.append(parameter.values)
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*choices)]


def derived_seed(seed: int, number: int) -> int:
    """Return a seed for one trial, 0..2^31-1."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] % 2**31)


def _distribution(optuna: Any, parameter: Any) -> Any:  # noqa: ANN401  # optional library
    if isinstance(parameter, Ladder):
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

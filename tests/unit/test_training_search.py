"""A search is a table that an interruption does not change."""

import csv
import math

import pytest

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.fitting.run import RunFolder
from lungwatch.training.fitting.search import Choices, Outcome, Range, SearchConfig, search
from lungwatch.training.fitting.trainer import DivergedError

pytest.importorskip("optuna", reason="needs Optuna (extra 'train')")
pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")

SPACE = {
    "rate": Range(low=1e-3, high=1e-1, lowest=1e-5, highest=1.0, log=True),
    "units": Range(low=8, high=64, lowest=2, highest=256, integer=True),
    "batch": Choices(rungs=(8, 16, 32, 64), first=1, last=2),
}
GRID = {
    "rate": Choices(rungs=(0.001, 0.01, 0.1, 1.0), first=1, last=2),
    "batch": Choices(rungs=(8, 16, 32, 64), first=1, last=2),
}


def bowl(trial):
    """Lowest at a rate of 0.02, 32 units; some trials break."""
    if trial.number == 3:
        raise DivergedError("the loss is nan")
    value = abs(math.log(trial.parameters["rate"] / 0.02)) + trial.seed % 7 / 100
    value += abs(trial.parameters.get("units", 32) - 32) / 100
    return Outcome(value=value, epochs=trial.number + 1)


def folder(path):
    path.mkdir()
    return RunFolder(root=path)


def table(run):
    with (run.root / "search.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_an_interrupted_search_yields_the_table_of_one_that_was_not(tmp_path, sampler):
    space = GRID if sampler == "grid" else SPACE
    config = SearchConfig(sampler=sampler, trials=12, extensions=1, seed=5)
    whole, broken = folder(tmp_path / "whole"), folder(tmp_path / "broken")
    expected = search(space, bowl, config, whole)
    breaks = iter([2, 3, 3, 100])

    left = [next(breaks)]

    def interrupted(trial):
        if left[0] == 0:
            left[0] = next(breaks)
            raise KeyboardInterrupt
        left[0] -= 1
        return bowl(trial)

    interruptions = 0
    while True:
        try:
            found = search(space, interrupted, config, broken)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 1
    assert table(broken) == table(whole)
    assert (found.best, found.outcome) == (expected.best, expected.outcome)
    assert (broken.root / "search.png").stat().st_size > 1000


def test_another_seed_tries_other_parameters_and_trains_with_other_seeds(tmp_path):
    runs = [folder(tmp_path / str(seed)) for seed in (1, 2)]
    seeds = [[], []]
    for index, run in enumerate(runs):

        def objective(trial, index=index):
            seeds[index].append(trial.seed)
            return bowl(trial)

        search(SPACE, objective, SearchConfig(trials=4, extensions=0, seed=index), run)
    assert table(runs[0]) != table(runs[1])
    assert len(set(seeds[0] + seeds[1])) == 8


def test_a_failed_trial_is_recorded_and_the_search_goes_on(tmp_path):
    run = folder(tmp_path / "run")

    def objective(trial):
        if trial.number == 1:
            raise RuntimeError("out of\nmemory")
        value = math.nan if trial.number == 2 else bowl(trial).value
        return Outcome(value=value, epochs=1)

    config = SearchConfig(sampler="random", trials=5, extensions=0)
    found = search(SPACE, objective, config, run)
    rows = table(run)
    assert [row["state"] for row in rows] == ["done", "failed", "failed", "failed", "done"]
    assert rows[1]["error"] == "RuntimeError: out of memory"
    assert rows[2]["error"] == "the value is nan"
    assert rows[3]["error"] == "the loss is nan"
    assert found.best.number in (0, 4)


def test_what_the_user_has_to_mend_ends_the_search(tmp_path):
    def objective(trial):
        raise DatasetError("a file has gone")

    with pytest.raises(DatasetError, match="a file has gone"):
        search(SPACE, objective, SearchConfig(trials=2), folder(tmp_path / "run"))


def test_a_search_in_which_nothing_worked_says_so(tmp_path):
    def objective(trial):
        raise DivergedError("the loss is inf")

    with pytest.raises(ConfigError, match=r"every trial of the search failed.*the loss is inf"):
        search(SPACE, objective, SearchConfig(trials=2), folder(tmp_path / "run"))


def test_a_grid_grows_by_the_next_value_beyond_the_edge_with_the_best_one(tmp_path):
    run = folder(tmp_path / "run")

    def objective(trial):
        return Outcome(value=trial.parameters["rate"] - trial.parameters["batch"] / 1e5, epochs=1)

    config = SearchConfig(sampler="grid", extensions=5)
    found = search(GRID, objective, config, run)
    rows = table(run)
    assert [row["round"] for row in rows] == ["0"] * 4 + ["1"] * 5
    assert found.best.parameters == {"rate": 0.001, "batch": 64}
    tried = [(row["rate"], row["batch"]) for row in rows]
    assert len(set(tried)) == len(tried) == 9


def test_a_range_is_extended_a_bounded_number_of_times_and_not_past_its_limit(tmp_path):
    run = folder(tmp_path / "run")
    space = {"rate": Range(low=0.4, high=0.8, lowest=0.0, highest=0.9)}

    def objective(trial):
        return Outcome(value=-trial.parameters["rate"], epochs=1)

    config = SearchConfig(sampler="random", trials=40, extensions=3)
    found = search(space, objective, config, run)
    assert {row["round"] for row in table(run)} == {"0", "1"}
    assert 0.8 < found.best.parameters["rate"] <= 0.9


def test_ranges_widen_on_the_side_of_the_best_value_only():
    rate = Range(low=1e-3, high=1e-1, lowest=1e-5, highest=1.0, log=True)
    assert rate.extended(1.05e-3).low == pytest.approx(1e-4)
    assert rate.extended(1.05e-3).high == 1e-1
    assert rate.extended(0.095).high == pytest.approx(1.0)
    assert rate.extended(1e-2) == rate
    ladder = Choices(rungs=(1, 2, 4, 8), first=1, last=2)
    assert ladder.extended(4).values == (2, 4, 8)
    assert ladder.extended(2).values == (1, 2, 4)
    assert Choices(rungs=(1, 2, 4), first=0, last=2).extended(4).values == (1, 2, 4)


def test_another_search_is_not_continued(tmp_path):
    run = folder(tmp_path / "run")
    search(SPACE, bowl, SearchConfig(trials=2, extensions=0), run)
    with pytest.raises(ConfigError, match="other settings"):
        search(SPACE, bowl, SearchConfig(trials=3, extensions=0), run)


def test_a_grid_of_ranges_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="rate is a range"):
        search(SPACE, bowl, SearchConfig(sampler="grid"), folder(tmp_path / "run"))

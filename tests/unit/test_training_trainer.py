"""The state of a training: stopping, halving of the rate, and runs of earlier versions."""

import json

from lungwatch.training.fitting.run import RunFolder
from lungwatch.training.fitting.trainer import FitConfig, FitState


def follow(values, config):
    """The state after epochs with these validation losses."""
    state = FitState(learning_rate=config.rate(1))
    for epoch, value in enumerate(values, start=1):
        state = state.after({"epoch": epoch, "val": value}, config, "val")
    return state


def test_training_stops_after_patience_and_the_rate_is_halved_on_a_plateau():
    config = FitConfig(epochs=10, patience=3, plateau=2, learning_rate=0.4)
    waiting = follow([1.0, 0.5, 0.6, 0.7], config)
    assert (waiting.best_epoch, waiting.learning_rate, waiting.finished) == (2, 0.2, False)
    assert follow([1.0, 0.5, 0.6, 0.7, 0.8], config).finished


def test_without_a_monitored_value_the_last_epoch_is_kept():
    config = FitConfig(epochs=2, patience=None)
    state = FitState(learning_rate=1.0).after({"epoch": 1}, config, None)
    assert (state.best_epoch, state.finished) == (1, False)
    assert state.after({"epoch": 2}, config, None).finished


def test_states_of_earlier_versions_are_read(tmp_path):
    """Segmenters kept the history only, gates and fields the phase and the step."""
    run = RunFolder(root=tmp_path)
    assert FitState.read(run) is None
    rows = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    (tmp_path / "state.json").write_text(json.dumps({"history": rows}))
    segmenter = FitState.read(run)
    assert (segmenter.epoch, segmenter.checkpoint) == (2, "checkpoint-0002.keras")
    gate = {"phase": 2, "step": 3, "checkpoint": "checkpoint-2-000003.keras", "history": rows}
    (tmp_path / "state.json").write_text(json.dumps(gate))
    found = FitState.read(run)
    assert (found.epoch, found.checkpoint) == (2, "checkpoint-2-000003.keras")

"""Forms of `lungwatch evaluate` that measure something else than figures on data sets."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import click

_OF_DATA = ("resume", "turned", "lung_masks", "threshold_aim", "threshold_data")
_OF_GATE = ("left_out", "gate_refuse", "gate_bounds")


def other_form(given: Mapping[str, Any]) -> bool:
    """Measure a content gate, a release gate or maps on opacities, if that was asked for.

    Parameters
    ----------
    given
        The command's parameters, by name.

    Returns
    -------
    bool
        False if none of them was asked for.

    Raises
    ------
    click.UsageError
        If options do not go together.
    """
    if not given["gate"]:
        _refuse(given, _OF_GATE, "needs --gate")
    if given["gate_images"]:
        _refuse(given, ("data", "resume", "gate", "lesion_masks"), "does not go with --gate-images")
        _content_gate(given)
        return True
    _refuse(given, ("turned",), "needs --gate-images")
    if given["gate"]:
        _refuse(given, (*_OF_DATA, "compare"), "does not go with --gate")
        if not given["data"]:
            raise click.UsageError("give DATA to measure on: --gate needs some")
        _release_gate(given)
        return True
    if given["lesion_masks"]:
        _refuse(given, (*_OF_DATA, "data"), "goes with --lesion-masks only under --gate")
        _lesions(given)
        return True
    return False


class ProgressBar:
    """A progress bar on stderr, drawn on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def start(self, total: int) -> Callable[[int], None]:
        """Draw the bar for so many images; what is returned is told of each."""
        hidden = not sys.stderr.isatty()
        self._bar = click.progressbar(length=total, label="reading", file=sys.stderr, hidden=hidden)
        self._bar.__enter__()
        return cast(Callable[[int], None], self._bar.update)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if given[name]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} {why}")


def _content_gate(given: Mapping[str, Any]) -> None:
    from lungwatch.cli.evaluate_gate import evaluate_gate

    with ProgressBar() as bar:
        evaluate_gate(
            given["model"],
            given["gate_images"],
            turned=given["turned"],
            out=given["out"],
            as_json=given["as_json"],
            on_total=bar.start,
        )


def _release_gate(given: Mapping[str, Any]) -> None:
    from lungwatch.cli.evaluate_release import evaluate_release
    from lungwatch.training.bootstrap import Bootstrap

    with ProgressBar() as bar:
        evaluate_release(
            given["model"],
            given["data"],
            split=None if given["split"] == "all" else given["split"],
            bootstrap=Bootstrap(resamples=given["bootstrap"], seed=given["seed"]),
            lesion_masks=given["lesion_masks"],
            left_out=given["left_out"],
            refuse=given["gate_refuse"],
            bounds=given["gate_bounds"],
            out=given["out"],
            as_json=given["as_json"],
            on_total=bar.start,
        )


def _lesions(given: Mapping[str, Any]) -> None:
    from lungwatch.cli.evaluate_lesions import evaluate_lesions
    from lungwatch.training.bootstrap import Bootstrap

    evaluate_lesions(
        given["model"],
        given["lesion_masks"],
        Bootstrap(resamples=given["bootstrap"], seed=given["seed"]),
        compare=given["compare"],
        out=given["out"],
        as_json=given["as_json"],
    )

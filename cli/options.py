"""Options that several commands share, as decorators."""

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lungwatch.training.fitting.run import Progress
    from lungwatch.training.networks.backbones import Normalisation


Command = TypeVar("Command", bound=Callable[..., Any])


_RELATIVE = re.compile(r"(\d{1,6})\s*([mhdw])")

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_since(text: str) -> datetime:
    """Return the instant that an ISO date or time, or "24h" for so long ago, means.

    Without a zone, the machine's own is meant; a date alone means its beginning.
    """
    return _parse(text.strip(), end_of_day=False)


def parse_until(text: str) -> datetime:
    """Return an instant like `parse_since`; a date alone means its end."""
    return _parse(text.strip(), end_of_day=True)


def _parse(text: str, *, end_of_day: bool) -> datetime:
    try:
        if relative := _RELATIVE.fullmatch(text):
            number, unit = relative.groups()
            return datetime.now(UTC) - timedelta(**{_UNITS[unit]: int(number)})
        if _DATE.fullmatch(text):
            day = date.fromisoformat(text) + timedelta(days=int(end_of_day))
            return datetime.combine(day, time()).astimezone()
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.astimezone()
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is no date or time: write 2026-01-31, 2026-01-31T08:00, or 90m, 24h, 7d, "
            "2w for so long ago"
        ) from error


class _LabelChoice(click.Choice[str]):
    """The labels; who asks for the former name of one is told the present one."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if str(value).upper() == "NORMAL":
            self.fail("the label NORMAL is called NEGATIVE: no COVID pattern seen", param, ctx)
        return super().convert(value, param, ctx)


class _FlagChoice(click.Choice[str]):
    """The closed list of flags; an unknown one comes with the nearest names."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        wanted = str(value).lower()
        if wanted not in self.choices:
            near = difflib.get_close_matches(wanted, self.choices, n=3, cutoff=0.4)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            self.fail(f"there is no flag {value!r}{meant} `--help` lists them.", param, ctx)
        return super().convert(value, param, ctx)


def _finding_name(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Take what a model may call a finding; which ones there are, only results tell."""
    if value is not None and not re.fullmatch(r"[a-z][a-z0-9_]*", value.lower()):
        raise click.BadParameter(f"{value!r} is no name of a finding; 'opacity' is one.")
    return value and value.lower()


def home_options(command: Command) -> Command:
    """Add `--home` and `--config`, passed as `home` and `config_path`."""
    command = click.option(
        "--config",
        "config_path",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="LUNGWATCH_CONFIG",
        show_envvar=True,
        help="Configuration file; HOME/lungwatch.toml if it is there.",
    )(command)
    return click.option(
        "--home",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="LUNGWATCH_HOME",
        show_envvar=True,
        help="The daemon's home; ./lungwatch-home if neither this nor the configuration says.",
    )(command)


def json_option(command: Command) -> Command:
    """Add `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def filter_options(*, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add the options that choose results, passed under the names of `ResultFilter`."""
    from lungwatch.db.states import State
    from lungwatch.errors import Flag

    score = click.FloatRange(0.0, 1.0)
    labels = _LabelChoice(["COVID", "NEGATIVE", "UNCERTAIN"], case_sensitive=False)
    flags = _FlagChoice(list(map(str, Flag)), case_sensitive=False)
    options = {
        "since": click.option(
            "--since",
            type=parse_since,
            metavar="TIME",
            help="Received at or after: ISO time, 24h, 7d.",
        ),
        "until": click.option(
            "--until",
            type=parse_until,
            metavar="TIME",
            help="Received before: ISO time, 24h, 7d; a date includes that day.",
        ),
        "made_since": click.option(
            "--made-since",
            type=parse_since,
            metavar="TIME",
            help="Finished at or after, the last finished first: ISO time, 24h, 7d.",
        ),
        "label": click.option("--label", type=labels, help="With this label."),
        "status": click.option(
            "--status", type=click.Choice(list(map(str, State))), help="In this state."
        ),
        "flag": click.option(
            "--flag",
            type=flags,
            metavar="FLAG",
            help=f"With this flag: {', '.join(Flag)} (docs/flags.md).",
        ),
        "finding": click.option(
            "--finding",
            callback=_finding_name,
            metavar="NAME",
            help="Scored for this finding; --min-score and --max-score then mean its probability.",
        ),
        "min_score": click.option("--min-score", type=score, help="Probability at least."),
        "max_score": click.option("--max-score", type=score, help="Probability at most."),
        "patient": click.option("--patient", help="Patient ID, exactly."),
        "accession": click.option("--accession", help="Accession number, exactly."),
        "study": click.option("--study", help="Study instance UID, exactly."),
        "model": click.option("--model", help="Model: name, or name-version."),
        "limit": click.option(
            "--limit", type=click.IntRange(min=1), help="At most so many, the newest."
        ),
    }

    def add(command: Command) -> Command:
        taken: Command = command
        for name, option in reversed(options.items()):
            if name not in without:
                taken = option(taken)
        return taken

    return add


def _label_map(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> Any:  # noqa: ANN401 - a LabelMap, whose module is imported when it is needed
    if not texts:
        return None
    from lungwatch.training.data.dataset import LabelMap

    return LabelMap.parse(texts)


label_map_option = click.option(
    "--label-map",
    "labels",
    multiple=True,
    metavar="LABEL=FINDING",
    callback=_label_map,
    help="What a label or class folder means that is no finding: PNEUMONIA=OTHER_PNEUMONIA, or "
    "PNEUMONIA=ignore to leave its images out; repeatable.",
)


def foreign_options(command: Command) -> Command:
    """Add `--output`, `--input-range` and `--channels`, of a .keras file of another make."""
    options = [
        click.option(
            "--output",
            metavar="KIND",
            help="Of a .keras file that lungwatch did not make: sigmoid (one probability, of "
            "COVID), logit, or softmax:INDEX, INDEX being the output of COVID, from 0.",
        ),
        click.option(
            "--input-range",
            metavar="RANGE",
            help="Of such a file: 0..1, 0..255, -1..1, or MEAN/STD of grey values within 0..1, "
            "as 0.5/0.25; one number for each channel with commas between.",
        ),
        click.option(
            "--channels", type=click.IntRange(1), help="Of such a file: 1, or 3 equal ones."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def gate_source_options(command: Command) -> Command:
    """Add `--gate`, `--gate-keep` and `--gate-refuse`, of the content gate that a bundle gets."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    options = [
        click.option(
            "--gate",
            type=folder,
            metavar="RUN",
            help="Content gate: a run folder of `train gate`, or a bundle that lends its gate.",
        ),
        click.option(
            "--gate-keep",
            type=folder,
            multiple=True,
            metavar="DIR",
            help="Upright frontal chest X-rays to measure the gate on, as they are, turned and "
            "inverted; repeatable.",
        ),
        click.option(
            "--gate-refuse",
            type=folder,
            multiple=True,
            metavar="DIR",
            help="Pictures of something else to measure the gate on; repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def data_argument(command: Command) -> Command:
    """Add the argument DATA, passed as `data`."""
    return click.argument("data", type=click.Path(path_type=Path))(command)


def batch_size_option(*, default: int) -> Callable[[Command], Command]:
    """Return the option `--batch-size`, passed as `batch_size`."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Images of a step.",
    )


def dropout_option(*, default: float) -> Callable[[Command], Command]:
    """Return the option `--dropout`, passed as `dropout`."""
    return click.option(
        "--dropout",
        type=click.FloatRange(0, 0.95),
        default=default,
        show_default=True,
        help="Share of the features left out in training, before the last layer.",
    )


def run_options(command: Command) -> Command:
    """Add `--out`, `--seed` and `--resume`."""
    options = [
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            required=True,
            help="Run folder to fill: configuration, history, plots, metrics, model.keras.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            default=1,
            show_default=True,
            help="Of every random choice: the same seed gives the same numbers.",
        ),
        click.option(
            "--resume", is_flag=True, help="Continue the interrupted run in the run folder."
        ),
    ]
    return _all(options, command)


size_option = click.option(
    "--size", type=click.IntRange(32, 1024), default=128, show_default=True, help="Input side, px."
)


leave_out_option = click.option(
    "--leave-out",
    metavar="SOURCE",
    help="Learn nothing from this source, so that it can test what was learnt.",
)


leaks_option = click.option(
    "--leaks",
    type=click.Choice(["refuse", "drop", "allow"]),
    default="refuse",
    show_default=True,
    help="X-rays or patients that stand in two splits: stop, leave them out of the one that is "
    "learnt from, or do not look.",
)


def data_options(command: Command) -> Command:
    """Add `--size`, `--leave-out`, `--leaks` and `--label-map`."""
    options = [
        size_option,
        leave_out_option,
        leaks_option,
        label_map_option,
    ]
    return _all(options, command)


def normalisation_options(*further: str, explained: str = "") -> Callable[[Command], Command]:
    """Add `--normalisation`, also of further kinds, which are explained; `--mean` and `--std`."""
    options = [
        click.option(
            "--normalisation",
            type=click.Choice(["train", "all", "fixed", "image", *further]),
            default="train",
            show_default=True,
            help="Grey levels by mean and deviation of the training set, of all splits, as given, "
            f"or of each image{explained}.",
        ),
        click.option("--mean", type=float, help="For 'fixed', 0..1; 0.5 if not given."),
        click.option("--std", type=float, help="For 'fixed', 0..1; 0.25 if not given."),
    ]
    return lambda command: _all(options, command)


def report(metrics: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Print what came out of a run."""
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
        return
    phase = f" ({metrics['phase']})" if "phase" in metrics else ""
    if "search" in metrics:
        best = metrics["search"]["best"]
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in best["parameters"].items())
        click.echo(f"best of {metrics['search']['trials']} trials: {best['number']} ({chosen})")
    click.echo(
        f"best epoch {metrics['best_epoch']} of {metrics['epochs']}{phase}; validation: "
        f"{_figures(metrics['validation'])} at threshold {metrics['decision']['threshold']:.3f}"
    )
    if "test" in metrics:
        click.echo(f"test: {_figures(metrics['test'])}")
    click.echo(f"run folder: {out}")


def progress() -> "Progress":
    """Lines for a log file; on a terminal also a bar that is drawn over."""
    from lungwatch.training.fitting.run import Progress

    terminal = sys.stderr.isatty()
    start = "\r" if terminal else ""

    def on_batch(epoch: int, batch: int, batches: int) -> None:
        filled = math.floor(30 * batch / batches)
        bar = "#" * filled + "-" * (30 - filled)
        click.echo(f"\repoch {epoch} [{bar}] {batch}/{batches}", err=True, nl=False)

    def on_epoch(row: dict[str, float]) -> None:
        line = f"epoch {row['epoch']}: loss {row['loss']:.4f}"
        if "val_loss" in row:
            line += f", validation loss {row['val_loss']:.4f}"
        if "val_auc" in row:
            line += f", ROC-AUC {row['val_auc']:.4f}"
        click.echo(start + line.ljust(60), err=True)

    def on_trial(row: dict[str, Any]) -> None:
        said = row["error"] if row["value"] is None else f"{row['value']:.4f}"
        click.echo(start + f"trial {row['number']} {row['state']}: {said}".ljust(60), err=True)

    return Progress(on_batch=on_batch if terminal else None, on_epoch=on_epoch, on_trial=on_trial)


def _figures(found: dict[str, Any]) -> str:
    return (
        f"ROC-AUC {found['roc_auc']:.3f}, sensitivity {found['sensitivity']:.3f}, specificity "
        f"{found['specificity']:.3f}"
    )


def _all(options: Sequence[Callable[[Any], Any]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


_BACKBONE_ALONE = "backbone"


def backbone_options(*, weights: str) -> Callable[[Command], Command]:
    """Add `--backbone` and `--weights`, by default those."""

    def add(command: Command) -> Command:
        command = click.option(
            "--weights",
            default=weights,
            show_default=True,
            help="imagenet (for efficientnet-lite0 from the extra 'lite0', else fetched from the "
            "network), none, a run folder, or a file: a Keras model or weights (.h5).",
        )(command)
        return click.option(
            "--backbone",
            default="ResNet50V2",
            show_default=True,
            help="efficientnet-lite0, or a network of keras.applications.",
        )(command)

    return add


def grey_options(command: Command) -> Command:
    """Add `--normalisation`, `--mean` and `--std`; see `normalisation_of`."""
    explained = "; or by the backbone's own scaling alone"
    return normalisation_options(_BACKBONE_ALONE, explained=explained)(command)


def normalisation_of(kind: str, mean: float | None, std: float | None) -> "Normalisation | None":
    """Read the options' values; None leaves the grey levels to the backbone.

    Raises
    ------
    ConfigError
        If mean and std do not belong to that kind.
    """
    from lungwatch.training.networks.backbones import Normalisation

    if kind == _BACKBONE_ALONE and mean is None and std is None:
        return None
    return Normalisation(
        kind="train" if kind == _BACKBONE_ALONE else kind,  # type: ignore[arg-type]  # a choice
        mean=mean,
        std=std,
    )

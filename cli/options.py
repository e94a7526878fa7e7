"""Options that several commands share, as decorators."""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from lungwatch.training.networks.backbones import Normalisation


Command = TypeVar("Command", bound=Callable[..., Any])


_RELATIVE = re.compile(r"(\d{1,6})\s*([mhdw])")

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


any_path = click.Path(path_type=Path)
file_path = click.Path(dir_okay=False, path_type=Path)
folder_path = click.Path(file_okay=False, path_type=Path)
existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
existing_folder = click.Path(exists=True, file_okay=False, path_type=Path)


def apply_all(options: Sequence[Callable[[Any], Any]], command: Command) -> Command:
    """Apply several option decorators; `--help` lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def setting(name: str, default: object, kind: Any, text: str) -> Callable[[Command], Command]:  # noqa: ANN401 - click takes types and callables
    """Return an option of a type with a default, which `--help` shows."""
    return click.option(name, type=kind, default=default, show_default=True, help=text)


def parse_since(text: str) -> datetime:
    """Return the time of an ISO date or time, or of an age such as "24h".

    Without a zone it is local time; a date alone means the start of that day.
    """
    return _parse(text.strip(), end_of_day=False)


def parse_until(text: str) -> datetime:
    """Return a time like `parse_since`; a date alone means the end of that day."""
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
            f"{text!r} is not a date or time: give 2026-01-31, 2026-01-31T08:00, or an age such as "
            "90m, 24h, 7d or 2w"
        ) from error


class _LabelChoice(click.Choice[str]):
    """The labels; the error for the former name NORMAL gives the present one."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        if str(value).upper() == "NORMAL":
            self.fail("the label NORMAL is called NEGATIVE: no COVID pattern seen", param, ctx)
        return super().convert(value, param, ctx)


class _FlagChoice(click.Choice[str]):
    """The flags; the error for an unknown one suggests the nearest."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        wanted = str(value).lower()
        if wanted not in self.choices:
            near = difflib.get_close_matches(wanted, self.choices, n=3, cutoff=0.4)
            meant = f"; did you mean {' or '.join(near)}?" if near else ";"
            self.fail(f"there is no flag {value!r}{meant} `--help` lists them.", param, ctx)
        return super().convert(value, param, ctx)


def _finding_name(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Check the form of a finding's name; only results know which findings there are."""
    if value is not None and not re.fullmatch(r"[a-z][a-z0-9_]*", value.lower()):
        raise click.BadParameter(f"{value!r} is not a finding's name, such as 'opacity'.")
    return value and value.lower()


def json_option(command: Command) -> Command:
    """Add `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def csv_option(command: Command) -> Command:
    """Add `--csv`, passed as `as_csv`."""
    return click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")(command)


def one_format(*, as_json: bool, as_csv: bool) -> None:
    """Raise a usage error for both `--json` and `--csv`."""
    if as_json and as_csv:
        raise click.UsageError("give either --json or --csv")


def filter_options(*, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add the options that select results, passed together as `selected`, a `ResultFilter`."""
    from lungwatch.errors import Flag

    labels = _LabelChoice(["COVID", "NEGATIVE", "UNCERTAIN"], case_sensitive=False)
    flags = _FlagChoice(list(map(str, Flag)), case_sensitive=False)
    score = click.FloatRange(0.0, 1.0)
    settings: dict[str, dict[str, Any]] = {
        "since": {
            "type": parse_since,
            "metavar": "TIME",
            "help": "Received at or after: ISO time, 24h, 7d.",
        },
        "until": {
            "type": parse_until,
            "metavar": "TIME",
            "help": "Received before: ISO time, 24h, 7d; a date includes that day.",
        },
        "made_since": {
            "type": parse_since,
            "metavar": "TIME",
            "help": "Finished at or after, the last finished first: ISO time, 24h, 7d.",
        },
        "label": {"type": labels, "help": "Label."},
        "status": {"help": "State of processing."},
        "flag": {
            "type": flags,
            "metavar": "FLAG",
            "help": f"Flag: {', '.join(Flag)} (docs/flags.md).",
        },
        "finding": {
            "callback": _finding_name,
            "metavar": "NAME",
            "help": "With a probability of this finding; --min-score and --max-score then apply "
            "to it.",
        },
        "min_score": {"type": score, "help": "Lowest probability."},
        "max_score": {"type": score, "help": "Highest probability."},
        "patient": {"help": "Patient ID, exact."},
        "accession": {"help": "Accession number, exact."},
        "study": {"help": "Study Instance UID, exact."},
        "model": {"help": "Model: NAME or NAME-VERSION."},
        "limit": {"type": click.IntRange(min=1), "help": "Maximum number; the newest are kept."},
    }
    if "status" not in without:
        # The only choices that need the database package.
        from lungwatch.db.models import State

        settings["status"]["type"] = click.Choice(list(map(str, State)))
    names = [name for name in settings if name not in without]

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def with_filter(**options: Any) -> Any:  # noqa: ANN401 - click's options by name
            from lungwatch.db.queries import ResultFilter

            selected = ResultFilter(**{name: options.pop(name) for name in names})
            return command(selected=selected, **options)

        return apply_all(
            [click.option(f"--{name.replace('_', '-')}", **settings[name]) for name in names],
            cast(Command, with_filter),
        )

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
    help="Class of a label or class folder of another name, e.g. PNEUMONIA=OTHER_PNEUMONIA; "
    "PNEUMONIA=ignore excludes its images. Repeatable.",
)


def foreign_options(command: Command) -> Command:
    """Add `--output`, `--input-range` and `--channels`, which declare a foreign .keras file."""
    options = [
        click.option(
            "--output",
            metavar="KIND",
            help="Output of a .keras file not made by lungwatch: sigmoid (probability of COVID), "
            "logit, or softmax:INDEX with the zero-based index of COVID.",
        ),
        click.option(
            "--input-range",
            metavar="RANGE",
            help="Input range of such a file: 0..1, 0..255, -1..1, or MEAN/STD of grey values in "
            "0..1, e.g. 0.5/0.25; comma-separated for several channels.",
        ),
        click.option(
            "--channels",
            type=click.IntRange(1),
            help="Input channels of such a file: 1, or 3 identical ones.",
        ),
    ]
    return apply_all(options, command)


def gate_source_options(command: Command) -> Command:
    """Add `--gate`, `--gate-keep` and `--gate-refuse`: the content gate of a new bundle."""
    options = [
        click.option(
            "--gate",
            type=existing_folder,
            metavar="RUN",
            help="Content gate: run folder of `train gate`, or a bundle to copy the gate from.",
        ),
        click.option(
            "--gate-keep",
            type=existing_folder,
            multiple=True,
            metavar="DIR",
            help="Upright frontal chest X-rays to measure the gate on, unchanged, rotated and "
            "inverted. Repeatable.",
        ),
        click.option(
            "--gate-refuse",
            type=existing_folder,
            multiple=True,
            metavar="DIR",
            help="Other pictures to measure the gate on. Repeatable.",
        ),
    ]
    return apply_all(options, command)


def data_argument(command: Command) -> Command:
    """Add the argument DATA, passed as `data`."""
    return click.argument("data", type=any_path)(command)


def run_options(*, seed: bool = True) -> Callable[[Command], Command]:
    """Return the options `--out`, `--resume` and, with `seed`, `--seed`."""
    options = [
        click.option(
            "--out",
            type=folder_path,
            required=True,
            help="Run folder: configuration, history, plots, metrics, model.keras.",
        ),
        click.option("--resume", is_flag=True, help="Continue the run of an existing run folder."),
    ]
    if seed:
        options.append(setting("--seed", 1, click.IntRange(0), "Random seed."))
    return lambda command: apply_all(options, command)


def size_option(*, default: int) -> Callable[[Command], Command]:
    """Return the option `--size`."""
    return setting("--size", default, click.IntRange(32, 1024), "Side of the square input, px.")


def epochs_option(*, default: int, stops_early: bool = True) -> Callable[[Command], Command]:
    """Return the option `--epochs`."""
    return setting(
        "--epochs",
        default,
        click.IntRange(1),
        "Maximum number of epochs." if stops_early else "Number of epochs.",
    )


def patience_option(*, default: int) -> Callable[[Command], Command]:
    """Return the option `--patience`."""
    return setting(
        "--patience",
        default,
        click.IntRange(1),
        "Early stopping: epochs without a lower validation loss.",
    )


def batch_size_option(*, default: int) -> Callable[[Command], Command]:
    """Return the option `--batch-size`."""
    return setting("--batch-size", default, click.IntRange(1), "Mini-batch size.")


def learning_rate_option(*, default: float, of: str) -> Callable[[Command], Command]:
    """Return the option `--learning-rate`; `of` says which one."""
    return setting("--learning-rate", default, float, f"Learning rate ({of}).")


def dropout_option(*, default: float) -> Callable[[Command], Command]:
    """Return the option `--dropout`."""
    return setting(
        "--dropout", default, click.FloatRange(0, 0.95), "Dropout rate before the last layer."
    )


def step_options(
    *, steps: int, batch_size: int, learning_rate: float, checkpoint_steps: int
) -> Callable[[Command], Command]:
    """Return the options of a training by steps from ImageNet weights, with these defaults."""
    options = [
        setting("--steps", steps, click.IntRange(1), "Training steps."),
        batch_size_option(default=batch_size),
        learning_rate_option(default=learning_rate, of="maximum, of AdamW"),
        setting(
            "--checkpoint-steps", checkpoint_steps, click.IntRange(1), "Steps between checkpoints."
        ),
        click.option(
            "--random-start", is_flag=True, help="Start from random weights, not ImageNet's."
        ),
    ]
    return lambda command: apply_all(options, command)


leave_out_option = click.option(
    "--leave-out", metavar="SOURCE", help="Exclude this source from training, to test on it."
)


leaks_option = setting(
    "--leaks",
    "refuse",
    click.Choice(["refuse", "drop", "allow"]),
    "X-rays or patients in two splits: stop, drop them from the training split, or allow.",
)


def data_options(command: Command) -> Command:
    """Add `--size`, `--leave-out`, `--leaks` and `--label-map`."""
    options = [size_option(default=128), leave_out_option, leaks_option, label_map_option]
    return apply_all(options, command)


def normalisation_options(*further: str, explained: str = "") -> Callable[[Command], Command]:
    """Add `--normalisation`, with further kinds; `--mean` and `--std`."""
    options = [
        setting(
            "--normalisation",
            "train",
            click.Choice(["train", "all", "fixed", "image", *further]),
            "Normalise by mean and standard deviation of the training split, all splits, "
            f"fixed values, or each image{explained}.",
        ),
        click.option("--mean", type=float, help="Mean for 'fixed', 0..1; 0.5 if not given."),
        click.option(
            "--std", type=float, help="Standard deviation for 'fixed', 0..1; 0.25 if not given."
        ),
    ]
    return lambda command: apply_all(options, command)


_BACKBONE_ALONE = "backbone"


def backbone_options(*, weights: str) -> Callable[[Command], Command]:
    """Add `--backbone` and `--weights`; `weights` is the default of the latter."""

    def add(command: Command) -> Command:
        command = click.option(
            "--weights",
            default=weights,
            show_default=True,
            help="Initial weights: imagenet (for efficientnet-lite0 from the extra 'lite0', else "
            "downloaded), none, a run folder, or a file: a Keras model or weights (.h5).",
        )(command)
        return click.option(
            "--backbone",
            default="ResNet50V2",
            show_default=True,
            help="Backbone: efficientnet-lite0, or a network of keras.applications.",
        )(command)

    return add


def grey_options(command: Command) -> Command:
    """Add `--normalisation`, `--mean` and `--std`; see `normalisation_of`."""
    explained = "; backbone: only its own scaling"
    return normalisation_options(_BACKBONE_ALONE, explained=explained)(command)


def normalisation_of(kind: str, mean: float | None, std: float | None) -> "Normalisation | None":
    """Return the normalisation of the options; None: only the backbone's own scaling.

    Raises
    ------
    ConfigError
        If mean and std do not go with that kind.
    """
    from lungwatch.training.networks.backbones import Normalisation

    if kind == _BACKBONE_ALONE and mean is None and std is None:
        return None
    return Normalisation(
        kind="train" if kind == _BACKBONE_ALONE else kind,  # type: ignore[arg-type]  # a choice
        mean=mean,
        std=std,
    )

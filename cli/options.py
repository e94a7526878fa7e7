"""Options that several commands share."""

import difflib
import re
from collections.abc import Callable, Collection
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

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
    from lungwatch.flags import Flag

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
    from lungwatch.training.label_map import LabelMap

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

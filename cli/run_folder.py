"""The run folder of a command that looks at data or measures a model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungwatch.atomicfile import make_dirs, write_atomic
from lungwatch.cli.output import to_json
from lungwatch.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from lungwatch.training.run import RunFolder


def begin_run(folder: Path, config: dict[str, Any], *, resume: bool) -> "RunFolder":
    """Open a run folder before the work whose result it holds.

    Raises
    ------
    ConfigError
        If it holds something already and is not to be resumed, was begun with another
        configuration, or cannot be made.
    """
    from lungwatch.training.run import RunFolder

    run = RunFolder(root=folder)
    try:
        begun = (folder / "config.json").is_file()
        if not begun and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; choose another folder")
        run.begin(config, resume=resume)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from error
    return run


def write_look(
    run: "RunFolder", results: object, report: str, pictures: Mapping[str, bytes]
) -> None:
    """Write results.json, plots and report.html.

    Raises
    ------
    DatasetError
        If they cannot be written.
    """
    files = {"results.json": (to_json(results) + "\n").encode("utf-8", "backslashreplace")}
    for number, (caption, data) in enumerate(pictures.items(), start=1):
        name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
        files[f"plots/{number:02d}-{name}.png"] = data
    files["report.html"] = report.encode("utf-8", "replace")
    try:
        make_dirs(run.root / "plots")
        for name, data in files.items():
            write_atomic(run.root / name, data)
    except OSError as error:
        raise DatasetError(f"{run.root} cannot be written: {error.strerror}") from error

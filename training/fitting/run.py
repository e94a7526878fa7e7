"""Folder of one training run, its environment, TensorFlow set-up and progress listener."""

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lungwatch.errors import ConfigError, MissingExtraError, NotFoundError
from lungwatch.files import make_dirs, replacing, write_atomic
from lungwatch.training.data.splits import DataRecord


def prepare_tensorflow(seed: int | None = None) -> None:
    """Import TensorFlow quietly and, with a seed, make it deterministic.

    Raises
    ------
    MissingExtraError
        If TensorFlow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _silent_stderr():
            import keras
            import tensorflow as tf
    except ImportError as error:
        raise MissingExtraError("training", "train") from error
    if seed is not None:
        keras.utils.set_random_seed(seed)
        tf.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # TensorFlow's C++ side writes start-up notes to the descriptor itself, before it has
    # read its own log level; stderr belongs to progress and errors.
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Listeners; every one may be None.

    Attributes
    ----------
    on_read
        Called with 1 after each image read.
    on_batch
        Called with (epoch, batch, batches) after each step.
    on_epoch
        Called with the epoch's row of the history.
    on_trial
        Called with the row of the search's table after each trial.
    """

    on_read: Callable[[int], None] | None = None
    on_batch: Callable[[int, int, int], None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None
    on_trial: Callable[[dict[str, Any]], None] | None = None


_PACKAGES = (
    "lungwatch",
    "tensorflow-cpu",
    "tensorflow",
    "keras",
    "numpy",
    "opencv-python-headless",
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Folder with the files of a run.

    Attributes
    ----------
    root
        The folder; `config.json`, `environment.json`, `state.json`, `history.csv`,
        `history.png`, `metrics.json` and `model.keras` are in it, and of a run on labelled
        X-rays `data.csv` and `learnt.json` (`splits`).
    """

    root: Path

    @property
    def model(self) -> Path:
        """The network of the best epoch."""
        return self.root / "model.keras"

    def refuse_taken(self, *, resume: bool) -> None:
        """Say at once, before data are read, that a folder holds a run.

        Raises
        ------
        ConfigError
            If it does and `resume` is not set.
        """
        if not resume and (self.root / "config.json").exists():
            raise ConfigError(f"{self.root} holds a run already; resume it or choose another")

    def begin(
        self,
        config: dict[str, Any],
        *,
        resume: bool,
        may_grow: Sequence[str] = (),
        record: DataRecord | None = None,
    ) -> bool:
        """Create the folder, or check that the one to be resumed has the same configuration.

        Parameters
        ----------
        config
            All that the results depend on.
        resume
            Whether the folder may hold a run.
        may_grow
            Numbers that may be larger than before, as "fit.epochs".
        record
            The run's data, which must be those that it began with.

        Returns
        -------
        bool
            Whether one of them is.

        Raises
        ------
        ConfigError
            If the folder holds a run already and `resume` is not set, or the configuration
            or the data differ from that run's.
        """
        self.refuse_taken(resume=resume)
        if record:
            record.check(self.root)
        now = json.loads(json.dumps(config))
        grown = False
        if (self.root / "config.json").exists():
            before = self.read("config.json")
            for name in may_grow:
                grown |= _take_over(name, before, now)
            if differing := [key for key in now if now[key] != before.get(key)]:
                raise ConfigError(
                    f"{self.root} was started with another configuration ({', '.join(differing)})"
                )
        make_dirs(self.root)
        self.write("config.json", now)
        self.write("environment.json", environment())
        if record:
            record.write(self.root)
        return grown

    def read(self, name: str) -> dict[str, Any]:
        """Read one of the JSON files.

        Raises
        ------
        NotFoundError
            If it is missing.
        """
        try:
            values: dict[str, Any] = json.loads((self.root / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.root} is no finished run: {name} is missing") from error
        return values

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write one of the JSON files, whole or not at all."""
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomic(self.root / name, text.encode())

    def write_table(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows, at least one, as CSV; the columns are those of the first row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.root / name, text.getvalue().encode())

    def adopt(self, file: Path) -> None:
        """Copy a file into the folder under its own name, whole or not at all."""
        with replacing(self.root / file.name) as temporary:
            shutil.copyfile(file, temporary)


def open_run(root: Path, *, resume: bool, seed: int | None = None) -> RunFolder:
    """Return a run's folder, and prepare TensorFlow; refuse a folder that holds a run already."""
    run = RunFolder(root=root)
    run.refuse_taken(resume=resume)
    prepare_tensorflow(seed)
    return run


def begin_run(folder: Path, config: dict[str, Any], *, resume: bool) -> RunFolder:
    """Create the run folder of an evaluation or data set report, or open one to resume.

    Raises
    ------
    ConfigError
        If the folder is not empty and holds no run, was begun with another configuration, or
        cannot be created.
    """
    run = RunFolder(root=folder)
    try:
        has_run = (folder / "config.json").is_file()
        if not has_run and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; choose another folder")
        run.begin(config, resume=resume)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created: {error.strerror}") from error
    return run


def _take_over(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Replace a number by its new value if that is larger; say whether it is."""
    *path, last = name.split(".")
    for key in path:
        before, now = before.get(key) or {}, now.get(key) or {}
    if last not in before or last not in now or not now[last] > before[last]:
        return False
    before[last] = now[last]
    return True


def environment() -> dict[str, Any]:
    """Versions and the source's git state; no host names and no paths."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": packages,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the source this runs from and whether it was changed; None outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "modified": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603  # fixed words only
            ["git", *arguments],  # noqa: S607  # git is wherever the user has it
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

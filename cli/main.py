"""`lungwatch`: the group that all commands hang on, imported only when they are used."""

from collections.abc import Mapping
from typing import IO, Any

import click

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.cli.lazy_group import LazyGroup
from lungwatch.errors import LungwatchError
from lungwatch.plaintext import visible

# Command -> (module:attribute, one line of help). The help stands here so that
# `lungwatch --help` imports no command, and with it neither onnxruntime nor TensorFlow.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("lungwatch.cli.run:run", "Screen every X-ray that is dropped into the home."),
    "results": ("lungwatch.cli.results:results", "Query, export and count the results."),
    "retry": ("lungwatch.cli.retry:retry", "Put refused or failed files through again."),
    "rescore": (
        "lungwatch.cli.rescore:rescore",
        "Score what is filed with another model, keeping both results.",
    ),
    "doctor": ("lungwatch.cli.doctor:doctor", "Check whether everything is there that runs need."),
    "reconcile": (
        "lungwatch.cli.reconcile:reconcile",
        "Prove that folders and database agree; mend what does not.",
    ),
    "pacs": (
        "lungwatch.cli.pacs:pacs",
        "Exchange images and results with a PACS (extra 'pacs').",
    ),
    "retention": ("lungwatch.cli.retention:retention", "Remove what was kept for long enough."),
    "backup": ("lungwatch.cli.backup:backup", "Back the database up, and restore it."),
    "audit": ("lungwatch.cli.audit:audit", "List who changed, removed or exported what."),
    "model": ("lungwatch.cli.model:model", "List, show, verify and sign model bundles."),
    "calibrate": (
        "lungwatch.cli.calibrate:calibrate",
        "Fit threshold and uncertain band to the site's own cases.",
    ),
    "dataset": (
        "lungwatch.cli.dataset:dataset",
        "Explore, check and split a data set (extra 'train').",
    ),
    "train": ("lungwatch.cli.train:train", "Train a model (extra 'train')."),
    "evaluate": ("lungwatch.cli.evaluate:evaluate", "Measure a model on a data set."),
    "export": ("lungwatch.cli.export:export", "Export a model to ONNX (extra 'train')."),
}


class FailedError(click.ClickException):
    """A domain error as the user sees it: one line on stderr, exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        # It may name a file whose name steers the terminal.
        line = visible(" ".join(self.message.split()))
        click.echo(f"lungwatch: error: {line}", file=file, err=file is None)


class _Lungwatch(LazyGroup):
    """The outermost group, where every domain error ends."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run a command; what it says went wrong is one line."""
        try:
            return super().invoke(ctx)
        except LungwatchError as error:
            raise FailedError(str(error)) from error


@click.group(
    cls=_Lungwatch,
    places=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Drop-folder screening of chest X-rays.\n\n{RESEARCH_USE_ONLY}",
    epilog="`lungwatch COMMAND --help` explains a command.",
)
@click.version_option(
    __version__, "--version", message=f"%(prog)s %(version)s\n{RESEARCH_USE_ONLY}"
)
def main() -> None:
    """Run the command line."""

"""`lungwatch`: the group of all commands, each imported only when it is called."""

import importlib
from collections.abc import Mapping
from typing import IO, Any

import click

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.errors import LungwatchError, visible


class LazyGroup(click.Group):
    """A group that knows its commands by name, place and one line of help.

    So `--help` imports no command, and with it neither onnxruntime nor TensorFlow.
    """

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 - click's own
        places: Mapping[str, tuple[str, str]],
        **keywords: Any,  # noqa: ANN401 - click's own
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order of use, not of the alphabet."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import a command."""
        if cmd_name not in self._places:
            return None
        module, _, attribute = self._places[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._places.items()])


# Command -> (module:attribute, one line of help). The help stands here so that
# `lungwatch --help` imports no command, and with it neither onnxruntime nor TensorFlow.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("lungwatch.cli.run:run", "Screen every X-ray that is dropped into the home."),
    "results": ("lungwatch.cli.results:results", "Query, export and count the results."),
    "retry": ("lungwatch.cli.run:retry", "Put refused or failed files through again."),
    "rescore": (
        "lungwatch.cli.run:rescore",
        "Score what is filed with another model, keeping both results.",
    ),
    "doctor": ("lungwatch.cli.run:doctor", "Check whether everything is there that runs need."),
    "reconcile": (
        "lungwatch.cli.run:reconcile",
        "Prove that folders and database agree; mend what does not.",
    ),
    "pacs": (
        "lungwatch.cli.pacs:pacs",
        "Exchange images and results with a PACS (extra 'pacs').",
    ),
    "retention": ("lungwatch.cli.keeping:retention", "Remove what was kept for long enough."),
    "backup": ("lungwatch.cli.keeping:backup", "Back the database up, and restore it."),
    "audit": ("lungwatch.cli.keeping:audit", "List who changed, removed or exported what."),
    "model": ("lungwatch.cli.model:model", "List, show, verify and sign model bundles."),
    "calibrate": (
        "lungwatch.cli.model:calibrate",
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

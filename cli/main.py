"""`lungwatch`: the group of all commands, and the home that they work on."""

import contextlib
import functools
import importlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.errors import DatabaseError, HomeError, LungwatchError, visible

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.home import Home
    from lungwatch.db.audit import Actor, Outcome


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called.

    Parameters
    ----------
    places
        Name of each command to "module:attribute" and the summary that `--help` lists.
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
        """Return the names in the given order; click would sort them."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import and return a command."""
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


# The summaries are repeated here so that `lungwatch --help` imports no command, and with it
# neither onnxruntime nor TensorFlow.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("lungwatch.cli.run:run", "Screen every X-ray that is dropped into the home."),
    "results": ("lungwatch.cli.results:results", "Query, export, count and compare results."),
    "retry": ("lungwatch.cli.run:retry", "Process rejected or failed files again."),
    "rescore": (
        "lungwatch.cli.run:rescore",
        "Score processed X-rays with another model, keeping both results.",
    ),
    "doctor": ("lungwatch.cli.run:doctor", "Check everything that a run needs."),
    "reconcile": (
        "lungwatch.cli.run:reconcile",
        "Compare folders and database file by file; repair differences.",
    ),
    "pacs": ("lungwatch.cli.pacs:pacs", "Exchange images and results with a PACS (extra 'pacs')."),
    "retention": ("lungwatch.cli.keeping:retention", "Remove files past their retention limits."),
    "backup": ("lungwatch.cli.keeping:backup", "Back up, verify and restore the database."),
    "audit": (
        "lungwatch.cli.keeping:audit",
        "List changes, deletions and exports, and who made them.",
    ),
    "query": (
        "lungwatch.cli.query:query",
        "Answer the query commands of users who may not read the home.",
    ),
    "model": ("lungwatch.cli.model:model", "List, show, verify, activate and sign model bundles."),
    "calibrate": ("lungwatch.cli.model:calibrate", "Calibrate a model on this site's own cases."),
    "dataset": (
        "lungwatch.cli.dataset:dataset",
        "Explore, check and split a data set (extra 'train').",
    ),
    "train": ("lungwatch.cli.train:train", "Train a model (extra 'train')."),
    "evaluate": ("lungwatch.cli.evaluate:evaluate", "Evaluate a model on data sets."),
    "export": ("lungwatch.cli.export:export", "Export a model to ONNX (extra 'train')."),
}


class FailedError(click.ClickException):
    """Error of a command: one line on stderr, exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        # It may quote a file name that holds terminal escape sequences.
        line = visible(" ".join(self.message.split()))
        click.echo(f"lungwatch: error: {line}", file=file, err=file is None)


class _Lungwatch(LazyGroup):
    """The outermost group: turns domain errors into one line and exit code 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the command line for the service that may have to run it (`lungwatch query`)."""
        ctx.meta["lungwatch.words"] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's signature
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LungwatchError as error:
            raise FailedError(str(error)) from error
        except BrokenPipeError:
            if not _is_unread(1):
                raise
            # As `head` leaves it: no message, the status of a death by SIGPIPE. What is still
            # buffered must not fail again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
            ctx.exit(128 + signal.SIGPIPE)


def _is_unread(descriptor: int) -> bool:
    """Say whether a descriptor is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


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


class Site:
    """A home, named by options or the environment; everything is loaded at first use.

    Parameters
    ----------
    home
        Its folder; None: as the configuration says.
    config_path
        Configuration file; None: the home's own, if there is one.
    """

    def __init__(self, home: Path | None, config_path: Path | None) -> None:
        self.named_home = home
        self.config_path = config_path

    @cached_property
    def config(self) -> "Config":
        """The configuration."""
        return self.reload_config()

    def reload_config(self) -> "Config":
        """Read the configuration anew; `config` stays as it is."""
        from lungwatch.daemon.configfile import load_config

        return load_config(self.config_path, self.named_home)

    @cached_property
    def home(self) -> "Home":
        """The folders."""
        from lungwatch.daemon.home import Home

        return Home(self.config.home)

    def require_home(self) -> None:
        """Raise HomeError if the daemon has never run in the home."""
        if not self.home.incoming.is_dir():
            raise HomeError(
                f"there is no lungwatch home at {self.home.root}; run `lungwatch run` first"
            )

    @contextlib.contextmanager
    def locked_if_free(self, *, creates: bool = True) -> Iterator[bool]:
        """Hold the home's lock unless a daemon holds it; yield whether none does.

        Without `creates`, a home without a lock file, in which no daemon has run, gets none.
        """
        with contextlib.ExitStack() as stack:
            if not creates and not self.home.lock_file.exists():
                yield True
                return
            try:
                stack.enter_context(self.home.locked())
                is_locked = True
            except HomeError:
                is_locked = False
            yield is_locked

    def is_daemon_running(self) -> bool:
        """Whether another process holds the home's lock."""
        with self.locked_if_free(creates=False) as is_locked:
            return not is_locked

    @contextlib.contextmanager
    def database(self, *, migrate: bool = False, owned: bool = False) -> "Iterator[Engine]":
        """Open the database, and close it at the end.

        Parameters
        ----------
        migrate
            Bring its schema up to date; else one of another version is an error. One that is
            missing always is.
        owned
            Refuse the database of another home.

        Raises
        ------
        DatabaseError
            If it cannot be used.
        HomeError
            If it belongs to another home.
        """
        from lungwatch.daemon.home import check_database
        from lungwatch.db.maintenance import open_database, open_existing

        url = self.config.database_url
        engine = open_database(url, creates=False) if migrate else open_existing(url)
        try:
            if owned:
                check_database(self.home, engine)
            yield engine
        finally:
            engine.dispose()


@dataclass(frozen=True, kw_only=True)
class Served:
    """Whom `lungwatch query` runs a command for, and in which home; the context's object."""

    site: Site
    actor: "Actor"


def home_options(command: Callable[..., Any], *, must_read: bool = True) -> Callable[..., Any]:
    """Add `--home` and `--config`, passed together as `site`.

    Unless it `must_read` the home, a command gets one that this user may not read, too.
    """

    @functools.wraps(command)
    def with_site(*, home: Path | None, config_path: Path | None, **options: Any) -> Any:  # noqa: ANN401 - click's options by name
        served = click.get_current_context().find_object(Served)
        return command(site=served.site if served else Site(home, config_path), **options)

    with_site = click.option(
        "--config",
        "config_path",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="LUNGWATCH_CONFIG",
        show_envvar=True,
        help="Configuration file; HOME/lungwatch.toml if it exists.",
    )(with_site)
    return click.option(
        "--home",
        type=click.Path(file_okay=False, readable=must_read, path_type=Path),
        envvar="LUNGWATCH_HOME",
        show_envvar=True,
        help="Home folder of the daemon; as configured, or ./lungwatch-home, if not given.",
    )(with_site)


def record_event(
    engine: "Engine",
    action: str,
    *,
    targets: Sequence[str | None] = (None,),
    outcome: "Outcome" = "ok",
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write one audit event for each target, at this moment, in the name of whom it is for."""
    from lungwatch.db.audit import AuditEvent
    from lungwatch.db.audit import record_events as write

    events = [
        AuditEvent(action=action, target=target, outcome=outcome, detail=detail or {})
        for target in targets
    ]
    context = click.get_current_context(silent=True)
    served = context.find_object(Served) if context else None
    write(engine, datetime.now(UTC), events, served.actor if served else None)


@contextlib.contextmanager
def auditing_failure(
    engine: "Engine", action: str, targets: Sequence[str | None] = (None,)
) -> Iterator[None]:
    """Write audit events with the outcome "failed" if the block raises."""
    try:
        yield
    except BaseException as error:
        # The database itself may be what fails; the error to report is the first one.
        with contextlib.suppress(DatabaseError):
            detail = {"error": type(error).__name__}
            record_event(engine, action, targets=targets, outcome="failed", detail=detail)
        raise


@contextlib.contextmanager
def audited(
    engine: "Engine", action: str, target: str, detail: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Write an audit event for the block: "ok" after it, or "failed" if it raises."""
    with auditing_failure(engine, action, [target]):
        yield
    record_event(engine, action, targets=[target], detail=detail)

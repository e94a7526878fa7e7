"""Every command of `lungwatch`, each in the context that it has when a user calls it.

A command keeps the help option of the first context that asks for it: one without its parents,
which give it `-h`, would take `-h` from every later call of the same process.
"""

from collections.abc import Iterator

import click

from lungwatch.cli.main import main


def outermost() -> click.Context:
    """Return the context of `lungwatch` itself."""
    return main.make_context("lungwatch", [], resilient_parsing=True)


def child(context: click.Context, name: str) -> click.Context | None:
    """Return the context of a group's command; None if it has none of that name."""
    assert isinstance(context.command, click.Group)
    command = context.command.get_command(context, name)
    return command and click.Context(command, parent=context, info_name=name)


def walk(context: click.Context | None = None) -> Iterator[click.Context]:
    """Yield the context of every group and command, the outermost first."""
    context = context or outermost()
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            inner = child(context, name)
            assert inner is not None
            yield from walk(inner)


def words(context: click.Context) -> tuple[str, ...]:
    """Return what is typed after `lungwatch` for a command."""
    return tuple(context.command_path.split()[1:])

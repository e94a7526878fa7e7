"""`lungwatch pacs`: what goes to and comes from a PACS."""

from collections.abc import Mapping

import click

from lungwatch.cli.lazy_group import LazyGroup

# Command -> (module:attribute, one line of help), imported when it is used.
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "listen": ("lungwatch.cli.pacs_listen:listen", "Receive images into the drop folder."),
    "echo": ("lungwatch.cli.pacs_echo:echo", "Ask destinations for a sign of life (C-ECHO)."),
    "send": ("lungwatch.cli.pacs_send:send", "Send results now, or once more."),
    "queue": ("lungwatch.cli.pacs_queue:queue", "List what waits to be sent, and what failed."),
}


@click.group(cls=LazyGroup, places=_COMMANDS)
def pacs() -> None:
    """Exchange images and results with a PACS (extra 'pacs')."""

"""DICOM network: receiving images, and sending results (extra `pacs`)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.stage import Progress
from lungwatch.errors import MissingExtraError

if TYPE_CHECKING:
    from lungwatch.daemon.pacs.commitment import CommitmentHandlers
    from lungwatch.daemon.pacs.listener import Listener


def make_listener(
    config: Config,
    home: Home,
    on_crash: Callable[[str, BaseException], None],
    progress: Progress | None = None,
    commitment: "CommitmentHandlers | None" = None,
) -> "Listener":
    """Open the configured port; `Listener` says how.

    Raises
    ------
    MissingExtraError
        If pynetdicom is not installed.
    ConfigError
        As `Listener`.
    """
    try:
        from lungwatch.daemon.pacs.listener import Listener  # noqa: PLC0415 - of the extra
    except ModuleNotFoundError as error:
        raise MissingExtraError("receiving from a PACS", "pacs") from error
    return Listener(config, home, on_crash, progress, commitment)

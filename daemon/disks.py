"""The file systems that a home lies on, and its backups' age, for the metrics."""

import contextlib
import shutil
from dataclasses import dataclass

from lungwatch.daemon.backup import backups
from lungwatch.daemon.home import Home
from lungwatch.db.backup import sqlite_path
from lungwatch.db.engine import parse_url
from lungwatch.errors import LungwatchError


@dataclass(frozen=True, kw_only=True)
class Disks:
    """What was found.

    Attributes
    ----------
    free
        Bytes free of each file system, under the first of "home", "overlays", "outbox",
        "backups" and "database" that lies on it.
    last_backup_at
        Of the newest backup, in seconds since the epoch; None if there is none.
    """

    free: dict[str, int]
    last_backup_at: float | None


def disks(home: Home, database_url: str) -> Disks:
    """Look at them.

    Raises
    ------
    OSError
        If the home is away.
    """
    folders = {
        "home": home.root,
        "overlays": home.overlays,
        "outbox": home.outbox,
        "backups": home.backups,
    }
    with contextlib.suppress(LungwatchError):  # another machine's
        folders["database"] = sqlite_path(parse_url(database_url)).parent
    names: dict[int, str] = {}
    for name, folder in folders.items():
        if name == "home" or folder.is_dir():
            names.setdefault(folder.stat().st_dev, name)
    newest = backups(home.backups)[-1:]
    return Disks(
        free={name: shutil.disk_usage(folders[name]).free for name in names.values()},
        last_backup_at=newest[0].stat().st_mtime if newest else None,
    )

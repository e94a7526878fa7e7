"""State of the daemon as another process sees it, whether it runs, hangs or does not run."""

import contextlib
import http.client
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.daemon.retry import TimeLimited
from lungwatch.db.maintenance import open_existing
from lungwatch.db.statistics import HealthCounts, health_counts
from lungwatch.errors import NotFoundError

_LIMIT_S = 5.0
_LOCKS = Path("/proc/locks")  # proc_locks(5)
_MOST_COUNTED = 100_000


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a home's lock.

    Attributes
    ----------
    uptime_s
        Since its start.
    is_stopped
        Whether a signal has stopped it (SIGSTOP).
    """

    pid: int
    uptime_s: float
    is_stopped: bool


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Files in the drop folder.

    Attributes
    ----------
    files
        Number of those that are not skipped for their names.
    skipped
        Number of files and folders that are skipped, by pattern.
    oldest_s
        Seconds since the oldest came or was last written to; None without a file.
    """

    files: int
    oldest_s: float | None
    skipped: dict[str, int]


def holder_of(home: Home) -> Holder | None:
    """Return the process that holds the home's lock; None without one, or if it is unknown.

    The lock is not tried, which could keep a daemon from starting.
    """
    try:
        status = home.lock_file.stat()
        locks = _LOCKS.read_text()
    except OSError:
        return None
    for pid, inode in re.findall(r"FLOCK\s+\S+\s+WRITE\s+(\d+)\s+\S+:(\d+)\s", locks):
        # The device numbers there are not those of `stat` on every file system.
        if int(inode) == status.st_ino and _has_open(int(pid), home.lock_file):
            return _holder(int(pid))
    return None


def ask_health(port: int) -> dict[str, object]:
    """Return the answer of /health of the daemon on this machine.

    Raises
    ------
    OSError
        If it does not answer in time.
    """

    def ask() -> dict[str, object]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
        try:
            connection.request("GET", "/health")
            found = json.loads(connection.getresponse().read())
        except (http.client.HTTPException, ValueError) as error:
            raise OSError("another program answers there") from error
        finally:
            connection.close()
        if not isinstance(found, dict) or "status" not in found:
            raise OSError("another program answers there")
        return found

    return TimeLimited(ask, limit_s=_LIMIT_S)()


def read_signs(config: Config) -> HealthCounts | None:
    """Return the counts of the database; None before the first run.

    Raises
    ------
    TimeoutError
        If it does not answer in time.
    DatabaseError
        If it cannot be read.
    """

    def read() -> HealthCounts | None:
        try:
            engine = open_existing(config.database_url)
        except NotFoundError:
            return None
        try:
            return health_counts(engine)
        finally:
            engine.dispose()

    return TimeLimited(read, limit_s=_LIMIT_S)()


def backlog_of(home: Home, names: NameRules, now: datetime) -> Backlog:
    """Count the files in the drop folder.

    Parameters
    ----------
    names
        Which names are skipped.

    Raises
    ------
    OSError
        If it is away, or does not answer in time.
    """

    def count() -> Backlog:
        home.incoming.stat()
        files, oldest = 0, now.timestamp()
        skipped: Counter[str] = Counter()
        for folder, folders, found in os.walk(home.incoming):
            rules = {name: names.rule_for(name) for name in (*folders, *found)}
            skipped.update(rule.pattern for rule in rules.values() if rule is not None)
            folders[:] = [name for name in folders if rules[name] is None]
            for name in found:
                if rules[name] is None and files < _MOST_COUNTED:
                    with contextlib.suppress(FileNotFoundError):
                        oldest = min(oldest, (Path(folder) / name).lstat().st_ctime)
                        files += 1
        return Backlog(
            files=files,
            oldest_s=now.timestamp() - oldest if files else None,
            skipped=dict(skipped),
        )

    return TimeLimited(count, limit_s=_LIMIT_S)()


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(link.samefile(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True  # another user's process: the inode is the only evidence
    except OSError:
        return False


def _holder(pid: int) -> Holder | None:
    try:
        # The command's name, in parentheses, may hold anything (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return None
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return Holder(
        pid=pid, uptime_s=round(max(0.0, booted_s - started_s), 1), is_stopped=fields[0] in "Tt"
    )


def age_s(since: datetime | None) -> float | None:
    """Return the seconds since a time, by this machine's clock."""
    if since is None:
        return None
    return round(max(0.0, (datetime.now(UTC) - since).total_seconds()), 1)

"""A home: its folders and lock, its database, and the daemon in it as other processes see it."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import stat
import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.config import Config
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.daemon.retry import TimeLimited
from lungwatch.db.engine import Owner, describe_url, owner_of, parse_url, take_ownership
from lungwatch.db.identity import read_lease
from lungwatch.db.maintenance import open_existing
from lungwatch.db.statistics import HealthCounts, health_counts
from lungwatch.errors import HomeError, NotFoundError, Reason
from lungwatch.files import make_dirs, write_atomic

_MIB = 1024 * 1024
_LIMIT_S = 5.0
_LOCKS = Path("/proc/locks")  # proc_locks(5)
_MOST_COUNTED = 100_000


class Home:
    """Paths below one home folder.

    Paths in the database are relative to it, so that a home can be moved or mounted
    elsewhere.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.work = root / "work"
        self.unpacking = root / ".unpacking"
        self.done = root / "done"
        self.quarantine = root / "quarantine"
        self.overlays = root / "overlays"
        self.outbox = root / "outbox"
        self.models = root / "models"
        self.calibrations = root / "calibrations"
        self.backups = root / "backups"
        self.lock_file = root / ".lock"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders of files, in the order of processing."""
        return (
            self.incoming,
            self.work,
            self.unpacking,
            self.done,
            self.quarantine,
            self.overlays,
            self.outbox,
        )

    def prepare(self) -> None:
        """Create missing folders, private ones, and check that files can be moved between them.

        Raises
        ------
        HomeError
            If a folder cannot be created or written to, or lies on another file system than
            the home: moving would be copying then, and a crash could halve a file.
        """
        is_new, had_drop_folder = not self.root.exists(), self.incoming.exists()
        for folder in self.folders:
            try:
                make_dirs(folder)
            except OSError as error:
                raise HomeError(
                    f"cannot create {folder}: {error.strerror}; create it, or give this user the "
                    "right to"
                ) from error
        if not had_drop_folder:
            _make_drop_folder(self.incoming)
        if is_new:
            _remove_rights(self.root, 0o077)
        self.make_private()
        self.check_folders()

    def make_private(self) -> None:
        """Take from everybody else the right to read what is the home's user's.

        A drop folder that others may write to keeps its mode, and the home the right to pass
        through to it.
        """
        if not self.incoming.stat().st_mode & 0o022:
            _remove_rights(self.incoming, 0o077)
        _remove_rights(self.root, 0o066)
        for path in self.private_paths:
            _remove_rights(path, 0o077)
        if _is_drop_only(self.incoming):
            _set_default_acl(self.incoming)

    @property
    def private_paths(self) -> list[Path]:
        """What exists of folders and database files that belong to the home's user alone."""
        folders = (*self.folders[1:], self.models, self.calibrations, self.backups)
        databases = [] if not self.root.is_dir() else sorted(self.root.glob("*.db*"))
        return [path for path in (*folders, *databases) if path.exists()]

    def check_folders(self) -> list[Path]:
        """Check those folders that exist, and return those that do not; change nothing.

        Raises
        ------
        HomeError
            As `prepare`.
        """
        found = [folder for folder in self.folders if folder.exists()]
        for folder in found:
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise HomeError(f"no right to read and write {folder}; change its owner or mode")
        drop_device = self.incoming.stat().st_dev if self.incoming in found else None
        for folder in (self.work, self.unpacking, self.done, self.quarantine):
            if drop_device is not None and folder in found and folder.stat().st_dev != drop_device:
                raise HomeError(
                    f"{folder} is on another file system than {self.incoming}; they must share "
                    "one, since files are moved by renaming"
                )
        return [folder for folder in self.folders if folder not in found]

    def open_paths(self) -> dict[Path, str]:
        """Return what others may read or write, each with the command that ends it.

        Only what others can reach counts: within a home that is closed to them, nothing does.
        """
        if not self.root.is_dir():
            return {}
        mode = stat.S_IMODE(self.root.stat().st_mode)
        found = {self.root: f"chmod go-rw {self.root}"} if mode & 0o066 else {}
        if not mode & 0o077:
            return {}
        if self.incoming.is_dir() and self.incoming.stat().st_mode & 0o046:
            found[self.incoming] = f"chmod 3730 {self.incoming}"
        for path in self.private_paths:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mode & 0o077:
                    found[path] = f"chmod go-rwx {path}"
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the home for this process within the context.

        Raises
        ------
        HomeError
            If another process holds it, or its lock file cannot be opened.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HomeError(
                f"cannot open {self.lock_file}: {error.strerror}; change its owner or mode"
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HomeError(
                    f"another lungwatch process is working in {self.root}; stop it first"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def free_mb(self) -> int:
        """Return the free space of the home's file system, in MiB."""
        return shutil.disk_usage(self.root).free // _MIB

    def relative(self, path: Path) -> str:
        """Return a path below the home as the database stores it."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, relative: str) -> Path:
        """Return the absolute form of a path that the database stores."""
        return self.root / relative

    def exists(self, relative: str) -> bool:
        """Tell whether a path that the database stores is a file."""
        return self.absolute(relative).is_file()

    def holds(self, relative: str, sha256: str) -> bool:
        """Tell whether a path that the database stores is a file with this content."""
        try:
            with self.absolute(relative).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except (FileNotFoundError, IsADirectoryError):
            return False

    def done_path(self, sha256: str, received_at: datetime, suffix: str) -> Path:
        """Return the place of a filed file; the same at every attempt."""
        return self.done / received_at.strftime("%Y/%m/%d") / f"{sha256}{suffix}"

    def quarantine_path(self, sha256: str, reason: str, suffix: str) -> Path:
        """Return the place of a rejected or failed file: a folder for each reason code."""
        folder = reason if reason in set(Reason) else Reason.INTERNAL_ERROR.value
        return self.quarantine / folder / f"{sha256}{suffix}"

    @property
    def own_objects(self) -> Path:
        """Folder of objects that lungwatch made and that were sent back to it."""
        return self.quarantine / "own_objects"

    def own_object_path(self, sha256: str) -> Path:
        """Return the place of an object that lungwatch made."""
        return self.own_objects / f"{sha256}.dcm"

    def overlay_path(self, sha256: str, received_at: datetime, model_id: str) -> Path:
        """Return the place of the overlay of a content and a model."""
        return self.overlays / received_at.strftime("%Y/%m/%d") / f"{sha256}.{model_id}.png"


# Droppers may add files, and neither list nor remove what others dropped; files get the group of
# the folder. Where a service manager forbids the set-group-ID bit, without it.
_DROP_MODES = (0o3730, 0o1730)


def _make_drop_folder(folder: Path) -> None:
    for mode in _DROP_MODES:
        with contextlib.suppress(PermissionError):
            folder.chmod(mode)
            return


def _remove_rights(path: Path, rights: int) -> None:
    """Remove bits of a mode; `doctor` names what another user owns."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & rights:
            path.chmod(mode & ~rights)


def _is_drop_only(folder: Path) -> bool:
    """Tell whether the group of a folder may add files to it and not list them."""
    return folder.stat().st_mode & 0o1047 == 0o1000


def _set_default_acl(folder: Path) -> None:
    """Make what is dropped readable by its dropper and this user alone, whatever the umask.

    Without it a dropper who guesses the name of another one's file may read it, as most umasks
    allow. acl(5); the binary form is that of Linux's ``posix_acl_xattr.h``.
    """
    everybody, nobody = 7, 0
    no_id = 2**32 - 1
    entries = (
        (0x01, everybody, no_id),  # the owner
        (0x02, everybody, os.geteuid()),
        (0x04, nobody, no_id),  # the group
        (0x10, everybody, no_id),  # the mask
        (0x20, nobody, no_id),  # others
    )
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    # Not every file system has them, and only the folder's owner may set them.
    with contextlib.suppress(OSError):
        os.setxattr(folder, "system.posix_acl_default", packed)


def claim_database(home: Home, engine: Engine, now: datetime) -> None:
    """Assign a database to this home at the first start; the home must be locked.

    Raises
    ------
    HomeError
        If it is another home's.
    """
    mark = _home_id(home)
    if mark is None:
        # The home first: after a crash in between, its ID is merely unused.
        mark = str(uuid.uuid4())
        try:
            write_atomic(_id_file(home), f"{mark}\n".encode())
        except OSError as error:
            raise HomeError(
                f"cannot write {_id_file(home)}: {error.strerror}; change its owner or mode"
            ) from error
    if database_lies_within(home, engine):
        return
    place = f"{socket.gethostname()}:{home.root}"
    _require_same(home, engine, mark, take_ownership(engine, Owner(mark=mark, place=place), now))


def check_database(home: Home, engine: Engine) -> None:
    """Refuse the database of another home; changes nothing.

    Raises
    ------
    HomeError
        If it is another home's.
    """
    if database_lies_within(home, engine):
        return
    if (owner := owner_of(engine)) is not None:
        _require_same(home, engine, _home_id(home), owner)
    lease = read_lease(engine)
    is_held = lease is not None and lease.token is not None and not lease.is_dead
    if lease is not None and is_held and lease.home_inode != str(home.root.stat().st_ino):
        raise HomeError(
            f"the database {describe_url(engine.url)} is in use by another home ({lease.place}), "
            "of which this one is a copy: give this one a database of its own"
        )


def is_first_start(home: Home) -> bool:
    """Tell whether no daemon has worked in the home, so that it has no database yet."""
    if _id_file(home).exists():
        return False
    kept = (home.done, home.quarantine, home.overlays, home.work, home.backups)
    return not any(any(names) for folder in kept for _, _, names in os.walk(folder))


def missing_database(home: Home, url: str) -> HomeError:
    """Return the error of a start without the database that the home's files belong to."""
    return HomeError(
        f"the database {describe_url(parse_url(url))} is missing or empty, and {home.root} has "
        "been worked in: put it back, or run `lungwatch backup restore` (PostgreSQL: pg_restore); "
        "to begin with an empty one, run `lungwatch run --new-database` once"
    )


def database_lies_within(home: Home, engine: Engine) -> bool:
    """Tell whether the database is a file within the home, moved and copied with it."""
    is_file = engine.dialect.name == "sqlite"
    path = Path(engine.url.database or "").resolve()
    return is_file and path.is_relative_to(home.root.resolve())


def _id_file(home: Home) -> Path:
    return home.root / ".home-id"


def _home_id(home: Home) -> str | None:
    try:
        return _id_file(home).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HomeError(f"cannot read {_id_file(home)}; restore it or change its mode") from error


def _require_same(home: Home, engine: Engine, mark: str | None, owner: Owner) -> None:
    if owner.mark != mark:
        raise HomeError(
            f"the database {describe_url(engine.url)} belongs to another home ({owner.place}): "
            "give this one a database of its own, or, should it be that home moved here, write "
            f"{owner.mark} into {_id_file(home)}"
        )


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


def read_health_counts(config: Config) -> HealthCounts | None:
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

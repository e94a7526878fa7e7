"""Eligibility of dropped files: names that are skipped, and whether a file is complete."""

import errno
import fcntl
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from fnmatch import translate
from math import inf
from pathlib import Path

# NAS systems (Synology, QNAP, NetApp), Windows, macOS, Linux desktops, NFS and FUSE, synchronising
# programs, and the lock files of office programs.
IGNORED_NAMES = (
    "@eaDir", "@Syno*", "*@SynoEAStream", "*@SynoResource", "#recycle", "#snapshot", "@Recycle",
    "@Recently-Snapshot", ".@__thumb", "~snapshot", ".snapshot*", ".zfs",
    "$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "Thumbs.db", "Thumbs.db:*",
    "ehthumbs*.db", "desktop.ini", "autorun.inf",
    ".DS_Store", "._*", "__MACOSX", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".fseventsd",
    ".Spotlight-*", ".TemporaryItems", ".DocumentRevisions-*", ".apdisk", ".localized",
    "Network Trash Folder", "Temporary Items", "Icon\r",
    ".Trash*", "lost+found", ".directory", ".thumbnails", ".nfs[0-9a-f]*", ".fuse_hidden*",
    ".stfolder*", ".stversions", ".sync", ".dropbox*", ".owncloudsync*", "._sync_*",
    "~$*", ".~lock.*#",
)  # fmt: skip

# Browsers, FTP and SFTP clients and servers, rsync, BitTorrent, synchronising programs, editors.
UNFINISHED_NAMES = (
    "*.part", "*.partial", "*.tmp", "*.temp", "*.crdownload", "*.download", "*.opdownload",
    "*.downloading", "*.uploading", "*.upload", "*.filepart", "*.fpart", "*.aria2", "*.!sync",
    "*.!ut", "*.!qb", "*.bc!", "*.fdmdownload", "*.inprogress", "*.in_progress", "*.incomplete",
    "*.unfinished", "*.copying", "*.writing", "*.transferring", "~syncthing~*", "*.swp", "*.swx",
    "*~",
)  # fmt: skip

# Always there: rsync, many servers and this program's own listener build files up under such names.
_HIDDEN = ".*"


class NameKind(StrEnum):
    """Reason why a name is skipped.

    ``litter``: another program's own file or folder, never an image. ``unfinished``: a file that
    is renamed when it is complete.
    """

    LITTER = "litter"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class NameRule:
    """The pattern that a name matches, as it is configured."""

    kind: NameKind
    pattern: str


class NameRules:
    """Patterns of names that are skipped, case-insensitive.

    Parameters
    ----------
    ignored, unfinished
        Patterns of names of files and folders: ``*``, ``?`` and ``[...]`` as in a shell.
    """

    def __init__(
        self,
        ignored: Sequence[str] = IGNORED_NAMES,
        unfinished: Sequence[str] = UNFINISHED_NAMES,
    ) -> None:
        self._rules = [
            (re.compile(translate(pattern.casefold())), NameRule(kind=kind, pattern=pattern))
            for kind, patterns in (
                (NameKind.LITTER, ignored),
                (NameKind.UNFINISHED, (*unfinished, _HIDDEN)),
            )
            for pattern in patterns
        ]
        # One match for the many names that no rule concerns.
        self._any = re.compile("|".join(pattern.pattern for pattern, _ in self._rules))

    def rule_for(self, name: str) -> NameRule | None:
        """Return the first rule that the name of a file or folder matches, if any."""
        folded = name.casefold()
        if self._any.match(folded) is None:
            return None
        return next(rule for pattern, rule in self._rules if pattern.match(folded))


class Hint(Enum):
    """Last kernel event of a file.

    ``CLOSED``: by a writer. ``COMPLETE``: renamed within the drop folder.
    """

    NONE = auto()
    APPEARED = auto()
    WRITING = auto()
    CLOSED = auto()
    COMPLETE = auto()


class WriterState(Enum):
    """Writers of a file, as far as the kernel knows."""

    NONE = auto()
    PRESENT = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A file as one scan saw it.

    Attributes
    ----------
    size_bytes, mtime_ns, inode
        From `stat`.
    age_s
        Wall-clock seconds since the modification; may be negative or absurd.
    changed_at_s
        The inode's last change (ctime), in seconds since the epoch: when the file came, or was
        last written to.
    uid
        The owner.
    allocated_bytes
        On the disk; fewer than the size where a file is sparse.
    inode_age_s
        Wall-clock seconds since the inode's last change; may be negative or absurd.
    """

    size_bytes: int
    mtime_ns: int
    inode: int
    age_s: float
    changed_at_s: float = 0.0
    uid: int = 0
    allocated_bytes: int = 0
    inode_age_s: float = 0.0

    @classmethod
    def of(cls, status: os.stat_result, now_s: float) -> "Snapshot":
        """Return what `stat` tells at `now_s`, in seconds since the epoch."""
        return cls(
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            age_s=now_s - status.st_mtime,
            # It cannot be set back, while a copy keeps the original's mtime.
            changed_at_s=status.st_ctime,
            uid=status.st_uid,
            allocated_bytes=status.st_blocks * 512,
            inode_age_s=now_s - status.st_ctime,
        )

    def same_content(self, other: "Snapshot") -> bool:
        """Tell whether nothing was written between two scans."""
        return (self.size_bytes, self.mtime_ns, self.inode) == (
            other.size_bytes,
            other.mtime_ns,
            other.inode,
        )


@dataclass
class _ObservedFile:
    snapshot: Snapshot
    since_s: float
    hint: Hint = Hint.NONE


class CompletenessCheck:
    """Completeness of the files in the drop folder. Pure logic; the time is passed in.

    A clean close or a move-in makes a file complete at once. Without one, it must be
    unchanged for `stability_s`; a file that was seen being written and never closed must be
    so for `open_timeout_s`, unless the kernel confirms that no process has it open.

    Parameters
    ----------
    closes_often
        Whether writers close a file and open it again: a close, or a file's appearance, proves
        nothing then, and only a rename within the drop folder makes a file complete at once.
    """

    def __init__(
        self, *, stability_s: float, open_timeout_s: float, closes_often: bool = False
    ) -> None:
        self._stability_s = stability_s
        self._open_timeout_s = open_timeout_s
        self._closes_often = closes_often
        self._watched: dict[Path, _ObservedFile] = {}
        self._early_hints: dict[Path, Hint] = {}

    def hint(self, path: Path, hint: Hint) -> None:
        """Note a kernel event, also of a file that no scan has found yet."""
        if path in self._watched:
            self._watched[path].hint = hint
        else:
            self._early_hints[path] = hint

    def observe(self, path: Path, snapshot: Snapshot, now_s: float) -> None:
        """Note what was found at monotonic time `now_s`."""
        known = self._watched.get(path)
        if known is None:
            hint = self._early_hints.pop(path, Hint.NONE)
            self._watched[path] = _ObservedFile(snapshot=snapshot, since_s=now_s, hint=hint)
        elif not known.snapshot.same_content(snapshot):
            known.snapshot, known.since_s = snapshot, now_s
        else:
            known.snapshot = snapshot

    def is_complete(self, path: Path, writer: WriterState, now_s: float) -> bool:
        """Tell whether an observed file may be taken."""
        return self.wait_s(path, writer, now_s) <= 0

    def wait_s(self, path: Path, writer: WriterState, now_s: float) -> float:
        """Return how long an observed file must stay unchanged yet; 0 or less if it may be taken.

        It is infinite while a process has the file open for writing.
        """
        watched = self._watched[path]
        snapshot, hint = watched.snapshot, watched.hint
        unchanged_s = now_s - watched.since_s
        if writer is WriterState.PRESENT:
            return inf
        if snapshot.size_bytes == 0:
            # Many writers create the file first and come back to fill it.
            return self._stability_s - unchanged_s
        if hint is Hint.COMPLETE or (hint is Hint.CLOSED and not self._closes_often):
            return 0.0
        if writer is WriterState.NONE and hint is Hint.APPEARED and not self._closes_often:
            # Moved in from outside: written into, it would have been seen to be closed.
            return 0.0
        if writer is WriterState.NONE:
            # Between two chunks of a writer that closes in between, the file is young.
            age_s = snapshot.age_s
            if self._closes_often:
                # Such a writer may set the modification time back as well, and not the ctime.
                age_s = min(age_s, snapshot.inode_age_s)
            return self._stability_s - max(unchanged_s, age_s)
        wait_s = self._open_timeout_s if hint is Hint.WRITING else self._stability_s
        return wait_s - unchanged_s

    def forget(self, path: Path) -> None:
        """Forget a file that is gone or taken."""
        self._watched.pop(path, None)

    def forget_early_hints(self) -> None:
        """Forget the hints of files that a whole scan has not found."""
        self._early_hints.clear()

    def keep_only(self, paths: Iterable[Path]) -> None:
        """Forget files that a scan no longer found, and stale hints."""
        present = set(paths)
        self._watched = {path: seen for path, seen in self._watched.items() if path in present}
        self._early_hints.clear()


def writer_of(path: Path) -> WriterState:
    """Return whether any process has a file open for writing.

    A read lease is granted only while none does (fcntl(2), F_SETLEASE). Network file
    systems do not grant leases, nor does the kernel for another user's file without
    CAP_LEASE; the answer is UNKNOWN then.

    Raises
    ------
    OSError
        If the file cannot be opened for reading.
    """
    # NONBLOCK: a FIFO that took the file's name must not stop us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return writer_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def writer_of_descriptor(descriptor: int) -> WriterState:
    """Return whether any process has a file open for writing that is open for reading here."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return WriterState.PRESENT if error.errno == errno.EAGAIN else WriterState.UNKNOWN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return WriterState.NONE

"""When is a file that is being copied complete? Pure logic; the clock is passed in."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path


class Hint(Enum):
    """What the watcher last told of a file."""

    NONE = auto()
    APPEARED = auto()
    WRITING = auto()
    COMPLETE = auto()


class Writer(Enum):
    """Whether somebody has the file open for writing, as far as the kernel tells."""

    NONE = auto()
    SOMEBODY = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A file as one look at the folder saw it.

    Attributes
    ----------
    size_bytes, mtime_ns, inode
        From `stat`.
    age_s
        Wall-clock seconds since the modification; may be negative or absurd.
    changed_at_s
        The inode's last change (ctime), in seconds since the epoch: when the file came, or was
        last written to.
    """

    size_bytes: int
    mtime_ns: int
    inode: int
    age_s: float
    changed_at_s: float = 0.0

    def same_content(self, other: "Snapshot") -> bool:
        """Whether nothing has been written between the two looks."""
        return (self.size_bytes, self.mtime_ns, self.inode) == (
            other.size_bytes,
            other.mtime_ns,
            other.inode,
        )


@dataclass
class _Watched:
    snapshot: Snapshot
    since_s: float
    hint: Hint = Hint.NONE


class Stability:
    """Remembers every file in the drop folder until it is complete.

    A clean close or a move-in makes a file complete at once. Without one, it must be
    unchanged for `stability_s`; a file that was seen being written and never closed must be
    so for `open_timeout_s`, unless the kernel confirms that nobody has it open.
    """

    def __init__(self, *, stability_s: float, open_timeout_s: float) -> None:
        self._stability_s = stability_s
        self._open_timeout_s = open_timeout_s
        self._watched: dict[Path, _Watched] = {}
        self._early_hints: dict[Path, Hint] = {}

    def hint(self, path: Path, hint: Hint) -> None:
        """Take note of what the watcher saw, also of a file that no scan has seen yet."""
        if path in self._watched:
            self._watched[path].hint = hint
        else:
            self._early_hints[path] = hint

    def observe(self, path: Path, snapshot: Snapshot, now_s: float) -> None:
        """Take note of what a scan saw at monotonic time `now_s`."""
        known = self._watched.get(path)
        if known is None:
            hint = self._early_hints.pop(path, Hint.NONE)
            self._watched[path] = _Watched(snapshot=snapshot, since_s=now_s, hint=hint)
        elif not known.snapshot.same_content(snapshot):
            known.snapshot, known.since_s = snapshot, now_s
        else:
            known.snapshot = snapshot

    def is_complete(self, path: Path, writer: Writer, now_s: float) -> bool:
        """Whether an observed file may be taken."""
        watched = self._watched[path]
        unchanged_s = now_s - watched.since_s
        if writer is Writer.SOMEBODY:
            return False
        if watched.snapshot.size_bytes == 0:
            # Many writers create the file first and come back to fill it.
            return unchanged_s >= self._stability_s
        if watched.hint is Hint.COMPLETE:
            return True
        if writer is Writer.NONE and watched.hint is Hint.APPEARED:
            # Moved in from outside: written into, it would have been seen to be closed.
            return True
        if writer is Writer.NONE:
            # Between two chunks of a writer that closes in between, the file is young.
            return max(unchanged_s, watched.snapshot.age_s) >= self._stability_s
        wait_s = self._open_timeout_s if watched.hint is Hint.WRITING else self._stability_s
        return unchanged_s >= wait_s

    def keep_only(self, paths: Iterable[Path]) -> None:
        """Forget the files that a scan no longer found, and stale hints with them."""
        present = set(paths)
        self._watched = {path: seen for path, seen in self._watched.items() if path in present}
        self._early_hints.clear()

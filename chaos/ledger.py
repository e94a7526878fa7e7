"""Ledger of dropped files against folders and database after a run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.record import Row, read_rows, sha256

_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found; digests are the first 12 characters of the SHA-256.

    Attributes
    ----------
    files
        Contents that were dropped.
    lost
        Dropped, and without an end in the record, or without its unaltered file in its place.
    duplicated
        With a second result, a second file or a second arrival.
    damaged
        Files relative to the home that are half written, or that nobody dropped.
    """

    files: int
    lost: tuple[str, ...] = ()
    duplicated: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether each content is there exactly once, and whole."""
        return not (self.lost or self.duplicated or self.damaged)


def audit(home: Path, dropped: Mapping[str, str], database: str = "") -> Audit:
    """Compare.

    Parameters
    ----------
    home
        A home that no daemon runs in.
    dropped
        The name of each dropped content by its SHA-256; each was dropped once.
    database
        The URL of a PostgreSQL database; empty for the home's SQLite file.
    """
    rows = read_rows(database or home / "lungwatch.db")
    results = Counter(row.sha256 for row in rows)
    files: Counter[str] = Counter()
    damaged = []
    for folder in ("incoming", "work", "done", "quarantine"):
        for path in _files(home / folder):
            digest = sha256(path.read_bytes())
            if digest in dropped:
                files[digest] += 1
            else:
                damaged.append(str(path.relative_to(home)))
    damaged += [
        str(path.relative_to(home))
        for path in _files(home / "overlays")
        if not path.read_bytes().endswith(_PNG_END)
    ]
    settled = {row.sha256 for row in rows if _is_settled(home, row)}
    twice = {row.sha256 for row in rows if row.arrivals > 1}
    twice |= {digest for digest in dropped if results[digest] > 1 or files[digest] > 1}
    return Audit(
        files=len(dropped),
        lost=tuple(sorted(digest[:12] for digest in set(dropped) - settled)),
        duplicated=tuple(sorted(digest[:12] for digest in twice)),
        damaged=tuple(sorted(damaged)),
    )


def _is_settled(home: Path, row: Row) -> bool:
    """Whether a result has its end, its file and, where it is due, its overlay."""
    if not row.is_settled or row.path is None:
        return False
    path = home / row.path
    if not path.is_file() or sha256(path.read_bytes()) != row.sha256:
        return False
    if row.state != "done":
        return row.path.startswith("quarantine/")
    # Of an archive there is nothing to show.
    has_overlay = row.overlay is not None and (home / row.overlay).is_file()
    return row.path.startswith("done/") and (has_overlay or row.reason == "unpacked")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []

"""Ledger of dropped files against folders and database after a run."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENDS = ("done", "rejected", "failed")
_PNG_END = b"IEND\xaeB`\x82"
_ROWS = """
    SELECT image.sha256, result.state, result.reason, image.path, result.overlay,
        (SELECT count(*) FROM arrival WHERE arrival.result_id = result.id)
    FROM result JOIN image ON image.id = result.image_id
"""


class LedgerError(RuntimeError):
    """The record cannot be read."""


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result as the SQLite file has it."""

    sha256: str
    state: str
    reason: str | None
    path: str | None
    overlay: str | None
    arrivals: int

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to be done, the file's last move included."""
        is_kept = self.path is not None and self.path.startswith(("done/", "quarantine/"))
        return self.state in _ENDS and is_kept


def read_rows(database: Path | str, *, timeout_s: float = 30) -> list[Row]:
    """Return every result.

    Parameters
    ----------
    database
        The SQLite file, or the URL of a PostgreSQL database.

    Raises
    ------
    LedgerError
        If the database cannot be read.
    """
    try:
        if isinstance(database, str):
            found = _read_postgres(database, timeout_s)
        elif database.exists():
            with closing(sqlite3.connect(database, timeout=timeout_s)) as connection:
                found = connection.execute(_ROWS).fetchall()
        else:
            return []
    except sqlite3.Error as error:
        raise LedgerError(str(error)) from error
    return [
        Row(sha256=sha, state=state, reason=reason, path=path, overlay=overlay, arrivals=arrivals)
        for sha, state, reason, path, overlay, arrivals in found
    ]


def _read_postgres(url: str, timeout_s: float) -> list[tuple[Any, ...]]:
    import psycopg  # noqa: PLC0415

    try:
        options = f"-c lock_timeout={round(timeout_s * 1000)}"
        with psycopg.connect(url, options=options) as connection:
            return connection.execute(_ROWS).fetchall()
    except psycopg.Error as error:
        raise LedgerError(str(error)) from error


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


def sha256(content: bytes) -> str:
    """Return a content's identity."""
    return hashlib.sha256(content).hexdigest()


def _is_settled(home: Path, row: Row) -> bool:
    """Whether a result has its end, its file and, where it is due, its overlay."""
    if not row.has_ended or row.path is None:
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

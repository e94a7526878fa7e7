"""The rows of a home's database, read without lungwatch's own code."""

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENDS = ("done", "rejected", "failed")
_ROWS = """
    SELECT result.id, image.sha256, result.state, result.reason, result.message,
        result.attempts, result.overlay, image.path, result.probability,
        (SELECT count(*) FROM arrival WHERE arrival.result_id = result.id)
    FROM result JOIN image ON image.id = result.image_id ORDER BY result.id
"""


class RecordError(RuntimeError):
    """The database cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result as the database has it.

    Attributes
    ----------
    path, overlay
        Relative to the home.
    arrivals
        How often the content has arrived.
    """

    id: int
    sha256: str
    state: str
    reason: str | None
    message: str | None
    attempts: int
    overlay: str | None
    path: str | None
    probability: float | None
    arrivals: int

    @property
    def has_ended(self) -> bool:
        """Whether the result is final."""
        return self.state in _ENDS

    @property
    def is_kept(self) -> bool:
        """Whether the record says that the file has reached its last place."""
        return self.path is not None and self.path.startswith(("done/", "quarantine/"))

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be done, the file's last move included."""
        return self.has_ended and self.is_kept


def read_rows(database: Path | str, *, timeout_s: float = 30) -> list[Row]:
    """Return every result; none where there is no database yet.

    Parameters
    ----------
    database
        The SQLite file, or the URL of a PostgreSQL database.

    Raises
    ------
    RecordError
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
        raise RecordError(str(error)) from error
    names = list(Row.__dataclass_fields__)
    return [Row(**dict(zip(names, values, strict=True))) for values in found]


def _read_postgres(url: str, timeout_s: float) -> list[tuple[Any, ...]]:
    import psycopg

    try:
        options = f"-c lock_timeout={round(timeout_s * 1000)}"
        with psycopg.connect(url, options=options) as connection:
            return connection.execute(_ROWS).fetchall()
    except psycopg.Error as error:
        raise RecordError(str(error)) from error


def sha256(content: bytes) -> str:
    """Return a content's identity."""
    return hashlib.sha256(content).hexdigest()

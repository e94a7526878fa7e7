"""One database, one home: two that share one would each take the other's files for lost."""

import socket
import uuid
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.atomicfile import write_atomic
from lungwatch.daemon.home import Home
from lungwatch.db.failures import describe
from lungwatch.db.ownership import Owner, own, owner_of
from lungwatch.errors import HomeError


def claim_database(home: Home, engine: Engine, now: datetime) -> None:
    """Make a database this home's own, at the first start; the home must be locked.

    Raises
    ------
    HomeError
        If it is another home's.
    """
    if _lies_within(home, engine):
        return
    mark = _mark(home)
    if mark is None:
        # The home first: a crash in between leaves a mark that nothing refers to.
        mark = str(uuid.uuid4())
        try:
            write_atomic(_file(home), f"{mark}\n".encode())
        except OSError as error:
            raise HomeError(
                f"cannot write {_file(home)}: {error.strerror}; change the folder's owner or mode"
            ) from error
    place = f"{socket.gethostname()}:{home.root}"
    _compare(home, engine, mark, own(engine, Owner(mark=mark, place=place), now))


def check_database(home: Home, engine: Engine) -> None:
    """Refuse another home's database; changes nothing.

    Raises
    ------
    HomeError
        If it is another home's.
    """
    if not _lies_within(home, engine) and (owner := owner_of(engine)) is not None:
        _compare(home, engine, _mark(home), owner)


def _lies_within(home: Home, engine: Engine) -> bool:
    """Whether the database is a file of this home's, and moves and is copied with it."""
    is_file = engine.dialect.name == "sqlite"
    path = Path(engine.url.database or "").resolve()
    return is_file and path.is_relative_to(home.root.resolve())


def _file(home: Home) -> Path:
    return home.root / ".home-id"


def _mark(home: Home) -> str | None:
    try:
        return _file(home).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HomeError(f"cannot read {_file(home)}; restore it or change its mode") from error


def _compare(home: Home, engine: Engine, mark: str | None, owner: Owner) -> None:
    if owner.mark != mark:
        raise HomeError(
            f"the database {describe(engine.url)} belongs to another home ({owner.place}): give "
            "this one a database of its own, or, should it be that home moved here, write "
            f"{owner.mark} into {_file(home)}"
        )

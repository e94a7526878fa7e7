"""Everything that only reads. Each call sees one snapshot and blocks no writer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Engine, Row, select
from sqlalchemy.orm import aliased

from lungwatch.db.engine import reading
from lungwatch.db.rows import ResultDetail, ResultFilter, ResultRow, TrackedFile
from lungwatch.db.schema import Image, Result
from lungwatch.db.selects import select_details, select_results, select_tracked
from lungwatch.db.states import UNFINISHED, State
from lungwatch.db.statistics import Statistics, stats
from lungwatch.errors import NotFoundError

if TYPE_CHECKING:
    from lungwatch.db.selects import AnySelect

__all__ = [
    "ResultDetail",
    "ResultFilter",
    "ResultRow",
    "Statistics",
    "TrackedFile",
    "get_result",
    "has_result",
    "iter_all",
    "list_results",
    "queued",
    "rows_in_work",
    "stats",
    "unfinished",
]

_PAGE_ROWS = 1000
_SHORTEST_PREFIX = 6
_DIGEST_LENGTH = 64


def list_results(engine: Engine, chosen: ResultFilter) -> list[ResultRow]:
    """Return the results that a filter chooses, newest first.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    with reading(engine) as connection:
        return [ResultRow(**_values(row)) for row in connection.execute(select_results(chosen))]


def get_result(engine: Engine, id_or_hash: int | str) -> ResultDetail:
    """Return one result whole.

    Parameters
    ----------
    id_or_hash
        The result's number, its content's SHA-256, or the beginning of that, from six
        characters on.

    Raises
    ------
    NotFoundError
        If nothing matches, or more than one result does.
    """
    wanted = str(id_or_hash).strip().lower()
    found = _details(engine, Result.id == int(wanted)) if _is_number(wanted) else []
    if not found and _is_prefix(wanted):
        found = _details(engine, Image.sha256.startswith(wanted))
    if not found:
        raise NotFoundError(
            f"no result '{id_or_hash}': give a number, or the first {_SHORTEST_PREFIX} or more "
            "characters of a SHA-256"
        )
    if len(found) > 1:
        listed = ", ".join(f"{row.id} ({row.model}-{row.model_version})" for row in found[:5])
        more = ", …" if len(found) > 5 else ""
        raise NotFoundError(f"'{id_or_hash}' matches {len(found)} results: {listed}{more}")
    return found[0]


def unfinished(engine: Engine) -> list[TrackedFile]:
    """Return the results that have no end yet, oldest first."""
    return _tracked(engine, select_tracked().where(Result.state.in_(UNFINISHED)))


def queued(
    engine: Engine, limit: int, model_id: int | None = None, *, own_only: bool = False
) -> list[TrackedFile]:
    """Return results that somebody asked to run again and whose file is known.

    Parameters
    ----------
    limit
        At most so many, the first asked for.
    model_id
        Only those that this model can take up: its own, and those of other models whose
        image it has no result for; not those that another model is to score beside a result
        that is done (`lungwatch rescore`).
    own_only
        Only those that this very model was asked for.
    """
    statement = select_tracked().where(Result.state == State.QUEUED, Image.path.is_not(None))
    if model_id is not None:
        own = aliased(Result)
        scored = select(own.id).where(own.image_id == Result.image_id, own.model_id == model_id)
        of_model = Result.model_id == model_id
        if not own_only:
            of_model |= ~scored.exists() & ~Image.path.startswith("done/")
        statement = statement.where(of_model)
    ordered = statement.order_by(None).order_by(Result.claimed_at, Result.id)
    return _tracked(engine, ordered.limit(limit))


def has_result(engine: Engine, sha256: str, reason: str) -> bool:
    """Whether a content has a result that ended for this reason."""
    statement = select(Result.id).join(Image)
    with reading(engine) as connection:
        found = connection.execute(
            statement.where(Image.sha256 == sha256, Result.reason == reason).limit(1)
        )
        return found.first() is not None


def is_known(engine: Engine, sha256: str) -> bool:
    """Whether a content has ever been claimed."""
    with reading(engine) as connection:
        found = connection.execute(select(Image.id).where(Image.sha256 == sha256))
        return found.first() is not None


def is_in_hand(engine: Engine, sha256: str) -> bool:
    """Whether some result of a content has no end yet."""
    statement = select(Result.id).join(Image).where(Image.sha256 == sha256)
    with reading(engine) as connection:
        found = connection.execute(statement.where(Result.state.in_(UNFINISHED)).limit(1))
        return found.first() is not None


def rows_in_work(engine: Engine) -> list[TrackedFile]:
    """Return the results, finished or not, whose file should be in ``work/``.

    Also those on their way of which it is recorded that the file is nowhere.
    """
    is_lost = Image.path.is_(None) & Result.state.in_((State.CLAIMED, State.RECORDED))
    return _tracked(engine, select_tracked().where(Image.path.startswith("work/") | is_lost))


def iter_all(engine: Engine) -> Iterator[TrackedFile]:
    """Return every result in order of its number, read in pages so that no lock is held."""
    last_id = 0
    while page := _tracked(engine, select_tracked().where(Result.id > last_id).limit(_PAGE_ROWS)):
        yield from page
        last_id = page[-1].result_id


def _tracked(engine: Engine, statement: "AnySelect") -> list[TrackedFile]:
    with reading(engine) as connection:
        return [TrackedFile(**row._mapping) for row in connection.execute(statement)]  # noqa: SLF001 - SQLAlchemy's public name


def _details(engine: Engine, condition: ColumnElement[bool]) -> list[ResultDetail]:
    with reading(engine) as connection:
        rows = connection.execute(select_details().where(condition).order_by(Result.id))
        return [ResultDetail(**_values(row)) for row in rows]


def _values(row: "Row[*tuple[Any, ...]]") -> dict[str, Any]:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    return {**values, "flags": tuple(values["flags"])}


def _is_number(text: str) -> bool:
    # Longer ones are no numbers of rows and overflow the column.
    return text.isascii() and text.isdigit() and len(text) <= 9


def _is_prefix(text: str) -> bool:
    return _SHORTEST_PREFIX <= len(text) <= _DIGEST_LENGTH and all(
        character in "0123456789abcdef" for character in text
    )

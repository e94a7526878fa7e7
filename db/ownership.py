"""Which home a database belongs to."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, select

from lungwatch.db.changes import insert_if_new
from lungwatch.db.engine import reading, writing
from lungwatch.db.schema import OwningHome

_ONLY_ROW = 1


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The home that a database belongs to.

    Attributes
    ----------
    mark
        Made up by the home; it keeps the same one beside its folders.
    place
        Machine and folder that it was first used from.
    """

    mark: str
    place: str


def owner_of(engine: Engine) -> Owner | None:
    """Return the home that a database belongs to, None for one that nobody owns yet."""
    with reading(engine) as connection:
        row = connection.execute(select(OwningHome.mark, OwningHome.place)).first()
    return None if row is None else Owner(mark=row.mark, place=row.place)


def own(engine: Engine, owner: Owner, now: datetime) -> Owner:
    """Take a database that nobody owns; return who owns it now."""
    with writing(engine) as connection:
        insert_if_new(
            connection,
            OwningHome,
            ("id",),
            {
                "id": _ONLY_ROW,
                "mark": owner.mark,
                "place": owner.place,
                "first_used_at": now,
            },
        )
        row = connection.execute(select(OwningHome.mark, OwningHome.place)).one()
    return Owner(mark=row.mark, place=row.place)

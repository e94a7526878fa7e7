"""Who did what: changes, deletions and exports, one row each, never altered."""

import getpass
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine, insert, select

from lungwatch.db.engine import reading, writing
from lungwatch.db.schema import Audit


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One thing that was done.

    Attributes
    ----------
    actor
        The operating system's user, and who became that by sudo.
    action
        As a command: "retry", "backup restore".
    detail
        Numbers and codes; no patient data.
    """

    id: int
    at: datetime
    actor: str
    action: str
    detail: dict[str, object]


def note(engine: Engine, action: str, now: datetime, detail: Mapping[str, object]) -> None:
    """Write down that something was done.

    Raises
    ------
    DatabaseError
        If the database cannot be written.
    """
    with writing(engine) as connection:
        connection.execute(
            insert(Audit).values(at=now, actor=_actor(), action=action, detail=dict(detail))
        )


def audit_rows(
    engine: Engine, *, since: datetime | None = None, limit: int | None = None
) -> list[AuditRow]:
    """Return what was done, the newest first.

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    statement = select(Audit.id, Audit.at, Audit.actor, Audit.action, Audit.detail)
    if since is not None:
        statement = statement.where(Audit.at >= since)
    with reading(engine) as connection:
        rows = connection.execute(statement.order_by(Audit.id.desc()).limit(limit))
        return [AuditRow(**row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name


def _actor() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        name = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {behind})" if behind else name

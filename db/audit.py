"""Audit trail: changes, deletions and exports, one row each, never altered."""

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, Engine, insert, select

from lungwatch.db.engine import clean, reading, writing
from lungwatch.db.models import Audit

Outcome = Literal["started", "ok", "failed"]


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """One thing that was done, as it is written down.

    Attributes
    ----------
    action
        As a command: "retry", "backup restore".
    target
        What it was done to: "result 17", a folder, a model's name, a file's digest; no patient
        data.
    detail
        Numbers and codes; no patient data.
    """

    action: str
    target: str | None = None
    outcome: Outcome = "ok"
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One thing that was done, as it is read.

    Attributes
    ----------
    actor
        The operating system's user, and who became that by sudo.
    uid, host
        The user's number, and the machine's name; None in rows from before schema 0005.
    action, target, outcome, detail
        See `Deed`.
    """

    id: int
    at: datetime
    actor: str
    uid: int | None
    host: str | None
    action: str
    target: str | None
    outcome: str
    detail: dict[str, object]


def record_events(engine: Engine, now: datetime, deeds: Sequence[AuditEvent]) -> None:
    """Write down what this process's user did: all of it, or nothing.

    Raises
    ------
    DatabaseError
        If the database cannot be written.
    """
    with writing(engine) as connection:
        add_events(connection, now, deeds)


def add_events(connection: Connection, now: datetime, deeds: Sequence[AuditEvent]) -> None:
    """Write down what this process's user did within the transaction that does it."""
    # The environment names the user, in bytes of anybody's choice.
    by = {
        "at": now,
        "actor": clean(_actor()),
        "uid": os.getuid(),
        "host": clean(socket.gethostname()),
    }
    for deed in deeds:
        connection.execute(
            insert(Audit).values(
                **by,
                action=deed.action,
                target=None if deed.target is None else clean(deed.target),
                outcome=deed.outcome,
                detail=dict(deed.detail),
            )
        )


def audit_rows(
    engine: Engine,
    *,
    since: datetime | None = None,
    actor: str | None = None,
    action: str | None = None,
    limit: int | None = None,
) -> list[AuditRow]:
    """Return what was done, the newest first; of one instant, what was written last.

    Parameters
    ----------
    actor
        Part of the actor's name, so that who used sudo is found under both names.
    action
        A command ("backup restore") or a group of them ("backup").

    Raises
    ------
    DatabaseError
        If the database cannot be read.
    """
    statement = select(*Audit.__table__.columns)
    if since is not None:
        statement = statement.where(Audit.at >= since)
    if actor is not None:
        statement = statement.where(Audit.actor.contains(actor, autoescape=True))
    if action is not None:
        in_group = Audit.action.startswith(f"{action} ", autoescape=True)
        statement = statement.where((Audit.action == action) | in_group)
    with reading(engine) as connection:
        # Who waits for another writer is numbered after it and may have begun before.
        ordered = statement.order_by(Audit.at.desc(), Audit.id.desc())
        rows = connection.execute(ordered.limit(limit))
        return [AuditRow(**row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name


def _actor() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        name = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {behind})" if behind else name

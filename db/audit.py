"""Audit trail: changes, deletions and exports, one row each, never altered.

Every function raises `DatabaseError` where the database cannot be used.
"""

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, Engine, insert, select

from lungwatch.db.engine import clean, columns_for, read_rows, writing
from lungwatch.db.models import Audit

Outcome = Literal["started", "ok", "failed"]


@dataclass(frozen=True, kw_only=True)
class AuditEvent:
    """One action, as it is written.

    Attributes
    ----------
    action
        As a command: "retry", "backup restore".
    target
        "result 17", a folder, a model's name, a file's digest; no patient data.
    detail
        Numbers and codes; no patient data.
    """

    action: str
    target: str | None = None
    outcome: Outcome = "ok"
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One action, as it is read.

    Attributes
    ----------
    actor
        The operating system's user, and who became that user by sudo.
    uid, host
        The user's number, and the machine's name; None in rows from before schema 0005.
    action, target, outcome, detail
        See `AuditEvent`.
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


def record_events(engine: Engine, now: datetime, events: Sequence[AuditEvent]) -> None:
    """Write what the user of this process did: all of it, or nothing."""
    with writing(engine) as connection:
        add_events(connection, now, events)


def add_events(connection: Connection, now: datetime, events: Sequence[AuditEvent]) -> None:
    """Write what the user of this process did, within the transaction that does it."""
    # The environment names the user, in any bytes.
    by = {
        "at": now,
        "actor": clean(_actor()),
        "uid": os.getuid(),
        "host": clean(socket.gethostname()),
    }
    for event in events:
        connection.execute(
            insert(Audit).values(
                **by,
                action=event.action,
                target=None if event.target is None else clean(event.target),
                outcome=event.outcome,
                detail=dict(event.detail),
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
    """Return audit events, the newest first; of one instant, what was written last.

    Parameters
    ----------
    actor
        Part of the actor's name, so that a user of sudo is found under both names.
    action
        A command ("backup restore") or a group of them ("backup").
    """
    statement = select(*columns_for(AuditRow, Audit))
    if since is not None:
        statement = statement.where(Audit.at >= since)
    if actor is not None:
        statement = statement.where(Audit.actor.contains(actor, autoescape=True))
    if action is not None:
        in_group = Audit.action.startswith(f"{action} ", autoescape=True)
        statement = statement.where((Audit.action == action) | in_group)
    # A writer that waited for another one has the higher number and may have begun earlier.
    ordered = statement.order_by(Audit.at.desc(), Audit.id.desc())
    return read_rows(engine, AuditRow, ordered.limit(limit))


def _actor() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        name = f"uid {os.getuid()}"
    sudo_user = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {sudo_user})" if sudo_user else name

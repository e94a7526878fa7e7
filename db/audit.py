"""Audit trail: changes, deletions and exports, one row each, never altered.

Every function raises `DatabaseError` where the database cannot be used.
"""

import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from sqlalchemy import Connection, Engine, insert, or_, select

from lungwatch.db.engine import clean, columns_for, read_rows, writing
from lungwatch.db.models import Audit

Outcome = Literal["started", "ok", "failed"]

# What the environment says of the user: anybody may set these.
_CLAIMS = ("SUDO_USER", "USER", "LOGNAME")
# proc_pid_loginuid(5): nobody has logged in, as for a service.
_NO_LOGIN = 2**32 - 1
_LONGEST_CLAIM = 256


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Who acts.

    Attributes
    ----------
    uid
        The kernel's number of the user: the real one of this process, or that of a socket's peer.
    login_uid
        The number that the person logged in with, which sudo and su leave as it is; None where
        the kernel knows of no login.
    environment
        What the environment says of the user: proves nothing.
    """

    uid: int
    login_uid: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls) -> Self:
        """Return the user of this process."""
        return cls(
            uid=os.getuid(),
            login_uid=login_uid_of("self"),
            environment={name: os.environ[name] for name in _CLAIMS if os.environ.get(name)},
        )

    def columns(self) -> dict[str, str | int | None]:
        """Return the columns that name the user."""
        claims = " ".join(
            f"{name}={self.environment[name][:_LONGEST_CLAIM]}"
            for name in _CLAIMS
            if name in self.environment
        )
        return {
            "actor": clean(user_name(self.uid)),
            "uid": self.uid,
            "login": None if self.login_uid is None else clean(user_name(self.login_uid)),
            "login_uid": self.login_uid,
            "environment": clean(claims) or None,
        }


def user_name(uid: int) -> str:
    """Return a user's name, "uid 1000" without one, as in containers."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid {uid}"


def login_uid_of(pid: int | str) -> int | None:
    """Return the number that the person behind a process logged in with; None if unknown."""
    try:
        found = int(Path(f"/proc/{pid}/loginuid").read_text())
    except (OSError, ValueError):
        return None
    return None if found == _NO_LOGIN else found


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
        The kernel's user; in rows from before schema 0011 the environment's, and who became that
        user by sudo.
    uid, host
        The user's number, and the machine's name; None in rows from before schema 0005.
    login, login_uid
        The user that the person logged in as, and its number, which sudo leaves as they are; None
        where the kernel knows of no login.
    environment
        What SUDO_USER, USER and LOGNAME said: proves nothing.
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
    login: str | None
    login_uid: int | None
    environment: str | None


def record_events(
    engine: Engine, now: datetime, events: Sequence[AuditEvent], actor: Actor | None = None
) -> None:
    """Write what a user did, of this process if none is given: all of it, or nothing."""
    with writing(engine) as connection:
        add_events(connection, now, events, actor)


def add_events(
    connection: Connection,
    now: datetime,
    events: Sequence[AuditEvent],
    actor: Actor | None = None,
) -> None:
    """Write what a user did, of this process if none is given, in the transaction that does it."""
    actor = actor or Actor.of_this_process()
    by = {"at": now, "host": clean(socket.gethostname()), **actor.columns()}
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
        Part of a name: of the user, of the login, or in what the environment says.
    action
        A command ("backup restore") or a group of them ("backup").
    """
    statement = select(*columns_for(AuditRow, Audit))
    if since is not None:
        statement = statement.where(Audit.at >= since)
    if actor is not None:
        names = (Audit.actor, Audit.login, Audit.environment)
        named = (name.contains(actor, autoescape=True) for name in names)
        statement = statement.where(or_(*named))
    if action is not None:
        in_group = Audit.action.startswith(f"{action} ", autoescape=True)
        statement = statement.where((Audit.action == action) | in_group)
    # A writer that waited for another one has the higher number and may have begun earlier.
    ordered = statement.order_by(Audit.at.desc(), Audit.id.desc())
    return read_rows(engine, AuditRow, ordered.limit(limit))

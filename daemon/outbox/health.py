"""How things stand with each destination, for `lungwatch doctor`."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from lungwatch.daemon.config import Config
from lungwatch.daemon.outbox.destination import parse_destination
from lungwatch.daemon.outbox.scu import StorageUser, TlsFiles, UnreachableError
from lungwatch.db.delivery_queries import QueueState, queue_states
from lungwatch.db.migrate import open_existing
from lungwatch.errors import DatabaseError, NotFoundError

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What was found out about one destination.

    Attributes
    ----------
    ok
        It answers, and nothing failed for good.
    detail
        What was found and, if not ok, what to do.
    """

    destination: str
    ok: bool
    detail: str


def standings(config: Config, now: datetime) -> Iterator[Standing]:
    """Ask every configured destination for a sign of life, and count what waits for it.

    Raises
    ------
    MissingExtraError
        If what sending needs is not installed.
    """
    queues = {queue.destination: queue for queue in _queues(config)}
    user: StorageUser | None = None
    for text in config.pacs_destinations:
        user = user or StorageUser(config.pacs_ae_title, TlsFiles.of(config))
        try:
            user.echo(parse_destination(text))
            reached, found = True, "answers C-ECHO"
        except UnreachableError as error:
            reached, found = False, f"not reached ({error}); what waits is sent when it is"
        queue = queues.pop(text, None)
        ended = _ended(queue)
        yield Standing(
            destination=text,
            ok=reached and not ended,
            detail="; ".join(part for part in (found, _waiting(queue, now), ended) if part),
        )
    for queue in queues.values():
        if queue.queued:
            yield Standing(
                destination=queue.destination,
                ok=False,
                detail=f"{_waiting(queue, now)}, but it is no longer in 'pacs_destinations'",
            )


def _queues(config: Config) -> list[QueueState]:
    try:
        engine = open_existing(config.database_url)
    except (NotFoundError, DatabaseError):  # none yet, or what the check of it tells
        return []
    try:
        return queue_states(engine)
    finally:
        engine.dispose()


def _waiting(queue: QueueState | None, now: datetime) -> str:
    if queue is None or queue.oldest_at is None:
        return "nothing waits"
    return f"{queue.queued} objects wait, the oldest for {_age(now - queue.oldest_at)}"


def _ended(queue: QueueState | None) -> str:
    if queue is None or not queue.failed + queue.invalid:
        return ""
    return (
        f"{queue.failed} were refused, {queue.invalid} were invalid: see `lungwatch pacs queue`, "
        "then `lungwatch pacs send --failed`"
    )


def _age(age: timedelta) -> str:
    seconds = max(0.0, age.total_seconds())
    if seconds >= _DAY_S:
        return f"{seconds / _DAY_S:.1f} days"
    if seconds >= _HOUR_S:
        return f"{seconds / _HOUR_S:.1f} h"
    return f"{seconds / 60:.0f} min"

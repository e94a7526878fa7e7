"""The running daemon among the checks of `lungwatch doctor`."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lungwatch.daemon.check import Check
from lungwatch.daemon.config import Config
from lungwatch.daemon.errortext import describe
from lungwatch.daemon.home import Home
from lungwatch.daemon.namerules import NameRules
from lungwatch.daemon.running import Holder, age_s, ask_health, backlog_of, holder_of, read_signs
from lungwatch.errors import LungwatchError


def check_running(config: Config) -> Iterator[Check]:
    """Yield the daemon, its health, and the work that waits, each told within seconds."""
    home = Home(config.home)
    holder = holder_of(home)
    yield _daemon(holder)
    if holder is not None and config.metrics_port:
        yield _health(config.metrics_port)
    yield _drop_folder(home, config.name_rules)
    yield from _record(config)


def _daemon(holder: Holder | None) -> Check:
    if holder is None:
        return Check(name="daemon", ok=None, detail="no process holds the home")
    detail = f"process {holder.pid} holds the home, up for {holder.uptime_s:.0f} s"
    if holder.is_stopped:
        detail += "; a signal has stopped it: kill -CONT, or restart the service"
    return Check(name="daemon", ok=not holder.is_stopped, detail=detail, data=asdict(holder))


def _health(port: int) -> Check:
    try:
        found = ask_health(port)
    except OSError as error:
        why = str(error) or "it does not answer in time"
        return Check(name="health", ok=False, detail=f"port {port}: {error.strerror or why}")
    reasons: Any = found.get("reasons") or []
    said = "; ".join(str(reason.get("text")) for reason in reasons)
    status = str(found["status"])
    return Check(
        name="health",
        ok={"ok": True, "degraded": None}.get(status, False),
        detail=f"{status}: {said}" if said else status,
        data=found,
    )


def _drop_folder(home: Home, names: NameRules) -> Check:
    try:
        backlog = backlog_of(home, names, datetime.now(UTC))
    except OSError as error:
        return Check(name="waiting", ok=False, detail=error.strerror or "no answer in time")
    detail = f"{backlog.files} files in incoming/"
    if backlog.oldest_s is not None:
        detail += f", the oldest for {backlog.oldest_s:.0f} s"
    if backlog.skipped:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(backlog.skipped.items()))
        detail += f"; {sum(backlog.skipped.values())} skipped for their names: {parts}"
    return Check(name="waiting", ok=None, detail=detail, data=asdict(backlog))


def _record(config: Config) -> Iterator[Check]:
    try:
        signs = read_signs(config)
    except TimeoutError:
        yield Check(name="last result", ok=False, detail="the database does not answer in time")
        return
    except LungwatchError as error:
        yield Check(name="last result", ok=None, detail=describe(error))
        return
    if signs is None:
        yield Check(name="last result", ok=None, detail="none yet")
        return
    last = signs.last_done.isoformat(timespec="seconds") if signs.last_done else None
    yield Check(
        name="last result",
        ok=None,
        detail=f"{last or 'none yet'}; {signs.queued} to be tried again",
        data={"last_done": last, "queued": signs.queued},
    )
    oldest_s = age_s(signs.oldest_delivery)
    detail = f"{signs.outbox_waiting} objects to be sent"
    if oldest_s is not None:
        detail += f", the oldest for {oldest_s:.0f} s"
    detail += f"; {signs.outbox_ended} refused or invalid"
    data = {
        "waiting": signs.outbox_waiting,
        "oldest_s": oldest_s,
        "refused_or_invalid": signs.outbox_ended,
    }
    yield Check(name="outbox", ok=None, detail=detail, data=data)

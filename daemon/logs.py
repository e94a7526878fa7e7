"""Log events and their formats: text, JSON lines and systemd's journal.

File names are never logged: modalities and people put patients' names into them.
"""

import contextlib
import json
import logging
import os
import queue
import re
import select
import socket
import struct
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lungwatch.errors import ConfigError

if TYPE_CHECKING:
    from lungwatch.daemon.config import LogFormat

JOURNAL = Path("/run/systemd/journal/socket")
_LONGEST = 4096  # characters of one value: an entry must fit into one datagram
_MOST_LINES = 10_000  # that wait for a reader
_FLUSH_S = 2.0
_STDERR = 2
# Of syslog(3), which the journal counts by.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: no value can end the line or steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fixed = {"time": time, "level": record.levelname.lower()}
        fields = {key: _plain(value) for key, value in fields_of(record).items()}
        return json.dumps({**fixed, **{k: v for k, v in fields.items() if k not in fixed}})


class JournalHandler(logging.Handler):
    """Writes entries by the journal's native protocol (systemd, Native Journal Protocol).

    Parameters
    ----------
    address
        The journal's datagram socket.

    Raises
    ------
    ConfigError
        If nothing can be sent there.
    """

    def __init__(self, address: Path = JOURNAL) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._address = str(address)
        try:
            self._socket.sendto(b"", self._address)  # an empty entry is dropped
        except OSError as error:
            self.close()
            raise ConfigError(
                f"log_format is journald, and {address} takes nothing ({error.strerror}); "
                "choose text, json or auto"
            ) from error

    def emit(self, record: logging.LogRecord) -> None:
        """Send an event; to standard error if the journal takes nothing."""
        try:
            self._socket.sendto(journal_entry(record), self._address)
        except OSError:
            with contextlib.suppress(OSError):
                _write(_STDERR, record.getMessage())

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


class DescriptorHandler(logging.Handler):
    """Writes lines to a descriptor, past `sys.stderr`, whose lock a blocked write would keep."""

    def __init__(self, descriptor: int = _STDERR) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; it is lost where nobody can read it any more."""
        with contextlib.suppress(OSError):
            _write(self._descriptor, self.format(record))


class QueuedHandler(logging.Handler):
    """Hands records to a thread that writes them; a reader that stalls holds only that thread up.

    What finds the queue full is counted. The count is reported in one line as soon as the queue
    is empty again.

    Parameters
    ----------
    target
        Writes the records. Only the thread calls it, without its lock: at the process's end
        `logging.shutdown` takes that lock, and would wait for a blocked write.
    most_lines
        Lines that wait at most.
    """

    def __init__(self, target: logging.Handler, most_lines: int = _MOST_LINES) -> None:
        super().__init__()
        self._target = target
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(most_lines)
        self._guard = threading.Lock()
        self._dropped = self._reported = 0
        self._flush_s = _FLUSH_S
        threading.Thread(target=self._write_on, name="log", daemon=True).start()

    @property
    def dropped(self) -> int:
        """Lines that were dropped since the start."""
        with self._guard:
            return self._dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as dropped; never wait."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            with self._guard:
                self._dropped += 1

    def redirect(self, target: logging.Handler) -> None:
        """Write the following records elsewhere."""
        self._target = target

    def flush(self) -> None:
        """Wait until all is written, for a bounded time."""
        self.is_flushed()

    def is_flushed(self) -> bool:
        """Wait until all is written, for a bounded time; say whether it is."""
        deadline_s = time.monotonic() + self._flush_s
        while self._queue.unfinished_tasks:
            if time.monotonic() >= deadline_s:
                self._flush_s = 0.0  # a reader that stalls is waited for once
                return False
            time.sleep(0.01)
        self._flush_s = _FLUSH_S
        return True

    def close(self) -> None:
        """End the thread, unless the reader stalls; what comes later is not written."""
        if self.is_flushed():
            self._queue.put(None)
        super().close()

    def _write_on(self) -> None:
        while True:
            record = self._queue.get()
            if record is None:
                self._queue.task_done()
                return
            try:
                self._target.emit(record)
                if self._queue.empty():
                    self._report()
            except Exception as error:
                with contextlib.suppress(OSError):
                    _write(_STDERR, f"a log record cannot be written: {type(error).__name__}")
            finally:
                self._queue.task_done()

    def _report(self) -> None:
        with self._guard:
            count, self._reported = self._dropped - self._reported, self._dropped
        if count:
            fields = {"action": "log_dropped", "lines": count}
            text = f"action=log_dropped lines={count}"
            self._target.emit(
                logging.makeLogRecord(
                    {
                        "name": _log.name,
                        "levelno": logging.WARNING,
                        "levelname": "WARNING",
                        "msg": text,
                        "event_fields": fields,
                    }
                )
            )


def _write(descriptor: int, line: str) -> None:
    """Write a line as a whole, also where the descriptor does not block."""
    left = (line + "\n").encode("utf-8", "backslashreplace")
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def journal_entry(record: logging.LogRecord) -> bytes:
    """Return a record as the journal's native protocol has it."""
    priority = next((p for level, p in _PRIORITIES if record.levelno >= level), 7)
    fields = {
        **{_field_name(key): value for key, value in fields_of(record).items()},
        "MESSAGE": record.getMessage(),
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "lungwatch",
    }
    return b"".join(_field(name, str(value)[:_LONGEST]) for name, value in fields.items())


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Say whether a descriptor leads to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of an event; of any other record, its message."""
    fields = getattr(record, "event_fields", None)
    return dict(fields) if fields is not None else {"action": "log", "text": record.getMessage()}


def _field_name(key: str) -> str:
    return re.sub("[^A-Z0-9_]", "_", key.upper()).lstrip("_") or "FIELD"


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:  # a value of several lines is given with its length
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return f"{name}=".encode() + data + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, bool | int | None):
        return value
    # Neither infinity nor NaN has a form in JSON.
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return str(value)


_log = logging.getLogger("lungwatch")


def event(action: str, sha256: str = "", *, level: int = logging.INFO, **values: object) -> None:
    """Log an event.

    Parameters
    ----------
    action
        Key of the event: "claimed", "filed", "rejected".
    sha256
        Digest of the file's content; only its first 12 digits are logged.
    level
        As in `logging`.
    values
        Further keys. Text with spaces is quoted.
    """
    parts = [f"action={action}"]
    if sha256:
        parts.append(f"sha={sha256[:12]}")
    parts += [f"{key}={_text(value)}" for key, value in values.items()]
    fields = {"action": action, **({"sha": sha256[:12]} if sha256 else {}), **values}
    # As an argument, so that a per cent sign in a value is not a directive.
    _log.log(level, "%s", " ".join(parts), extra={"event_fields": fields})


def _text(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return '"' + text.replace('"', "'") + '"' if " " in text or not text else text


_queued: QueuedHandler | None = None


def configure(
    *, quiet: bool = False, log_format: "LogFormat" = "text", queued: bool = False
) -> None:
    """Send events to standard error, or to the journal.

    Parameters
    ----------
    quiet
        Warnings only, beside a progress bar.
    log_format
        As in `Config`.
    queued
        Whether a thread writes, so that a reader that stalls never stops the caller.

    Raises
    ------
    ConfigError
        For "journald" where there is no journal.
    """
    global _queued  # noqa: PLW0603 - as the logger itself, one for the process
    handler = _make_handler(log_format, queued=queued)
    _queued = QueuedHandler(handler) if queued else None
    root = logging.getLogger("lungwatch")
    root.handlers[:] = [_queued or handler]
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
    # pydicom quotes invalid values and the names of their files, in its log and as warnings: both
    # are patients' data.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def change_format(log_format: "LogFormat") -> None:
    """Write the following events in another format, where a thread writes them.

    Raises
    ------
    ConfigError
        For "journald" where there is no journal; the format stays as it is.
    """
    handler = _make_handler(log_format, queued=True)
    if _queued is not None:
        _queued.redirect(handler)


def flush() -> bool:
    """Wait for a bounded time until all events are written; say whether they are."""
    return _queued is None or _queued.is_flushed()


def dropped_lines() -> int:
    """Return how many lines found the queue full."""
    return 0 if _queued is None else _queued.dropped


def _make_handler(log_format: "LogFormat", *, queued: bool) -> logging.Handler:
    in_journal = log_format == "auto" and is_journal(2, os.environ)
    if log_format == "journald" or in_journal:
        return JournalHandler()
    handler = DescriptorHandler() if queued else logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler

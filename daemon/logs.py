"""One line an event: key=value, an action, the content's short hash, no patient data.

File names are never logged: modalities and people put patients' names into them.
"""

import logging
import os
import warnings

from lungwatch.daemon.config import LogFormat
from lungwatch.daemon.logformats import JournalHandler, JsonFormatter, is_journal

_log = logging.getLogger("lungwatch")


def event(action: str, sha256: str = "", *, level: int = logging.INFO, **values: object) -> None:
    """Log an event.

    Parameters
    ----------
    action
        What happened, as one word: "claimed", "filed", "rejected".
    sha256
        The content it happened to; only its first 12 digits are logged.
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
    # As an argument: a per cent sign in a value is no directive.
    _log.log(level, "%s", " ".join(parts), extra={"event_fields": fields})


def _text(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return '"' + text.replace('"', "'") + '"' if " " in text or not text else text


def configure(*, quiet: bool = False, log_format: LogFormat = "text") -> None:
    """Send events to standard error, or to the journal.

    Parameters
    ----------
    quiet
        Warnings only, beside a progress bar.
    log_format
        As in `Config`.

    Raises
    ------
    ConfigError
        For "journald" where there is no journal.
    """
    handler = _make_handler(log_format)
    root = logging.getLogger("lungwatch")
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
    # pydicom quotes the values that it finds fault with and the names of the files that hold
    # them, in its log and as warnings: both are patients' data.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _make_handler(log_format: LogFormat) -> logging.Handler:
    in_journal = log_format == "auto" and is_journal(2, os.environ)
    if log_format == "journald" or in_journal:
        return JournalHandler()
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler

"""One key of the configuration file, set without touching the rest."""

import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lungwatch.atomicfile import write_atomic
from lungwatch.errors import ConfigError


def set_text(path: Path, key: str, value: str) -> None:
    """Set a key whose value is text; comments, order and all other keys stay as they are.

    Parameters
    ----------
    path
        The file; it is made if it is not there. A link is followed.

    Raises
    ------
    ConfigError
        If it cannot be read, is no TOML, cannot be written, or has the key in a form that is
        better changed by hand.
    """
    target = path.resolve()
    try:
        text = target.read_bytes().decode()
        known: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError:
        text, known = "", {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    wanted = known | {key: value}
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for changed in _candidates(text, key, line):
        # Whatever the text looks like, what it says has to be the old plus the one key.
        if _parsed(changed) == wanted:
            _write(target, changed)
            return
    raise ConfigError(f"{path} has '{key}' in a form that is not changed here: write {line}")


def _candidates(text: str, key: str, line: str) -> Iterator[str]:
    end = "\r\n" if "\r\n" in text else "\n"
    pattern = re.compile(
        rf"""^[ \t]*{re.escape(key)}[ \t]*=[ \t]*("[^"\r\n]*"|'[^'\r\n]*')""", re.MULTILINE
    )
    for found in pattern.finditer(text):
        yield text[: found.start()] + line + text[found.end() :]
    gap = "" if not text or text.endswith("\n") else end
    yield f"{text}{gap}{line}{end}"
    yield f"{line}{end}{text}"  # before a table, which would take it in


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _write(target: Path, text: str) -> None:
    try:
        before = target.stat() if target.exists() else None
        write_atomic(target, text.encode())
        if before is not None:
            target.chmod(before.st_mode & 0o7777)
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(target, before.st_uid, before.st_gid)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error

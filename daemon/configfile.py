"""Configuration sources: the TOML file, the environment and the database's password file."""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lungwatch.daemon.config import (
    _RANGES,
    Config,
    Key,
    check_drift,
    check_names,
    check_receiving,
    check_sending,
)
from lungwatch.errors import ConfigError
from lungwatch.files import write_atomic

PREFIX = "LUNGWATCH_"

# Read elsewhere: the file itself, the crash points and the test suite's own switches.
_NOT_KEYS = ("CONFIG", "CRASH_AT", "HANG_AT", "TEST_")


def values_from_file(path: Path, keys: Mapping[str, Key]) -> dict[str, Any]:
    """Read the TOML file.

    Raises
    ------
    ConfigError
        If it is missing or malformed, or holds an unknown key or a value that is not allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    where = f"in {path}"
    return {name: _known(keys, name, where).check(value, where) for name, value in raw.items()}


def values_from_environment(environ: Mapping[str, str], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Read the `LUNGWATCH_…` variables.

    Raises
    ------
    ConfigError
        For an unknown one, or a value that is not allowed.
    """
    values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable.removeprefix(PREFIX).startswith(_NOT_KEYS):
            continue
        where = f"in the environment ({variable})"
        key = _known(keys, variable.removeprefix(PREFIX).lower(), where)
        values[key.name] = key.check(key.parse(text, variable), where)
    return values


def _known(keys: Mapping[str, Key], name: str, where: str) -> Key:
    if name not in keys:
        raise ConfigError(f"unknown key '{name}' {where}; known keys: {', '.join(sorted(keys))}")
    return keys[name]


def url_with_password(config: "Config") -> str:
    """Return `database_url` with the password in it.

    Raises
    ------
    ConfigError
        If the file cannot be read or is empty, or the URL is of a database without passwords or
        holds one already.
    DatabaseError
        If the URL is not understood.
    """
    from lungwatch.db.engine import parse_url  # noqa: PLC0415 - only those pay who set the key

    url = parse_url(config.database_url)
    if url.get_backend_name() == "sqlite":
        raise ConfigError("'database_password_file': an SQLite file has no password")
    if url.password is not None:
        raise ConfigError("'database_password_file': 'database_url' holds a password already")
    try:
        password = Path(config.database_password_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"'database_password_file' {config.database_password_file} cannot be read: {why}"
        ) from error
    # An editor ends the line; a password does not end with one.
    password = password.rstrip("\r\n")
    if not password:
        raise ConfigError(f"'database_password_file' {config.database_password_file} is empty")
    return url.set(password=password).render_as_string(hide_password=False)


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
        if _parse_toml(changed) == wanted:
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


def _parse_toml(text: str) -> dict[str, Any] | None:
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


_KEYS = {key.name: Key.of(key.name, key.type, _RANGES.get(key.name)) for key in fields(Config)}


def load_config(
    config_path: Path | None = None,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read the configuration.

    Parameters
    ----------
    config_path
        A TOML file; None for `LUNGWATCH_CONFIG`, then `lungwatch.toml` in the home if there.
    home
        From the command line; wins over everything.
    environ
        The environment; the process's own if None.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key, a value of the wrong type or out of
        range: the message names the key and where it was found.
    """
    environ = os.environ if environ is None else environ
    from_env = values_from_environment(environ, _KEYS)
    if config_path is None and environ.get(PREFIX + "CONFIG"):
        config_path = Path(environ[PREFIX + "CONFIG"])
    if config_path is None:
        candidate = Path(home or from_env.get("home") or Config.home) / "lungwatch.toml"
        config_path = candidate if candidate.is_file() else None
    values = values_from_file(config_path, _KEYS) if config_path else {}
    values |= from_env
    if home is not None:
        values["home"] = home
    values["home"] = Path(values.get("home", Config.home)).expanduser().absolute()
    config = Config(**values)
    if not config.database_url:
        if "?" in str(config.home):  # the rest would be read as the URL's parameters
            raise ConfigError(f"'home' must not contain '?': {config.home}")
        values["database_url"] = f"sqlite:///{config.home / 'lungwatch.db'}"
        config = Config(**values)
    if config.database_password_file:
        values["database_url"] = url_with_password(config)
        config = Config(**values)
    check_names(config)
    check_drift(config)
    check_sending(config)
    check_receiving(config)
    return config

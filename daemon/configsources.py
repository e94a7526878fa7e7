"""Where the configuration's values come from: the TOML file and the environment."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungwatch.daemon.configkey import Key
from lungwatch.errors import ConfigError

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

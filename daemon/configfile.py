"""Configuration sources: the TOML file, the environment, the database's password file.

The reference in docs/configuration.md and the sample file are generated here from the keys.
"""

import contextlib
import difflib
import inspect
import json
import logging
import os
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, InitSettingsSource

from lungwatch.daemon.config import SECTIONS, Config, Keys
from lungwatch.daemon.logs import event
from lungwatch.errors import ConfigError
from lungwatch.files import write_atomic

PREFIX = "LUNGWATCH_"
# Read elsewhere: the file itself, the crash points and the test suite's own switches.
_NOT_KEYS = ("CONFIG", "CRASH_AT", "HANG_AT", "PAUSE_", "TEST_", "QUERY_SOCKET")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_WIDTH = 98


@dataclass(frozen=True, kw_only=True)
class ConfigKey:
    """One key: its section, its attribute of `Config` and its declaration."""

    section: type[Keys]
    attribute: str
    field: FieldInfo

    @property
    def name(self) -> str:
        """Name in its section."""
        return self.attribute.removeprefix(self.section.PREFIX)

    @property
    def dotted(self) -> str:
        """Name in messages: ``section.key``."""
        return f"{self.section.SECTION}.{self.name}".removeprefix(".")

    @property
    def variable(self) -> str:
        """Name in the environment: ``LUNGWATCH_SECTION_KEY``."""
        return PREFIX + self.dotted.replace(".", "_").upper()

    @property
    def values(self) -> str:
        """Range or choices, for people; empty for any value."""
        limits = {
            n: getattr(m, n) for m in self.field.metadata for n in ("ge", "le") if hasattr(m, n)
        }
        if limits:
            return f"{limits['ge']:g} to {limits['le']:g}"
        if get_origin(self.field.annotation) is not None and self.kind is str:
            return ", ".join(get_args(self.field.annotation))
        return ""

    @property
    def kind(self) -> type:
        """Type of the value: str, int, float, bool, tuple of str, or Path."""
        found = get_origin(self.field.annotation) or self.field.annotation
        return found if isinstance(found, type) else str

    @property
    def help(self) -> str:
        """Help text, in one line."""
        return " ".join((self.field.description or "").split())

    @property
    def default(self) -> str:
        """The default as TOML."""
        return _toml(self.field.default)


KEYS = {
    attribute: ConfigKey(section=section, attribute=attribute, field=field)
    for section in SECTIONS
    for attribute, field in section.model_fields.items()
}
_BY_DOTTED = {key.dotted: key for key in KEYS.values()}
_BY_VARIABLE = {PREFIX + key.attribute.upper(): key for key in KEYS.values()} | {
    key.variable: key for key in KEYS.values()
}


class _File(InitSettingsSource):
    """The TOML file: tables are sections; names of before the sections are noted as moved."""

    def __init__(self, path: Path) -> None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"the configuration file {path} does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        self.moved: dict[str, str] = {}
        """Old names in the file, and where each key is now."""
        super().__init__(Config, self._values(raw, path))

    def _values(self, raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
        sections = {section.SECTION for section in SECTIONS} - {""}
        values: dict[str, Any] = {}
        for name, value in raw.items():
            is_table = name in sections and isinstance(value, dict)
            found = {f"{name}.{key}": v for key, v in value.items()} if is_table else {name: value}
            for dotted, one in found.items():
                key = _BY_DOTTED.get(dotted)
                if key is None and (key := KEYS.get(dotted)) is not None:
                    self.moved[dotted] = f"[{key.section.SECTION}] {key.name}"
                if key is None:
                    raise _unknown(dotted, f"in {path}", _BY_DOTTED)
                if key.attribute in values:
                    raise ConfigError(f"'{key.dotted}' is set twice in {path}")
                values[key.attribute] = one
        return values


class _Environment(EnvSettingsSource):
    """The variables `LUNGWATCH_SECTION_KEY`; names without the section are taken as well."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.variables: dict[str, str] = {}
        self._environ = environ
        super().__init__(Config, env_prefix=PREFIX)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        found: dict[str, str | None] = {}
        for variable, text in self._environ.items():
            name = variable.removeprefix(PREFIX)
            if name == variable or name.startswith(_NOT_KEYS):
                continue
            key = _BY_VARIABLE.get(variable.upper())
            if key is None:
                raise _unknown(variable, "in the environment", _BY_VARIABLE)
            if key.attribute in self.variables:
                raise ConfigError(f"{variable} is {self.variables[key.attribute]} again: set one")
            self.variables[key.attribute] = variable
            found[(PREFIX + key.attribute).lower()] = text
        return found

    def prepare_field_value(
        self,
        field_name: str,
        field: FieldInfo,
        value: Any,  # noqa: ANN401 - as in the library
        value_is_complex: bool,  # noqa: FBT001
    ) -> Any:  # noqa: ANN401
        """Turn a variable's text into what the file would hold."""
        del field, value_is_complex
        kind = KEYS[field_name].kind
        if value is None or kind in (str, Path):
            return value
        if kind is tuple:
            return [part.strip() for part in value.split(",") if part.strip()]
        try:
            return _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{self.variables[field_name]}: {value!r} is not a value for "
                f"'{KEYS[field_name].dotted}'"
            ) from error


def load_config(
    config_path: Path | None = None,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read the configuration; later sources win: defaults, file, environment, command line.

    Parameters
    ----------
    config_path
        A TOML file; None for `LUNGWATCH_CONFIG`, then `lungwatch.toml` in the home if there.
    home
        From the command line.
    environ
        The environment; the process's own if None.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key, a value of the wrong type or out of
        range: the message names the key and where it was found.
    """
    environ = os.environ if environ is None else environ
    environment = _Environment(environ)
    where = {name: f"in the environment ({v})" for name, v in environment.variables.items()}
    given: dict[str, Any] = {} if home is None else {"home": home}
    if config_path is None and environ.get(PREFIX + "CONFIG"):
        config_path = Path(environ[PREFIX + "CONFIG"])
    if config_path is None:
        named = home or environment().get("home") or KEYS["home"].field.default
        candidate = Path(named) / "lungwatch.toml"
        config_path = candidate if candidate.is_file() else None
    file = None if config_path is None else _File(config_path)
    try:
        config = Config(**given | {"sources": (environment, file) if file else (environment,)})
    except ValidationError as error:
        raise _bad_value(error, where, f"in {config_path}") from error
    config = config.replace(home=config.home.expanduser().absolute())
    if not config.database_url:
        if "?" in str(config.home):  # the rest would be read as the URL's parameters
            raise ConfigError(f"'home' must not contain '?': {config.home}")
        config = config.replace(database_url=f"sqlite:///{config.home / 'lungwatch.db'}")
    if config.database_password_file:
        config = config.replace(database_url=_url_with_password(config))
    config.validate_together()
    for old, new in file.moved.items() if file else ():
        event("config_key_moved", level=logging.WARNING, key=old, now=new, file=config_path)
    return config


def _unknown(name: str, where: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see docs/configuration.md"
    return ConfigError(f"unknown key '{name}' {where}{hint}")


def _bad_value(error: ValidationError, where: Mapping[str, str], elsewhere: str) -> ConfigError:
    first = error.errors()[0]
    attribute = str(first["loc"][0])
    problem = str(first["msg"]).removeprefix("Input ")
    return ConfigError(
        f"bad value for '{KEYS[attribute].dotted}' {where.get(attribute, elsewhere)}: "
        f"{first['input']!r} {problem}"
    )


def _url_with_password(config: Config) -> str:
    """Return `database_url` with the password in it, which no message may show."""
    from lungwatch.db.engine import parse_url  # noqa: PLC0415 - only those pay who set the key

    url = parse_url(config.database_url)
    if url.get_backend_name() == "sqlite":
        raise ConfigError("'database_password_file': an SQLite file has no password")
    if url.password is not None:
        raise ConfigError("'database_password_file': 'database_url' holds a password already")
    file = f"'database_password_file' {config.database_password_file}"
    try:
        password = Path(config.database_password_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read: {why}") from error
    # An editor ends the line; a password does not end with one.
    password = password.rstrip("\r\n")
    if not password:
        raise ConfigError(f"{file} is empty")
    return url.set(password=password).render_as_string(hide_password=False)


def set_text(path: Path, key: str, value: str) -> None:
    """Set a key above the first table whose value is text; all else in the file stays as it is.

    Parameters
    ----------
    path
        The file; it is created if missing. A link is followed.

    Raises
    ------
    ConfigError
        If the file cannot be read or written, is not valid TOML, or has the key in a form that is
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
        # Whatever the text looks like, it has to say the old values and the one new one.
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads(changed) == wanted:
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


def sample() -> str:
    """Return a configuration file with every key commented out, its default and its help text."""
    lines = ["# Configuration of lungwatch. Every key is commented out and shows its default."]
    for section in SECTIONS:
        lines += ["", *_comment(inspect.cleandoc(section.__doc__ or ""))]
        lines += [f"[{section.SECTION}]"] if section.SECTION else []
        for attribute in section.model_fields:
            key = KEYS[attribute]
            allowed = f" ({key.values})" if key.values else ""
            lines += ["", *_comment(f"{key.help}{allowed}")]
            lines.append(f"#{key.name} = {key.default}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def reference() -> str:
    """Return the keys as Markdown, one table for each section."""
    lines: list[str] = []
    for section in SECTIONS:
        title = f"`[{section.SECTION}]`" if section.SECTION else "Above the first table"
        lines += [f"## {title}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | `{key.default}` | {key.values} | {key.help} |"
            for key in map(KEYS.__getitem__, section.model_fields)
        ]
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)

"""One key of the configuration: what its value may be, and how text becomes one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from lungwatch.errors import ConfigError

_PARSERS: dict[Any, Callable[[str], object]] = {
    int: int,
    float: float,
    tuple: lambda text: [part.strip() for part in text.split(",") if part.strip()],
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is allowed for one key.

    Attributes
    ----------
    name
        As in the TOML file.
    kind
        Type of its value: str, int, float, bool, `Path`, or tuple for a list of strings.
    choices
        The values that a str may have; any if empty.
    limits
        Least and greatest value of a number; None for any.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None

    @classmethod
    def of(cls, name: str, annotation: object, limits: tuple[float, float] | None) -> "Key":
        """Return the key of a field with this annotation."""
        if get_origin(annotation) is Literal:
            return cls(name=name, kind=str, choices=get_args(annotation))
        kind = get_origin(annotation) or annotation
        return cls(name=name, kind=cast(type, kind), limits=limits)

    def parse(self, text: str, variable: str) -> object:
        """Turn an environment variable's text into what the TOML file would hold.

        Raises
        ------
        ConfigError
            If the text is none; it names the variable.
        """
        try:
            return _PARSERS[self.kind](text) if self.kind in _PARSERS else text
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{variable}: {text!r} is not a value for '{self.name}'") from error

    def check(self, value: object, where: str) -> object:
        """Return the value as the configuration holds it.

        Raises
        ------
        ConfigError
            If its type, or it, is not allowed; it says where it was found.
        """
        problem = f"bad value for '{self.name}' {where}: "
        typed = self._typed(value)
        if typed is None:
            raise ConfigError(f"{problem}{value!r}")
        if self.choices and typed not in self.choices:
            *others, last = self.choices
            raise ConfigError(f"{problem}{value!r} is not {', '.join(others)} or {last}")
        if self.limits and isinstance(typed, int | float):
            low, high = self.limits
            if not low <= typed <= high:
                raise ConfigError(f"{problem}{typed} is not within {low}..{high}")
        return typed

    def _typed(self, value: object) -> object | None:
        if self.kind is tuple:
            is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
            return tuple(cast(list[str], value)) if is_list else None
        if self.kind is Path:
            return Path(value) if isinstance(value, str) and value else None
        if self.kind is float and type(value) is int:
            return float(value)
        return value if type(value) is self.kind else None

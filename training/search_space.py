"""What a search may choose from, and how far a range may be extended."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from lungwatch.errors import ConfigError

Number = int | float

# A value this near to the end of a range, as a share of its width, lies at its edge.
_EDGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers between two, both included.

    Attributes
    ----------
    low, high
        The range at first.
    lowest, highest
        The hard limits of its extension.
    log
        Whether ratios count, not differences.
    integer
        Whole numbers only.
    """

    low: Number
    high: Number
    lowest: Number
    highest: Number
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.lowest <= self.low < self.high <= self.highest:
            raise ConfigError("a range needs lowest <= low < high <= highest")
        if self.log and self.lowest <= 0:
            raise ConfigError("a logarithmic range lies above 0")

    def extended(self, best: Number) -> Self:
        """Return the range, half as wide again on the side at whose edge the best value lies."""
        low, high, at = (self._scaled(value) for value in (self.low, self.high, best))
        margin, step = _EDGE * (high - low), 0.5 * (high - low)
        if at <= low + margin:
            return replace(self, low=max(self.lowest, self._unscaled(low - step)))
        if at >= high - margin:
            return replace(self, high=min(self.highest, self._unscaled(high + step)))
        return self

    def _scaled(self, value: Number) -> float:
        return math.log(value) if self.log else float(value)

    def _unscaled(self, value: float) -> Number:
        number = math.exp(value) if self.log else value
        return round(number) if self.integer else number


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A few numbers on a ladder of more.

    Attributes
    ----------
    rungs
        All numbers there are, ascending: the first and the last are the hard limits.
    first, last
        The positions among them of the lowest and the highest number in use.
    """

    rungs: tuple[Number, ...]
    first: int
    last: int

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ConfigError("the numbers to choose from must ascend")
        if not 0 <= self.first <= self.last < len(self.rungs):
            raise ConfigError("the numbers in use are not among those to choose from")

    @property
    def log(self) -> bool:
        """Whether the numbers differ by ratios rather than by differences."""
        return self.rungs[0] > 0 and self.rungs[-1] / self.rungs[0] >= 8

    @property
    def values(self) -> tuple[Number, ...]:
        """The numbers in use."""
        return self.rungs[self.first : self.last + 1]

    def extended(self, best: Number) -> Self:
        """Return the ladder with the next number beyond the edge at which the best value lies."""
        first, last = self.first, self.last
        if best == self.rungs[first]:
            first = max(0, first - 1)
        if best == self.rungs[last]:
            last = min(len(self.rungs) - 1, last + 1)
        return replace(self, first=first, last=last)


Parameter = Range | Ladder
Space = Mapping[str, Parameter]


def extend(space: Space, best: Mapping[str, Number]) -> dict[str, Parameter]:
    """Return the space with every range extended at whose edge the best value lies."""
    return {name: parameter.extended(best[name]) for name, parameter in space.items()}


def describe_space(space: Space) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {name: asdict(parameter) for name, parameter in space.items()}

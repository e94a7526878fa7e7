"""The outcome of one check of `lungwatch doctor`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    ok
        None for a note that is neither good nor bad, such as an extra that is not installed.
    detail
        What was found and, if not ok, what to do.
    data
        The same for programs, where it is more than a sentence.
    """

    name: str
    ok: bool | None
    detail: str
    data: Mapping[str, object] | None = None

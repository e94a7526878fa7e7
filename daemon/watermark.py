"""The watermark: below so much free space nothing is claimed."""

import logging

from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event


class Watermark:
    """Looks at the free space of a home, and says when claiming pauses and goes on.

    Parameters
    ----------
    min_free_mb
        In MiB.
    """

    def __init__(self, home: Home, min_free_mb: int) -> None:
        self._home = home
        self._min_free_mb = min_free_mb
        self.is_short = False

    def has_space(self) -> bool:
        """Whether there is room for more; says so when that changes."""
        try:
            free_mb = self._home.free_mb()
        except OSError:
            return False  # the home itself is away; the drop folder's scan says so
        # A tenth more before it goes on: what is claimed next would have it pause again.
        enough_mb = self._min_free_mb * (11 if self.is_short else 10) / 10
        is_short = free_mb < enough_mb
        if is_short != self.is_short:
            self.is_short = is_short
            event(
                "paused" if is_short else "resumed",
                level=logging.WARNING,
                reason="disk",
                free_mb=free_mb,
                min_free_mb=self._min_free_mb,
            )
        return not is_short

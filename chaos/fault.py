"""Fault base classes: what an injected fault must do, and the course of passing ones."""

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from chaos.ledger import Audit
from chaos.place import ChaosError, Place
from tests.support.pictures import picture


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One injection and what was there afterwards.

    Attributes
    ----------
    recovery_s
        Seconds from the fault's end, or from the new start, to the next file's end.
    injected
        How often the fault struck: calls that failed, cuts, kills, or lines of the log that
        tell that it was met; None where it can only be seen from outside.
    note
        What else is worth a line.
    """

    audit: Audit
    recovery_s: float | None = None
    injected: int | None = None
    note: str = ""


@dataclass
class Lab:
    """Where the trials are made, and how many."""

    root: Path
    is_long: bool = False
    is_quick: bool = False
    _number: int = field(default=0, init=False)

    def place(self, **env: str) -> Place:
        """Return a new home; `env` holds settings without their prefix."""
        self._number += 1
        while (self.root / f"home-{self._number}").exists():
            self._number += 1  # an earlier run's, found bad and kept
        settings = {f"LUNGWATCH_{key}": value for key, value in env.items()}
        return Place(self.root / f"home-{self._number}", settings)

    def times(self, short: int, long: int) -> int:
        """Return how often, by the setting."""
        if self.is_quick:
            return 1
        return long if self.is_long else short

    def clear(self, place: Place, found: Audit) -> None:
        """Remove a home that was found clean; another one is kept to be looked at."""
        if found.is_clean:
            shutil.rmtree(place.root, ignore_errors=True)

    def say(self, text: str) -> None:
        """Write a line of progress with the time of day."""
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


class Fault(ABC):
    """One way in which things go wrong."""

    name: ClassVar[str]
    how: ClassVar[str]

    def obstacle(self) -> str | None:
        """Why it cannot be injected on this machine; None if it can."""
        return None

    @abstractmethod
    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Inject it, several times, and audit each time."""


class RepeatedFault(Fault):
    """One that is tried some times, each in a place of its own.

    Attributes
    ----------
    runs
        How often, in an ordinary and in a long run.
    settings
        Of the daemon.
    """

    runs: ClassVar[tuple[int, int]] = (3, 10)
    settings: ClassVar[dict[str, str]] = {}

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Try it, each time in a new place."""
        for run in range(lab.times(*self.runs)):
            place = lab.place(**self.settings)
            try:
                trial = self._trial(place, run)
            finally:
                place.kill()
                self.clean(place)
            yield trial
            lab.clear(place, trial.audit)

    def clean(self, place: Place) -> None:
        """After the audit, whatever happened."""

    @abstractmethod
    def _trial(self, place: Place, run: int) -> Trial:
        """Inject it once, and audit."""


class PassingFault(RepeatedFault):
    """One that comes while files are being worked on, stays for a while, and goes.

    What comes during the fault has to end after it. A daemon that died of it is started
    again once it is over, as a service manager would.

    Attributes
    ----------
    sign
        What the log says when the fault is met; empty where `strikes` counts otherwise.
    is_met_while_held
        Whether the daemon meets the fault while it lasts, which is waited for: on a busy machine
        that may be later than `hold_s`.
    """

    files: ClassVar[int] = 30
    hold_s: ClassVar[float] = 2.0
    sign: ClassVar[str] = ""
    is_met_while_held: ClassVar[bool] = False

    def prepare(self, place: Place) -> None:
        """Before the first start."""

    def launch(self, place: Place) -> None:
        """Start the daemon."""
        place.start_ready()

    @abstractmethod
    def inject(self, place: Place) -> None:
        """Bring the fault about."""

    @abstractmethod
    def heal(self, place: Place) -> None:
        """End it."""

    def strikes(self, place: Place) -> int | None:
        """How often it struck, asked when the files have their ends."""
        return place.log().count(self.sign) if self.sign else None

    def _trial(self, place: Place, run: int) -> Trial:
        """Drop a third before, a third just before and a third during the fault."""
        self.prepare(place)
        numbers = iter(range(run * 1000, run * 1000 + self.files))
        third = self.files // 3
        self.launch(place)
        for _ in range(third):
            self._drop(place, next(numbers))
        place.wait_for(lambda: len(place.ended()) >= third // 2, "no beginning")
        for _ in range(third):
            self._drop(place, next(numbers))
        self.inject(place)
        try:
            for number in numbers:
                self._drop(place, number)
            time.sleep(self.hold_s)
            if self.is_met_while_held:
                place.wait_for(
                    lambda: bool(self.strikes(place)) or not place.is_running, "nothing met it"
                )
        finally:
            self.heal(place)
        healed_s = time.monotonic()
        recovery_s = place.next_end_s(healed_s)
        place.settle()
        restarts = place.starts - 1
        struck = self.strikes(place)
        if struck == 0:
            raise ChaosError("it was brought about, and nothing met it")
        return Trial(
            audit=place.audit(),
            recovery_s=recovery_s,
            injected=struck,
            note=f"{restarts} restart(s)" if restarts else "",
        )

    def _drop(self, place: Place, number: int) -> None:
        name = f"{number}.dcm" if number % 10 == 9 else f"{number}.png"
        place.drop(name, picture(number), plainly=number % 4 == 0)

"""The clock is set while files are being worked on, and while files are to be removed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from chaos import shim
from chaos.fault import Fault, Lab, PassingFault, Trial
from chaos.place import ChaosError, Place
from chaos.shim import DAY_NS, Shim
from tests.support.pictures import picture

_YEARS_NS = 5 * 365 * DAY_NS
_FILES_EACH = 10


class ClockJump(PassingFault):
    """A day forth, and a day back beyond where it was."""

    name: ClassVar[str] = "clock jumps"
    how: ClassVar[str] = "the time of day is moved by +1 day, then to -1 day (LD_PRELOAD)"

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that tells another time."""
        return shim.obstacle()

    def launch(self, place: Place) -> None:
        """Start with the library preloaded."""
        self._shim = Shim(place)
        place.start_ready(**self._shim.env)

    def inject(self, place: Place) -> None:  # noqa: ARG002
        """Jump forth, and later back."""
        self._shim.set(clock_shift_ns=DAY_NS)
        time.sleep(1)
        self._readings = self._shim.shifted
        self._shim.set(clock_shift_ns=-DAY_NS)

    def heal(self, place: Place) -> None:  # noqa: ARG002
        """Set it right."""
        self._readings += self._shim.shifted
        self._shim.set()

    def strikes(self, place: Place) -> int:  # noqa: ARG002
        """Count the readings of the moved clock."""
        return self._readings


class WrongClock(Fault):
    """Five years ahead, then five years behind; retention has to stop, and the work to go on.

    Shares are confirmed (`--yes`), so that nothing but the clock's check keeps the files.
    """

    name: ClassVar[str] = "wrong clock"
    how: ClassVar[str] = (
        "the time of day is moved by +5 years, then to -5 years (LD_PRELOAD); under each, "
        "`lungwatch retention run --yes` (30 days, two backups over their limit) and a new start "
        "of the daemon; then the right clock and retention again"
    )

    def obstacle(self) -> str | None:
        """Without a compiler there is no library that tells another time."""
        return shim.obstacle()

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Drop some files under each clock, and run retention."""
        for run in range(lab.times(3, 10)):
            place = lab.place(RETAIN_DONE_DAYS="30", RETAIN_BACKUPS_GB="0.000001")
            try:
                trial = self._trial(place, run * 1000)
            finally:
                place.kill()
            yield trial
            lab.clear(place, trial.audit)

    def _trial(self, place: Place, first: int) -> Trial:
        moved = Shim(place)
        place.env |= moved.env  # the commands' too
        place.start_ready()
        _work(place, first)
        for _ in range(2):
            made = place.command("backup", "create")
            if made.returncode:
                raise ChaosError(f"no backup: {made.stderr[-300:]}")
        older = min(_backups(place), key=lambda path: path.stat().st_mtime_ns)
        struck = 0
        for shift_ns, reason in ((_YEARS_NS, "clock_ahead"), (-_YEARS_NS, "clock_behind")):
            moved.set(clock_shift_ns=shift_ns)
            first += _FILES_EACH
            _work(place, first)
            _expect_stop(place, reason)
            _restart_in_doubt(place, reason)
            first += _FILES_EACH
            _work(place, first)
            _expect_stop(place, reason)
            struck += moved.shifted
        moved.set()
        healed_s = time.monotonic()
        place.drop(f"{first + _FILES_EACH}.png", picture(first + _FILES_EACH))
        recovery_s = place.next_end_s(healed_s)
        before = _files(place)
        done = place.command("retention", "run", "--yes")
        if done.returncode or before - _files(place) != {older}:
            raise ChaosError(f"retention does not go on: {done.stderr[-300:]}")
        place.settle()
        return Trial(audit=place.audit(), recovery_s=recovery_s, injected=struck)


def _work(place: Place, first: int) -> None:
    """Drop files and wait for their ends."""
    for number in range(first, first + _FILES_EACH):
        place.drop(f"{number}.png", picture(number))
    place.wait_for(lambda: not place.waiting(), "the work does not go on")


def _expect_stop(place: Place, reason: str) -> None:
    """Run retention, which has to stop before the first removal."""
    before = _files(place)
    said = place.command("retention", "run", "--yes")
    if said.returncode != 1 or f"action=retention_stopped reason={reason}" not in said.stderr:
        raise ChaosError(f"retention does not stop ({reason}): {said.stderr[-300:]}")
    if before - _files(place):
        raise ChaosError(f"files were removed ({reason})")


def _restart_in_doubt(place: Place, reason: str) -> None:
    """Start the daemon again, which has to say at once that it doubts the clock."""
    said = f"action=clock_doubted reason={reason}"
    if place.stop():
        raise ChaosError("it did not end well")
    before = place.log().count(said)
    place.start_ready()
    place.wait_for(lambda: place.log().count(said) > before, f"the clock is not doubted ({reason})")


def _files(place: Place) -> set[Path]:
    """Return every file that retention could remove."""
    folders = ("done", "quarantine", "overlays", "backups")
    return {p for name in folders for p in (place.root / name).rglob("*") if p.is_file()}


def _backups(place: Place) -> list[Path]:
    return [path for path in (place.root / "backups").iterdir() if path.suffix == ".db"]

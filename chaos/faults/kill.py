"""The process is killed, at a chosen step or at any moment."""

import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

from chaos.fault import Fault, Lab, Trial
from chaos.place import ChaosError, Place
from lungwatch.daemon.stage import CRASH_POINTS
from tests.support.pictures import archive, picture, png

# In sending to a PACS, see `chaos.faults.sending`; with what was sent, in the tests.
_ELSEWHERE = ("own_object", "packed", "stored")
_BACKLOG = 300
_SAY_EVERY_S = 15.0


class KillAtStep(Fault):
    """At each step that leaves something durable behind."""

    name: ClassVar[str] = "killed at a durable step"
    how: ClassVar[str] = "the process sends itself SIGKILL at each named crash point in turn"

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Kill at each point, with several files in hand, then start again."""
        for repeat in range(lab.times(1, 5)):
            for point in CRASH_POINTS:
                if point not in _ELSEWHERE:
                    yield self._trial(lab, point, repeat)

    def _trial(self, lab: Lab, point: str, repeat: int) -> Trial:
        place = lab.place()
        for number in range(6):
            content = picture(repeat * 100 + number)
            place.drop(f"{number}.png", content)
        if point == "unpacked":
            self._drop_archive(place, repeat)
        elif point in ("rejected", "quarantined"):
            place.drop("no-image.png", b"not an image %d" % repeat)
        process = place.start(LUNGWATCH_CRASH_AT=point)
        process.wait(120)
        started_s = time.monotonic()
        place.start()
        recovery_s = place.next_end_s(started_s)
        place.settle()
        if process.returncode != -signal.SIGKILL:
            raise ChaosError(f"{point}: not reached")
        trial = Trial(audit=place.audit(), recovery_s=recovery_s, injected=1)
        place.kill()
        lab.clear(place, trial.audit)
        return trial

    def _drop_archive(self, place: Place, repeat: int) -> None:
        members = {f"m{n}.png": png(50_000 + repeat * 100 + n) for n in range(3)}
        for name, content in members.items():
            place.expect(name, content)
        place.drop("several.zip", archive(members))


class KillAtRandom(Fault):
    """At any moment, again and again, while files come in."""

    name: ClassVar[str] = "killed at random under load"
    how: ClassVar[str] = "SIGKILL every 1 to 6 s, during starts too, while files come in"
    counts: ClassVar[tuple[int, int]] = (400, 10_000)

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Kill under load in one home, from beginning to end."""
        place = lab.place()
        trial = self.trial(lab, place)
        yield trial
        lab.clear(place, trial.audit)

    def trial(self, lab: Lab, place: Place) -> Trial:
        """Kill until every file has been dropped and few are left, then let it finish."""
        chance = random.Random(20260101)
        count = lab.times(*self.counts)
        lab.say(f"kill-random: {count} files, home {place.root}, log {place.log_file}")
        dropper = threading.Thread(target=self._drop_all, args=(place, count), daemon=True)
        dropper.start()
        kills, said_s, recoveries = 0, time.monotonic(), []
        while dropper.is_alive() or len(place.waiting()) > _BACKLOG // 10:
            started_s = time.monotonic()
            place.start()
            if chance.random() < 0.8:
                recoveries.append(place.next_end_s(started_s))
            time.sleep(chance.uniform(1, 6) if chance.random() < 0.9 else chance.uniform(0, 1))
            place.kill()
            kills += 1
            if time.monotonic() - said_s > _SAY_EVERY_S:
                said_s = time.monotonic()
                ended = len(place.ended())
                lab.say(f"kill-random: {len(place.dropped)} dropped, {ended} ended, {kills} kills")
        dropper.join()
        place.settle(600)
        recoveries.sort()
        return Trial(
            audit=place.audit(),
            recovery_s=recoveries[len(recoveries) // 2] if recoveries else None,
            injected=kills,
            note="recovery: median",
        )

    def _drop_all(self, place: Place, count: int) -> None:
        for number in range(count):
            name = f"{number}.dcm" if number % 10 == 9 else f"{number}.png"
            place.drop(name, picture(number), plainly=number % 4 == 0)
            while number % 50 == 0 and sum(1 for _ in place.incoming.iterdir()) > _BACKLOG:
                time.sleep(0.2)

"""The power goes: what was not synchronised is gone."""

import random
import time
from collections.abc import Iterator
from typing import ClassVar

from chaos import shim
from chaos.disk import SYNC, Call, Disk, read_calls
from chaos.fault import Fault, Lab, Trial
from chaos.place import Place
from chaos.shim import Shim
from tests.support.pictures import picture

_FILES = 12


class PowerLoss(Fault):
    """At any call, as computed from a record of all calls on the home's files."""

    name: ClassVar[str] = "power loss"
    how: ClassVar[str] = (
        "every write, rename and fsync of a run is recorded (LD_PRELOAD); the disk's state at a "
        "cut is computed from it, a new home is made of that and the daemon started in it"
    )

    def obstacle(self) -> str | None:
        """Without a compiler there is no recording."""
        return shim.obstacle()

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Record one run; cut it just before and at fsyncs and between, worst case and mixed."""
        source = loaded(lab)
        disk = Disk(source.root)
        calls = record(source)
        chance = random.Random(7)
        syncs = [number for number, call in enumerate(calls) if call.op == SYNC]
        count = lab.times(12, 300)
        lab.say(f"power: {len(calls)} calls, {len(syncs)} of them syncs; {count} cuts")
        chosen = [chance.choice(syncs) + chance.randint(0, 1) for _ in range(count // 2)]
        chosen += [chance.randrange(len(calls)) for _ in range(count - len(chosen))]
        at = 0
        for number, cut in enumerate(sorted(chosen)):
            while at < cut:
                disk.apply(calls[at])
                at += 1
            place = lab.place()
            disk.cut(place.root, None if number % 2 else number)
            trial = after_cut(source, place)
            lab.clear(place, trial.audit)
            yield trial


def loaded(lab: Lab) -> Place:
    """Return a home with files in its drop folder."""
    place = lab.place()
    for number in range(_FILES):
        place.drop(f"{number}.png", picture(number))
    return place


def record(source: Place) -> list[Call]:
    """Let the daemon work a home off and return its calls on the home's files."""
    recorder = Shim(source, is_recording=True)
    source.start("--once", **recorder.env).wait(120)
    return read_calls(recorder.log)


def after_cut(source: Place, place: Place) -> Trial:
    """Start the daemon in what a cut left of a home, and see what becomes of the files."""
    place.dropped.update(source.dropped)
    started_s = time.monotonic()
    try:
        place.start()
        recovery_s = place.next_end_s(started_s)
        place.settle()
    finally:
        place.kill()
    return Trial(audit=place.audit(), recovery_s=recovery_s, injected=1)

"""Descriptors, threads and memory over many files."""

import contextlib
import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from chaos.fault import Fault, Lab, Trial
from chaos.leakplot import Sample, plot, verdict
from chaos.place import Place
from tests.support.pictures import picture

_BACKLOG = 100
_PERIOD_S = 1.0


class Leaks(Fault):
    """No fault: a long run, watched."""

    name: ClassVar[str] = "leaks over many files"
    how: ClassVar[str] = "descriptors, threads and RSS of daemon and decoders sampled every second"

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Work off many files in one process and judge by the slope after the warm-up."""
        place = lab.place()
        count = lab.times(1000, 20_000)
        place.start_ready()
        dropper = threading.Thread(target=self._drop_all, args=(place, count), daemon=True)
        dropper.start()
        samples: list[Sample] = []
        began_s = time.monotonic()
        while dropper.is_alive() or place.waiting():
            if place.process.poll() is not None:
                break
            samples.append(_sample(place.process.pid, began_s, len(place.ended())))
            if len(samples) % 30 == 0:
                lab.say(f"leaks: {samples[-1]}")
            if time.monotonic() - began_s > count + 300:
                break
            time.sleep(_PERIOD_S)
        place.settle()
        table = lab.root / "leaks.csv"
        _write(table, samples)
        plot(samples, lab.root / "leaks.png")
        lab.say(f"leaks: {table} and leaks.png beside it")
        found = place.audit()
        yield Trial(audit=found, note=verdict(samples))
        lab.clear(place, found)

    def _drop_all(self, place: Place, count: int) -> None:
        for number in range(count):
            place.drop(f"{number}.dcm" if number % 10 == 9 else f"{number}.png", picture(number))
            while number % 20 == 0 and sum(1 for _ in place.incoming.iterdir()) > _BACKLOG:
                time.sleep(0.1)


def _sample(pid: int, began_s: float, ended: int) -> Sample:
    family = [pid, *_children(pid)]
    own = _figures(pid)
    return Sample(
        at_s=round(time.monotonic() - began_s, 1),
        files=ended,
        descriptors=own[0],
        threads=own[1],
        rss_mb=own[2],
        children=len(family) - 1,
        children_rss_mb=round(sum(_figures(child)[2] for child in family[1:]), 1),
    )


def _children(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return children


def _figures(pid: int) -> tuple[int, int, float]:
    """Return descriptors, threads, and RSS in MiB; zeros for a process that has gone.

    Only root sees the descriptors, since the daemon is not dumpable: they are 0 for others.
    """
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        descriptors = 0
        with contextlib.suppress(PermissionError):
            descriptors = sum(1 for _ in (process / "fd").iterdir())
        rss_mb = round(int(status.get("VmRSS", "0 kB").split()[0]) / 1024, 1)
        return descriptors, int(status["Threads"]), rss_mb
    except OSError:
        return 0, 0, 0.0


def _write(table: Path, samples: list[Sample]) -> None:
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Sample.__dataclass_fields__)
        writer.writerows(
            [getattr(sample, name) for name in Sample.__dataclass_fields__] for sample in samples
        )

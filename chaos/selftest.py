"""The harness on trial: what it is there to find is done to it, and has to be found."""

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from chaos import shim
from chaos.disk import Disk, Forgotten
from chaos.fault import Lab
from chaos.faults.power import after_cut, loaded, record
from chaos.place import ChaosError, Place
from tests.support.waits import PATIENCE_S

# The worst case first, then what may have arrived besides, by chance.
_SEEDS = (None, *range(12))


def self_test(root: Path) -> int:
    """Return 0 if each mistake was found, and none where none was made."""
    obstacle = shim.obstacle()
    if obstacle:
        print(f"skipped: {obstacle}")
        return 0
    root.mkdir(parents=True, exist_ok=True)
    lab = Lab(root.resolve())
    source = loaded(lab)
    # Made before the run: they hold what was there at first.
    disks = {forgotten: Disk(source.root, forgotten) for forgotten in Forgotten}
    sound = Disk(source.root)
    calls = record(source)
    missed = 0
    for disk in (*disks.values(), sound):
        for call in calls:
            disk.apply(call)
    for forgotten, disk in disks.items():
        found = _first_loss(lab, source, disk)
        missed += found is None
        print(f"fsync forgotten of {forgotten}: {found or 'NOT FOUND'}", flush=True)
    found = _first_loss(lab, source, sound, _SEEDS[:3])
    print(f"nothing forgotten: {found or 'nothing found'}", flush=True)
    missed += _unseen(lab)
    return 1 if missed or found else 0


def _unseen(lab: Lab) -> int:
    """Do to finished homes what must never happen; return how much of it the audit missed."""
    missed = 0
    for what, done, kind in (
        ("a file removed behind the daemon", _remove, "lost"),
        ("a file copied behind the daemon", _copy, "duplicated"),
        ("a second arrival of one file", _arrive, "duplicated"),
    ):
        place = loaded(lab)
        place.start("--once").wait(PATIENCE_S)
        if not place.audit().is_clean:
            raise ChaosError(f"something was wrong before: {place.audit()}")
        done(place)
        found = getattr(place.audit(), kind)
        missed += len(found) != 1
        print(f"{what}: {f'{len(found)} {kind}' if found else 'NOT FOUND'}", flush=True)
    return missed


def _remove(place: Place) -> None:
    _finished(place).unlink()


def _copy(place: Place) -> None:
    file = _finished(place)
    shutil.copy(file, file.with_name(f"copy-{file.name}"))


def _arrive(place: Place) -> None:
    with closing(sqlite3.connect(place.database)) as connection, connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(arrival)")]
        names.remove("id")
        # The token is unique: the database itself refuses the same arrival twice.
        values = ", ".join("token || '2'" if name == "token" else name for name in names)
        connection.execute(
            f"INSERT INTO arrival ({', '.join(names)}) SELECT {values} FROM arrival LIMIT 1"
        )


def _finished(place: Place) -> Path:
    return next(path for path in sorted((place.root / "done").rglob("*")) if path.is_file())


def _first_loss(
    lab: Lab, source: Place, disk: Disk, seeds: Sequence[int | None] = _SEEDS
) -> str | None:
    """Cut the power after the run, in one way after the other, until something is wrong."""
    for number, seed in enumerate(seeds, start=1):
        place = lab.place()
        disk.cut(place.root, seed)
        try:
            audit = after_cut(source, place).audit
        except ChaosError as error:
            return f"found by cut {number}: {str(error).splitlines()[0][:60]}"
        if not audit.is_clean:
            return (
                f"found by cut {number}: {len(audit.lost)} lost, "
                f"{len(audit.duplicated)} duplicated, {len(audit.damaged)} damaged"
            )
        lab.clear(place, audit)
    return None

"""The harness on trial: what it is there to find is done to it, and has to be found."""

from collections.abc import Sequence
from pathlib import Path

from chaos import shim
from chaos.disk import Disk, Forgotten
from chaos.fault import Lab
from chaos.faults.power import after_cut, loaded, record
from chaos.place import ChaosError, Place

# The worst case first, then what may have arrived besides, by chance.
_SEEDS = (None, *range(12))


def self_test(root: Path) -> int:
    """Return 0 if every kind of forgotten fsync was found, and none where nothing is forgotten."""
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
    return 1 if missed or found else 0


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

"""Others fill the drop folder before one X-ray comes."""

import os
import time
from collections.abc import Iterator
from typing import ClassVar

from chaos.fault import Fault, Lab, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import dicom, png
from tests.support.record import sha256

_SPARSE_BYTES = 8 << 30


class Flood(Fault):
    """Many small files and a sparse one of gigabytes are there; an X-ray has to end before them."""

    name: ClassVar[str] = "flood of the drop folder"
    how: ClassVar[str] = (
        "small PNG files and a sparse file of 8 GiB of no kind, then one X-ray into the same "
        "folder, which has to end before half of them"
    )

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Flood, drop, wait for the X-ray, then for the rest."""
        for run in range(lab.times(2, 5)):
            place = lab.place()
            try:
                trial = self._trial(place, run * 100_000, 5000 if lab.is_long else 300)
            finally:
                place.kill()
            yield trial
            lab.clear(place, trial.audit)

    def _trial(self, place: Place, first: int, count: int) -> Trial:
        sparse = place.incoming / "sparse"
        sparse.write_bytes(b"no kind")
        os.truncate(sparse, _SPARSE_BYTES)
        for number in range(first, first + count):
            place.drop(f"{number}.png", png(number), plainly=True)
        place.start_ready()
        place.wait_for(place.ended, "no beginning")
        xray = dicom(first + count)
        dropped_s = time.monotonic()
        place.drop("xray.dcm", xray)
        place.wait_for(lambda: sha256(xray) in place.ended(), "the X-ray does not end")
        took_s, before = time.monotonic() - dropped_s, len(place.ended()) - 1
        if before > count // 2:
            raise ChaosError(f"{before} of {count} files of the flood ended before the X-ray")
        place.wait_for(lambda: "action=left_alone" in place.log(), "the sparse file is not named")
        sparse.unlink()
        place.settle()
        return Trial(audit=place.audit(), recovery_s=took_s, injected=count + 1)

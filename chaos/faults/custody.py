"""A dropper writes other bytes into files that it keeps open, after they were taken."""

import os
import re
import threading
import time
from pathlib import Path
from typing import ClassVar

from chaos.fault import RepeatedFault, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import picture
from tests.support.record import sha256

_FILES = 30
_POLL_S = 0.01
_CLAIMED = re.compile(r"action=claimed sha=([0-9a-f]{12})")


class SwappedBytes(RepeatedFault):
    """The content of every file changes as soon as its claim is in the log, and again."""

    name: ClassVar[str] = "swapped bytes"
    how: ClassVar[str] = (
        "the dropper keeps a descriptor of every file, and overwrites the inode through it from "
        "the moment that its claim is logged until its end"
    )

    def _trial(self, place: Place, run: int) -> Trial:
        """Drop some files and change each."""
        place.start_ready()
        kept: dict[str, int] = {}
        swapper = _Swapper(place, kept)
        try:
            for number in range(run * 1000, run * 1000 + _FILES):
                content = picture(number)
                part = place.incoming / f".{number}"
                part.write_bytes(content)
                kept[sha256(content)[:12]] = os.open(part, os.O_RDONLY)
                place.dropped[sha256(content)] = f"{number}.png"
                part.rename(place.incoming / f"{number}.png")
            place.settle()
        finally:
            swapper.stop()
            for descriptor in kept.values():
                os.close(descriptor)
        if not swapper.count:
            raise ChaosError("nothing was swapped")
        return Trial(audit=place.audit(), injected=swapper.count)


class _Swapper:
    """Overwrites what is claimed, on a thread of its own."""

    def __init__(self, place: Place, kept: dict[str, int]) -> None:
        self.count = 0
        self._place = place
        self._kept = kept
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            for found in _CLAIMED.finditer(self._place.log()):
                self._swap(found[1])
            time.sleep(_POLL_S)

    def _swap(self, digest: str) -> None:
        descriptor = self._kept.get(digest)
        if descriptor is None:
            return
        size_bytes = os.fstat(descriptor).st_size
        with Path(f"/proc/self/fd/{descriptor}").open("r+b", buffering=0) as file:
            file.write(os.urandom(size_bytes))
        self.count += 1

"""Faults of sending: the process is killed meanwhile, and one destination is slow or mute."""

import importlib.util
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Self

from chaos.fault import Fault, Lab, Trial
from chaos.place import ChaosError, Place
from tests.support.pictures import dicom

_POINTS = ("packed", "stored")
_FILES = 4
_OBJECTS = 2 * _FILES  # a Secondary Capture and a Structured Report of each
_SLOW_S = 30.0
_STATES = ("queued", "sending", "sent", "failed", "invalid")


class KillWhileSending(Fault):
    """Before the object is sent, and between the answer and the record of it."""

    name: ClassVar[str] = "killed while sending"
    how: ClassVar[str] = (
        "the process sends itself SIGKILL at the outbox's crash points, then at random while "
        "objects go out; a C-STORE SCP counts what it receives"
    )

    def obstacle(self) -> str | None:
        """Without the extra there is nothing to send, and nobody to receive."""
        if all(map(importlib.util.find_spec, ("pynetdicom", "highdicom"))):
            return None
        return "needs the extra 'pacs'"

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Kill at each point, and at random; start again; compare receipts and rows."""
        for repeat in range(lab.times(2, 10)):
            for point in (*_POINTS, ""):
                with _Archive() as archive:
                    yield self._trial(lab, archive, point, repeat)

    def _trial(self, lab: Lab, archive: "_Archive", point: str, repeat: int) -> Trial:
        place = lab.place(
            PACS_DESTINATIONS=f"CHAOS@127.0.0.1:{archive.port}",
            PACS_RETRY_S="0.2",
            PACS_RETRY_MAX_S="1",
        )
        for number in range(_FILES):
            place.drop(f"{number}.dcm", dicom(repeat * 100 + number))
        kills = self._kill(place, archive, point)
        started_s = time.monotonic()
        place.start()
        place.wait_for(lambda: _states(place) == {"sent": _OBJECTS}, "not all were sent")
        recovery_s = time.monotonic() - started_s
        place.settle()
        if len(archive.received) != _OBJECTS:
            raise ChaosError(f"{len(archive.received)} of {_OBJECTS} objects came")
        again = archive.received.total() - _OBJECTS
        trial = Trial(
            audit=place.audit(),
            recovery_s=recovery_s,
            injected=kills,
            note=f"up to {again} object(s) sent again under the same UID" if again else "",
        )
        lab.clear(place, trial.audit)
        return trial

    def _kill(self, place: Place, archive: "_Archive", point: str) -> int:
        if point:
            process = place.start(LUNGWATCH_CRASH_AT=point)
            if process.wait(120) != -signal.SIGKILL:
                raise ChaosError(f"{point}: not reached")
            return 1
        for least in (1, 4):
            place.start()
            place.wait_for(partial(archive.has, least), "nothing is sent")
            place.kill()
        return 2


class SlowDestination(Fault):
    """One destination never answers, one takes half a minute for each object, one is good."""

    name: ClassVar[str] = "slow destination"
    how: ClassVar[str] = (
        "results go to three destinations: one accepts connections and never answers, one takes "
        "30 s for each object, one is good; the good one has to get all its objects meanwhile, "
        "and a stop has to end in time"
    )

    def obstacle(self) -> str | None:
        """As for the other fault of sending."""
        return KillWhileSending().obstacle()

    def trials(self, lab: Lab) -> Iterator[Trial]:
        """Drop files, wait for the good destination's objects, stop the daemon."""
        for repeat in range(lab.times(2, 10)):
            with (
                socket.create_server(("127.0.0.1", 0)) as mute,
                _Archive(answer_s=_SLOW_S) as slow,
                _Archive() as good,
            ):
                ports = (mute.getsockname()[1], slow.port, good.port)
                yield self._trial(lab, ports, good, repeat)

    def _trial(self, lab: Lab, ports: tuple[int, ...], good: "_Archive", repeat: int) -> Trial:
        place = lab.place(
            PACS_DESTINATIONS=",".join(f"CHAOS@127.0.0.1:{port}" for port in ports),
            PACS_RETRY_S="0.2",
            PACS_RETRY_MAX_S="1",
        )
        place.start_ready()
        for number in range(_FILES):
            place.drop(f"{number}.dcm", dicom(repeat * 100 + number))
        place.wait_for(lambda: len(place.ended()) == _FILES, "the files have no end")
        ended_s = time.monotonic()
        place.wait_for(lambda: len(good.received) == _OBJECTS, "the good one is starved")
        recovery_s = time.monotonic() - ended_s
        if recovery_s > _SLOW_S:
            raise ChaosError(f"the good destination waited {recovery_s:.0f} s for the others")
        began_s = time.monotonic()
        place.stop()
        stop_s = time.monotonic() - began_s
        if stop_s > _SLOW_S:
            raise ChaosError(f"the stop took {stop_s:.0f} s")
        trial = Trial(
            audit=place.audit(),
            recovery_s=recovery_s,
            injected=2,
            note="the good destination has all while the others answer nothing",
        )
        lab.clear(place, trial.audit)
        return trial


class _Archive:
    """A C-STORE SCP that takes everything; inside the ``with`` it listens.

    Parameters
    ----------
    answer_s
        Seconds that it takes for each object.

    Attributes
    ----------
    received
        How often each SOP Instance UID came.
    """

    def __init__(self, answer_s: float = 0.0) -> None:
        self._answer_s = answer_s
        self._ended = threading.Event()
        self.received: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        from pynetdicom import AE, AllStoragePresentationContexts, evt  # noqa: PLC0415

        entity = AE(ae_title="CHAOS")
        entity.supported_contexts = AllStoragePresentationContexts
        entity.maximum_associations = 20
        server: Any = entity.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._take)]
        )
        self._server = server
        self.port: int = server.server_address[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()

    def has(self, least: int) -> bool:
        """Return whether so many objects have come."""
        return self.received.total() >= least

    def _take(self, event: Any) -> int:  # noqa: ANN401 - pynetdicom's Event
        self._ended.wait(self._answer_s)
        with self._lock:
            self.received[str(event.request.AffectedSOPInstanceUID)] += 1
        return 0x0000


def _states(place: Place) -> Counter[str]:
    chosen = [word for state in _STATES for word in ("--state", state)]
    said = place.command("pacs", "queue", "--json", *chosen)
    return Counter(row["state"] for row in json.loads(said.stdout or "[]"))

"""Health report of the running daemon, as /health answers it; no patient data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from lungwatch.daemon.bounded import Bounded
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.home import Home
from lungwatch.daemon.outage import OutageKind
from lungwatch.db.monitoring import Signs
from lungwatch.errors import LungwatchError

_LONG_WAIT_S = 900.0
_LONG_UNSENT_S = 3600.0
_OUTAGES = {
    OutageKind.SPACE: "the disk is full",
    OutageKind.READ_ONLY: "the file system is read-only",
    OutageKind.DATABASE: "the database cannot be written",
    OutageKind.DROP_FOLDER: "the drop folder is away",
}


class Phase(StrEnum):
    """Where the service is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Status(StrEnum):
    """One word for all reasons together."""

    OK = "ok"
    DEGRADED = "degraded"
    """It works, and somebody should look."""
    FAILING = "failing"
    """New files are not being screened."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why the status is not ok.

    Attributes
    ----------
    code
        Does not change between versions.
    """

    code: str
    text: str
    status: Status


@dataclass(frozen=True, kw_only=True)
class Health:
    """What is known at one time.

    Attributes
    ----------
    model
        Name and version.
    uptime_s
        Since the service began to start.
    database
        Whether it can be written, told within a few seconds.
    disk_free_mb
        Of the home, in MiB; None if the home does not answer.
    min_free_mb
        The watermark, in MiB: nothing is claimed below.
    waiting
        Files in the drop folder, and those in quarantine to be tried again.
    oldest_waiting_s
        Since the oldest of them came; None if none waits.
    queues
        Queue depth of each stage.
    in_hand
        Files between claim and end.
    left_alone
        Files in the drop folder that cannot be taken.
    skipped
        Files and folders there that are skipped for their names, by pattern.
    outbox_waiting, outbox_oldest_s
        Objects to be sent, and the age of the oldest; None if not known or none waits.
    outages
        What is being waited out.
    stuck
        Stages without progress, with the seconds.
    """

    status: Status
    reasons: tuple[Reason, ...]
    phase: Phase
    model: str
    uptime_s: float
    database: bool
    disk_free_mb: int | None
    min_free_mb: int
    waiting: int
    oldest_waiting_s: float | None
    queues: dict[str, int]
    in_hand: int
    left_alone: int
    skipped: dict[str, int]
    outbox_waiting: int | None
    outbox_oldest_s: float | None
    outages: tuple[str, ...]
    stuck: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Whom to ask; each answers at once, but for the two that are bounded.

    Attributes
    ----------
    signs
        Of the database; raises LungwatchError or TimeoutError.
    free_mb
        Of the home; raises OSError if the home, or the drop folder in it, is away.
    oldest_waiting
        Seconds since the epoch; None if nothing waits.
    """

    phase: Callable[[], Phase]
    signs: Bounded[Signs]
    free_mb: Bounded[int]
    waiting: Callable[[], int]
    oldest_waiting: Callable[[], float | None]
    left_alone: Callable[[], int]
    skipped: Callable[[], Mapping[str, int]]
    in_hand: Callable[[], int]
    queues: Callable[[], dict[str, int]]
    outages: Callable[[], frozenset[OutageKind]]
    stuck: Callable[[], dict[str, float]]


class HealthCheck:
    """Asks the probes and judges what they say. For all threads."""

    def __init__(self, probes: Probes, *, model: str, min_free_mb: int, clock: Clock) -> None:
        self._probes = probes
        self._model = model
        self._min_free_mb = min_free_mb
        self._clock = clock
        self._started_s = clock.monotonic()

    @property
    def phase(self) -> Phase:
        """Where the service is in its life."""
        return self._probes.phase()

    def examine(self) -> Health:
        """Return how it is now; takes a few seconds at most."""
        probes, now = self._probes, self._clock.now()
        signs = self._signs()
        free_mb = self._free_mb()
        oldest_s = self.oldest_waiting_s(signs)
        outages = probes.outages()
        stuck = probes.stuck()
        unsent_s = _age_s(now, signs.oldest_delivery) if signs else None
        phase = probes.phase()
        left_alone = probes.left_alone()
        reasons = [
            *_of_phase(phase),
            *(_failing(f"outage_{kind}", _OUTAGES[kind]) for kind in sorted(outages)),
            *(
                _failing("stuck", f"stage {stage} shows no progress for {seconds:.0f} s")
                for stage, seconds in stuck.items()
            ),
            *self._of_space(free_mb),
        ]
        if signs is None:
            reasons.append(_failing("database", "the database does not answer"))
        if oldest_s is not None and oldest_s > _LONG_WAIT_S:
            reasons.append(_degraded("waiting_long", f"a file waits for {oldest_s:.0f} s"))
        if left_alone:
            reasons.append(_degraded("left_alone", f"{left_alone} files cannot be taken"))
        if unsent_s is not None and unsent_s > _LONG_UNSENT_S:
            reasons.append(_degraded("outbox_old", f"an object is unsent for {unsent_s:.0f} s"))
        if signs is not None and signs.outbox_ended:
            text = f"{signs.outbox_ended} objects were refused or invalid"
            reasons.append(_degraded("outbox_ended", text))
        return Health(
            status=_worst(reasons),
            reasons=tuple(reasons),
            phase=phase,
            model=self._model,
            uptime_s=round(self._clock.monotonic() - self._started_s, 1),
            database=signs is not None,
            disk_free_mb=free_mb,
            min_free_mb=self._min_free_mb,
            waiting=probes.waiting(),
            oldest_waiting_s=oldest_s,
            queues=probes.queues(),
            in_hand=probes.in_hand(),
            left_alone=left_alone,
            skipped=dict(probes.skipped()),
            outbox_waiting=signs.outbox_waiting if signs else None,
            outbox_oldest_s=unsent_s,
            outages=tuple(sorted(outages)),
            stuck=stuck,
        )

    def oldest_waiting_s(self, signs: Signs | None) -> float | None:
        """Return since when the oldest file waits, in the drop folder or to be tried again."""
        now = self._clock.now()
        ages = [_age_s(now, signs.oldest_queued)] if signs else []
        dropped_at = self._probes.oldest_waiting()
        if dropped_at is not None:
            ages.append(_age_s(now, datetime.fromtimestamp(dropped_at, UTC)))
        return max((age for age in ages if age is not None), default=None)

    def _signs(self) -> Signs | None:
        try:
            return self._probes.signs()
        except (LungwatchError, TimeoutError):
            return None

    def _free_mb(self) -> int | None:
        try:
            return self._probes.free_mb()
        except OSError:  # TimeoutError is one
            return None

    def _of_space(self, free_mb: int | None) -> list[Reason]:
        if free_mb is None:
            return [_failing("folders", "the home or its drop folder does not answer")]
        if free_mb < self._min_free_mb:
            text = f"{free_mb} MiB free, less than min_free_mb = {self._min_free_mb}"
            return [_failing("disk", text)]
        return []


def free_mb_of(home: Home) -> int:
    """Return the free space in MiB.

    Raises
    ------
    OSError
        If the home or its drop folder is away.
    """
    home.incoming.stat()
    return home.free_mb()


def _of_phase(phase: Phase) -> list[Reason]:
    return [] if phase is Phase.READY else [_failing(phase.value, f"the service is {phase.value}")]


def _failing(code: str, text: str) -> Reason:
    return Reason(code=code, text=text, status=Status.FAILING)


def _degraded(code: str, text: str) -> Reason:
    return Reason(code=code, text=text, status=Status.DEGRADED)


def _worst(reasons: list[Reason]) -> Status:
    found = {reason.status for reason in reasons}
    if Status.FAILING in found:
        return Status.FAILING
    return Status.DEGRADED if found else Status.OK


def _age_s(now: datetime, since: datetime | None) -> float | None:
    # A clock that was set back makes nothing younger than new.
    return None if since is None else round(max(0.0, (now - since).total_seconds()), 1)

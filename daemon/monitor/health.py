"""Checks and health: one list, from which the start, `/health`, `/ready` and doctor derive."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from lungwatch.daemon import doctor
from lungwatch.daemon.config import Config
from lungwatch.daemon.doctor import CheckOutcome, Installation, space_problem
from lungwatch.daemon.home import Home
from lungwatch.daemon.retry import Clock, OutageKind, TimeLimited
from lungwatch.db.statistics import HealthCounts
from lungwatch.errors import LungwatchError, describe_unexpected

_LONG_WAIT_S = 900.0
_LONG_UNSENT_S = 3600.0
_OUTAGES = {
    OutageKind.SPACE: "the disk is full",
    OutageKind.READ_ONLY: "the file system is read-only",
    OutageKind.DATABASE: "the database cannot be written",
    OutageKind.DATABASE_REPLACED: "the database was removed, replaced or truncated: put the right "
    "one back, or stop the daemon and run `lungwatch backup restore`",
    OutageKind.DROP_FOLDER: "the drop folder is away",
}


class Phase(StrEnum):
    """Phase of the service's life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class HealthStatus(StrEnum):
    """Summary of all reasons."""

    OK = "ok"
    DEGRADED = "degraded"
    """It works, and somebody should look."""
    FAILING = "failing"
    """New files are not being screened."""


@dataclass(frozen=True, kw_only=True)
class HealthReason:
    """Why the status is not ok.

    Attributes
    ----------
    code
        Does not change between versions.
    """

    code: str
    text: str
    status: HealthStatus


@dataclass(frozen=True, kw_only=True)
class Health:
    """State of the running daemon at one time, as `/health` answers it.

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
    lanes
        Of each lane, the files that wait and those in hand.
    left_alone
        Files in the drop folder that cannot be taken.
    skipped
        Files and folders there that are skipped for their names, by pattern.
    outbox_waiting, outbox_oldest_s, outbox_ended
        Objects to be sent, the age of the oldest, and objects that were refused or invalid; None
        if not known or none waits.
    destinations
        What each destination is owed: objects to be sent, by name.
    not_committed
        Sent objects whose storage commitment has failed; None if not known.
    outages
        What is being waited out.
    stuck
        Stages without progress, with the seconds.
    clock
        Why the system clock is not trusted, by reason code.
    retention_stopped
        Reason code of the last run of retention, if it was stopped.
    """

    status: HealthStatus = HealthStatus.OK
    reasons: tuple[HealthReason, ...] = ()
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
    outbox_ended: int | None
    destinations: dict[str, "DestinationHealth"] = field(default_factory=dict)
    not_committed: int | None = None
    outages: tuple[str, ...]
    stuck: dict[str, float]
    lanes: dict[str, dict[str, int]] = field(default_factory=dict)
    clock: dict[str, str] = field(default_factory=dict)
    retention_stopped: str | None = None


@dataclass(frozen=True, kw_only=True)
class DestinationHealth:
    """Objects that one destination is owed, and the age of the oldest in seconds."""

    waiting: int
    oldest_s: float | None


def _observe_folders(seen: Health) -> Iterator[CheckOutcome]:
    if seen.disk_free_mb is None:
        detail = "the home or its drop folder does not answer"
        yield CheckOutcome(name="folders", ok=False, detail=detail)


def _observe_space(seen: Health) -> Iterator[CheckOutcome]:
    if seen.disk_free_mb is not None and (
        problem := space_problem(seen.disk_free_mb, seen.min_free_mb)
    ):
        yield CheckOutcome(name="disk", ok=False, detail=problem)


def _observe_database(seen: Health) -> Iterator[CheckOutcome]:
    if not seen.database:
        yield CheckOutcome(name="database", ok=False, detail="the database does not answer")


def observe_phase(phase: Phase) -> Iterator[CheckOutcome]:
    """Return the problem of a service that is not ready; `/ready` asks this alone."""
    if phase is not Phase.READY:
        yield CheckOutcome(name=phase.value, ok=False, detail=f"the service is {phase}")


def _observe_outages(seen: Health) -> Iterator[CheckOutcome]:
    for kind in seen.outages:
        yield CheckOutcome(name=f"outage_{kind}", ok=False, detail=_OUTAGES[OutageKind(kind)])


def _observe_stages(seen: Health) -> Iterator[CheckOutcome]:
    for stage, seconds in seen.stuck.items():
        detail = f"stage {stage} shows no progress for {seconds:.0f} s"
        yield CheckOutcome(name="stuck", ok=False, detail=detail)


def _observe_waiting(seen: Health) -> Iterator[CheckOutcome]:
    if seen.oldest_waiting_s is not None and seen.oldest_waiting_s > _LONG_WAIT_S:
        detail = f"a file waits for {seen.oldest_waiting_s:.0f} s"
        yield CheckOutcome(name="waiting_long", ok=None, detail=detail)
    if seen.left_alone:
        detail = f"{seen.left_alone} files cannot be taken"
        yield CheckOutcome(name="left_alone", ok=None, detail=detail)


def _observe_outbox(seen: Health) -> Iterator[CheckOutcome]:
    if seen.outbox_oldest_s is not None and seen.outbox_oldest_s > _LONG_UNSENT_S:
        behind = [
            name
            for name, owed in sorted(seen.destinations.items())
            if owed.oldest_s is not None and owed.oldest_s > _LONG_UNSENT_S
        ]
        whose = f" for {', '.join(behind)}" if behind else ""
        detail = f"an object{whose} is unsent for {seen.outbox_oldest_s:.0f} s"
        yield CheckOutcome(name="outbox_old", ok=None, detail=detail)
    if seen.outbox_ended:
        detail = f"{seen.outbox_ended} objects were refused or invalid"
        yield CheckOutcome(name="outbox_ended", ok=None, detail=detail)
    if seen.not_committed:
        detail = f"{seen.not_committed} objects are not committed by their destination"
        yield CheckOutcome(name="not_committed", ok=None, detail=detail)


def _observe_retention(seen: Health) -> Iterator[CheckOutcome]:
    for problem, detail in seen.clock.items():
        hint = f"{detail}: set the clock, or run `lungwatch retention run --clock-is-right`"
        yield CheckOutcome(name=problem, ok=None, detail=hint)
    if seen.retention_stopped:
        detail = f"the last run was stopped ({seen.retention_stopped}): `lungwatch retention run`"
        yield CheckOutcome(name="retention_stopped", ok=None, detail=detail)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes
    ----------
    inspect
        How `lungwatch doctor` answers the question: outcomes, or the detail of a good one; a
        `LungwatchError` is a failure.
    observe
        How `/health` answers it: an outcome for each problem, none if all is well.
    at_start
        Whether the service inspects it before it starts, and a failure stops the start.
    """

    name: str
    question: str
    inspect: Callable[[Installation], str | Iterator[CheckOutcome]] | None = None
    observe: Callable[[Health], Iterator[CheckOutcome]] | None = None
    at_start: bool = False


CHECKS = (
    Check(
        "folders",
        "Are the home's folders there, writable, and on one file system?",
        doctor.inspect_folders,
        _observe_folders,
        at_start=True,
    ),
    Check("access", "May others read what is in the home?", doctor.inspect_access),
    Check(
        "space",
        "Is as much disk space free as min_free_mb asks for?",
        doctor.inspect_space,
        _observe_space,
        at_start=True,
    ),
    Check(
        "sandbox",
        "What holds a decoding process that a file has taken over?",
        doctor.inspect_sandbox,
        at_start=True,
    ),
    Check("watching", "How is the drop folder watched?", doctor.inspect_watching),
    Check(
        "database",
        "Is the database intact and up to date, and does it answer?",
        doctor.inspect_database,
        _observe_database,
    ),
    Check("trusted keys", "Whose model bundles are run?", doctor.inspect_trusted_keys),
    Check("model", "Is the model unaltered, and does it run as it should?", doctor.inspect_model),
    Check("content gate", "What does the content gate check?", doctor.inspect_gate),
    Check("calibration", "Which threshold decides?", doctor.inspect_calibration),
    Check("clock", "Do this machine and the file system agree?", doctor.inspect_clock),
    Check("synthetic X-ray", "Does an image go through the daemon?", doctor.inspect_trial),
    Check("drift", "Are the newest results like the reference?", doctor.inspect_drift),
    Check(
        "daemon",
        "Is the daemon running, and ready?",
        doctor.inspect_daemon,
        lambda seen: observe_phase(seen.phase),
    ),
    Check("outages", "Is a disk, a folder or the database away?", observe=_observe_outages),
    Check("retention", "Does retention remove what it has to?", observe=_observe_retention),
    Check("stages", "Does every stage make progress?", observe=_observe_stages),
    Check("health", "What does /health answer?", doctor.inspect_health),
    Check(
        "waiting",
        "How many files wait, for how long, and can all be taken?",
        doctor.inspect_waiting,
        _observe_waiting,
    ),
    Check(
        "last result",
        "When was the last result, and what is left to do?",
        doctor.inspect_results,
        _observe_outbox,
    ),
    Check("PACS", "Does every destination answer?", doctor.inspect_destinations),
    Check("extras", "Which extras are installed?", doctor.inspect_extras),
)


def check_start(config: Config) -> None:
    """Prepare the home, and run the checks of the start.

    Raises
    ------
    LungwatchError
        For the first that fails.
    """
    Home(config.home).prepare()
    for check in CHECKS:
        if check.at_start and check.inspect is not None:
            check.inspect(Installation(config))


def run_checks(
    config: Config,
    names: tuple[str, ...] = (),
    *,
    process: Callable[[Config], object] | None = None,
) -> Iterator[CheckOutcome]:
    """Run the checks of `lungwatch doctor`, or those named; none that fails ends the others.

    Parameters
    ----------
    process
        See `Installation`.
    """
    installation = Installation(config, process)
    for check in CHECKS:
        if check.inspect is None or (names and check.name not in names):
            continue
        try:
            found = check.inspect(installation)
            if isinstance(found, str):
                yield CheckOutcome(name=check.name, ok=True, detail=found)
            else:
                yield from found
        except LungwatchError as error:
            yield CheckOutcome(name=check.name, ok=False, detail=str(error))
        # Doctor reports whatever is wrong; it must not be what fails.
        except Exception as error:
            yield CheckOutcome(name=check.name, ok=False, detail=describe_unexpected(error))


def judge(state: Health) -> Health:
    """Return a state with its reasons and its status, by the checks of the running daemon."""
    problems = [p for check in CHECKS if check.observe is not None for p in check.observe(state)]
    reasons = tuple(
        HealthReason(
            code=problem.name,
            text=problem.detail,
            status=HealthStatus.FAILING if problem.ok is False else HealthStatus.DEGRADED,
        )
        for problem in problems
    )
    status = HealthStatus.DEGRADED if reasons else HealthStatus.OK
    if any(reason.status is HealthStatus.FAILING for reason in reasons):
        status = HealthStatus.FAILING
    return replace(state, status=status, reasons=reasons)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Callables that tell the state of the daemon, each at once but for the two with a limit.

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
    signs: TimeLimited[HealthCounts]
    free_mb: TimeLimited[int]
    waiting: Callable[[], int]
    oldest_waiting: Callable[[], float | None]
    left_alone: Callable[[], int]
    skipped: Callable[[], Mapping[str, int]]
    in_hand: Callable[[], int]
    queues: Callable[[], dict[str, int]]
    outages: Callable[[], frozenset[OutageKind]]
    stuck: Callable[[], dict[str, float]]
    lanes: Callable[[], dict[str, dict[str, int]]] = dict
    clock: Callable[[], dict[str, str]] = dict


class HealthCheck:
    """Asks the probes, and judges their answers by the list of checks. For all threads."""

    def __init__(self, probes: Probes, *, model: str, min_free_mb: int, clock: Clock) -> None:
        self._probes = probes
        self._model = model
        self._min_free_mb = min_free_mb
        self._clock = clock
        self._started_s = clock.monotonic()

    @property
    def phase(self) -> Phase:
        """Phase of the service's life."""
        return self._probes.phase()

    def examine(self) -> Health:
        """Return how it is now; takes a few seconds at most."""
        probes, now = self._probes, self._clock.now()
        counts, free_mb = self._counts(), self._free_mb()
        return judge(
            Health(
                phase=probes.phase(),
                model=self._model,
                uptime_s=round(self._clock.monotonic() - self._started_s, 1),
                database=counts is not None,
                disk_free_mb=free_mb,
                min_free_mb=self._min_free_mb,
                waiting=probes.waiting(),
                oldest_waiting_s=self._oldest_waiting_s(counts),
                queues=probes.queues(),
                in_hand=probes.in_hand(),
                left_alone=probes.left_alone(),
                skipped=dict(probes.skipped()),
                outbox_waiting=counts.outbox_waiting if counts else None,
                outbox_oldest_s=_age_s(now, counts.oldest_delivery) if counts else None,
                outbox_ended=counts.outbox_ended if counts else None,
                not_committed=counts.not_committed if counts else None,
                destinations={
                    name: DestinationHealth(waiting=owed.waiting, oldest_s=_age_s(now, owed.oldest))
                    for name, owed in sorted(counts.destinations.items())
                }
                if counts
                else {},
                outages=tuple(sorted(probes.outages())),
                stuck=probes.stuck(),
                lanes=probes.lanes(),
                clock=probes.clock(),
                retention_stopped=counts.retention_stopped if counts else None,
            )
        )

    def _oldest_waiting_s(self, counts: HealthCounts | None) -> float | None:
        """Return since when the oldest file waits, in the drop folder or to be tried again."""
        now = self._clock.now()
        ages = [_age_s(now, counts.oldest_queued)] if counts else []
        dropped_at = self._probes.oldest_waiting()
        if dropped_at is not None:
            ages.append(_age_s(now, datetime.fromtimestamp(dropped_at, UTC)))
        return max((age for age in ages if age is not None), default=None)

    def _counts(self) -> HealthCounts | None:
        try:
            return self._probes.signs()
        except (LungwatchError, TimeoutError):
            return None

    def _free_mb(self) -> int | None:
        try:
            return self._probes.free_mb()
        except OSError:  # TimeoutError is one
            return None


def free_mb_of(home: Home) -> int:
    """Return the free space in MiB.

    Raises
    ------
    OSError
        If the home or its drop folder is away.
    """
    home.incoming.stat()
    return home.free_mb()


def _age_s(now: datetime, since: datetime | None) -> float | None:
    # A clock that was set back makes nothing younger than new.
    return None if since is None else round(max(0.0, (now - since).total_seconds()), 1)

"""Last pipeline stage: overlay, database row and the file's final place."""

from lungwatch.atomicfile import make_dirs, write_atomic
from lungwatch.contract import ModelContract
from lungwatch.daemon.clock import Clock
from lungwatch.daemon.crashpoint import crashpoint
from lungwatch.daemon.drawing import draw_result
from lungwatch.daemon.filing import Filing
from lungwatch.daemon.home import Home
from lungwatch.daemon.judging import judge
from lungwatch.daemon.logs import event
from lungwatch.daemon.overlay import encode_png
from lungwatch.daemon.records import Classified, Recorded
from lungwatch.daemon.writer import Writer
from lungwatch.db.store import Store


class Finisher:
    """Writes overlay, row and file place, in the order that a crash can be taken up from.

    Parameters
    ----------
    contract
        With the probability and the decision that are in force.
    calibration
        The site calibration that they come from; None for the bundle's own.
    """

    def __init__(
        self,
        *,
        home: Home,
        store: Store,
        writer: Writer,
        filing: Filing,
        clock: Clock,
        contract: ModelContract,
        calibration: str | None = None,
        side_by_side: bool = True,
    ) -> None:
        self._home = home
        self._store = store
        self._writer = writer
        self._filing = filing
        self._clock = clock
        self._contract = contract
        self._calibration = calibration
        self._side_by_side = side_by_side

    def record(self, classified: Classified) -> Recorded:
        """Write the overlay and the row; repeatable until the row is written.

        Raises
        ------
        OSError
            If the overlay cannot be written.
        """
        claim, scores = classified.prepared.claim, classified.scores
        decision = self._contract.decision
        judged = judge(classified, self._contract)
        overlay = self._home.overlay_path(claim.sha256, claim.received_at, self._contract.id)
        make_dirs(overlay.parent)
        picture = draw_result(classified, judged, self._contract, side_by_side=self._side_by_side)
        write_atomic(overlay, encode_png(picture))
        crashpoint("overlaid")

        duration_ms = round((self._clock.monotonic() - claim.started_s) * 1000)
        now = self._clock.now()
        self._writer.call(
            lambda: self._store.record(
                result_id=claim.result_id,
                meta=classified.prepared.meta,
                label=scores.label,
                probability=scores.probability,
                logit=scores.logit,
                threshold=decision.threshold,
                uncertain=(decision.uncertain_low, decision.uncertain_high),
                calibration=self._calibration,
                plausibility=judged.plausibility,
                flags=judged.flags,
                overlay=self._home.relative(overlay),
                duration_ms=duration_ms,
                now=now,
            )
        )
        crashpoint("recorded")
        return Recorded(
            claim=claim,
            label=scores.label,
            probability=scores.probability,
            duration_ms=duration_ms,
        )

    def file(self, recorded: Recorded) -> None:
        """Move a recorded file to its place and say so; repeatable until it is moved.

        Raises
        ------
        OSError
            If the file cannot be moved.
        """
        claim = recorded.claim
        self._filing.file(
            result_id=claim.result_id,
            sha256=claim.sha256,
            received_at=claim.received_at,
            path=claim.path,
        )
        event(
            "filed",
            claim.sha256,
            label=recorded.label,
            probability=recorded.probability,
            duration_ms=recorded.duration_ms,
        )

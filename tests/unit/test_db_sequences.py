"""Whatever happens in whatever order, drops are counted once and every file keeps an end."""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)
from hypothesis.strategies import sampled_from
from sqlalchemy import func, select

from lungwatch.attributes import RadiographMeta
from lungwatch.db.claims import Claim, ClaimKind
from lungwatch.db.engine import reading
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import RESULT_TRANSITIONS, Arrival, Result, State
from lungwatch.db.queries import iter_all, queued
from lungwatch.db.results import Store
from tests.support.rows import drop, record

CONTENTS = ("a" * 64, "b" * 64)
MAX_ATTEMPTS = 2
META = RadiographMeta(format="PNG", rows=1, columns=1, bits_stored=8, photometric="MONOCHROME2")


class DropFolder(RuleBasedStateMachine):
    """A daemon in miniature: a dict is the home, and it may crash between any two steps.

    `runs` holds claims that are being processed; a crash forgets them all, and what is in
    `work/` is claimed again under the token in its path.
    """

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        # In memory where that is to be had: hundreds of databases would wait for the disk.
        memory = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.engine = open_database(f"sqlite:///{Path(self.folder.name) / 'lungwatch.db'}")
        self.store = Store(self.engine)
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.models = [
            self.store.register_model(
                name=name, version="1", sha256=name * 64, contract_json="{}", now=self.now
            )
            for name in "12"
        ]
        self.model_id = self.models[0]
        self.files: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.generation = 0
        self.states: dict[int, State] = {}

    def teardown(self) -> None:
        self.crash()
        for path in [path for path in self.files if path.startswith("work/")]:
            while path in self.files:
                self._act(self._claim(path), path, finish=True)
        rows = list(iter_all(self.engine))
        assert {row.state for row in rows} <= {
            State.DONE,
            State.REJECTED,
            State.FAILED,
            State.QUEUED,
        }
        for row in rows:
            assert row.path is not None
            assert self.files[row.path] == row.sha256
        self.engine.dispose()
        self.folder.cleanup()

    def _claim(self, path: str) -> Claim:
        self.now += timedelta(seconds=1)
        token = path.split("/")[1]
        return self.store.claim(
            drop(
                token=token,
                sha256=self.files[path],
                source_name="x",
                path=path,
                model_id=self.model_id,
                max_attempts=MAX_ATTEMPTS,
                now=self.now,
                exists=self.files.__contains__,
                arrival=not token.startswith("retry"),
            )
        )

    def _move(self, source: str, folder: str) -> str:
        target = f"{folder}/{self.files[source]}"
        self.files[target] = self.files.pop(source)
        return target

    def _act(self, claim: Claim, path: str, *, finish: bool = False):
        """Do what the claim says; return what is to be processed."""
        match claim.kind:
            case ClaimKind.RUN:
                # Another copy in work/ is claimed in its turn.
                if claim.file_path and not claim.file_path.startswith("work/"):
                    self.files.pop(claim.file_path, None)
                if not finish:
                    return (self.generation, claim, path)
                self._record(claim)
                self._file(claim, path)
            case ClaimKind.FILE:
                self._file(claim, path)
            case ClaimKind.DUPLICATE:
                del self.files[path]
            case ClaimKind.REFILE | ClaimKind.GIVE_UP:
                folder = "done" if claim.state is State.DONE else "quarantine"
                target = self._move(path, folder)
                self.store.set_path(image_id=claim.image_id, path=target)
        return multiple()

    def _record(self, claim: Claim) -> None:
        record(
            self.store,
            claim.result_id,
            meta=META,
            label="NEGATIVE",
            probability=0.1,
            logit=-2.0,
            overlay="o.png",
            now=self.now,
        )

    def _file(self, claim: Claim, path: str) -> None:
        target = self._move(path, "done")
        self.store.finish(result_id=claim.result_id, path=target, now=self.now)

    def _arrive(self, sha256: str) -> str:
        token = f"drop{len(self.tokens)}"
        self.tokens.add(token)
        path = f"work/{token}/x"
        self.files[path] = sha256
        return path

    @rule(target=runs, sha256=sampled_from(CONTENTS))
    def drop(self, sha256: str):
        path = self._arrive(sha256)
        return self._act(self._claim(path), path)

    @rule(sha256=sampled_from(CONTENTS))
    def drop_and_crash(self, sha256: str) -> None:
        self._claim(self._arrive(sha256))
        self.crash()

    @rule()
    def crash(self) -> None:
        self.generation += 1

    @rule(target=runs)
    def resume(self):
        """After a start, everything in work/ is claimed again."""
        self.crash()
        started = []
        for path in [path for path in self.files if path.startswith("work/")]:
            run = self._act(self._claim(path), path)
            if isinstance(run, tuple) and run:
                started.append(run)
        return multiple(*started)

    @rule(run=consumes(runs), crash_before_filing=sampled_from([False, True]))
    def score(self, run, crash_before_filing: bool) -> None:
        generation, claim, path = run
        if generation != self.generation:
            return
        self._record(claim)
        if crash_before_filing:
            self.crash()
        else:
            self._file(claim, path)

    @rule(
        run=consumes(runs),
        rejected=sampled_from([False, True]),
        crash_before_move=sampled_from([False, True]),
    )
    def refuse(self, run, rejected: bool, crash_before_move: bool) -> None:
        generation, claim, path = run
        if generation != self.generation:
            return
        self.store.end(
            State.REJECTED if rejected else State.FAILED,
            result_id=claim.result_id,
            reason="unreadable",
            message="m",
            meta=None,
            duration_ms=1,
            now=self.now,
        )
        if crash_before_move:
            self.crash()
            return
        target = self._move(path, "quarantine")
        self.store.set_path(image_id=claim.image_id, path=target)

    @rule()
    def ask_for_retries(self) -> None:
        for row in iter_all(self.engine):
            in_quarantine = row.path is not None and row.path.startswith("quarantine/")
            if row.state in (State.FAILED, State.REJECTED) and in_quarantine:
                self.store.request_retry(result_id=row.result_id, now=self.now)

    @rule(target=runs)
    def take_up_retries(self):
        started = []
        for row in queued(self.engine, 10, self.model_id):
            if row.path not in self.files or row.path.startswith("work/"):
                continue
            path = f"work/retry-{len(self.tokens)}-{self.now.timestamp()}/x"
            self.files[path] = self.files.pop(row.path)
            run = self._act(self._claim(path), path)
            if isinstance(run, tuple) and run:
                started.append(run)
        return multiple(*started)

    @rule()
    def change_model(self) -> None:
        self.crash()
        self.model_id = next(one for one in self.models if one != self.model_id)

    @invariant()
    def every_drop_is_counted_once(self) -> None:
        with reading(self.engine) as connection:
            found = connection.scalars(select(Arrival.token)).all()
        assert sorted(found) == sorted(self.tokens)

    @invariant()
    def one_result_for_each_content_and_model(self) -> None:
        rows = list(iter_all(self.engine))
        assert len({(row.sha256, row.model_id) for row in rows}) == len(rows)

    @invariant()
    def attempts_are_bounded(self) -> None:
        with reading(self.engine) as connection:
            assert (connection.scalar(select(func.max(Result.attempts))) or 0) <= MAX_ATTEMPTS

    @invariant()
    def nothing_that_was_dropped_is_lost(self) -> None:
        kept = set(self.files.values())
        assert {row.sha256 for row in iter_all(self.engine)} <= kept

    @invariant()
    def states_follow_the_table(self) -> None:
        """Each rule makes a few steps; every one of them leads along the table."""
        rows = {row.result_id: row.state for row in iter_all(self.engine)}
        for result_id, state in rows.items():
            before = self.states.get(result_id)
            assert before is None or state is before or state in _reachable(before)
        self.states = rows


def _reachable(state: State) -> set[State]:
    found: set[State] = set()
    waiting = [state]
    while waiting:
        for target in RESULT_TRANSITIONS[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


TestDropFolder = DropFolder.TestCase
TestDropFolder.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

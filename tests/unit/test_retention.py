"""Retention: what is finished with goes by age and by space; nothing else ever does."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

from lungwatch.daemon.config import Config
from lungwatch.daemon.home import Home
from lungwatch.daemon.reconcile import Reconciler
from lungwatch.daemon.retention import Retention, RetentionStopped
from lungwatch.daemon.timekeeping import ClockWatch, doubt_of
from lungwatch.db.engine import reading, writing
from lungwatch.db.maintenance import open_database
from lungwatch.db.models import (
    UNFINISHED,
    CommitmentState,
    Delivery,
    DeliveryState,
    Image,
    Model,
    Result,
    State,
)
from lungwatch.db.queries import get_result
from lungwatch.db.removals import Reading, last_reading
from lungwatch.db.statistics import health_counts

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
PAGE = 4096
"""What a file takes at least."""


class Place:
    """A home with rows and files of any kind."""

    def __init__(self, root: Path):
        self.home = Home(root / "home")
        self.home.prepare()
        self.engine = open_database(f"sqlite:///{self.home.root / 'lungwatch.db'}")
        with writing(self.engine) as connection:
            connection.execute(
                insert(Model).values(
                    id=1, name="m", version="1", sha256="m", contract="{}", first_used_at=NOW
                )
            )
        self.number = 0

    def add(self, state=State.DONE, age_days=10, size=1000, delivery=None, commitment=None):
        self.number += 1
        number = self.number
        content = bytes([number]) * size
        import hashlib

        digest = hashlib.sha256(content).hexdigest()
        folder = {State.DONE: "done/2026/01/01", State.RECORDED: "work/t"}.get(
            state, "work/t" if state in UNFINISHED else "quarantine/truncated"
        )
        path = f"{folder}/{digest}.png"
        overlay = f"overlays/2026/01/01/{digest}.m-1.png" if state is State.DONE else None
        for name in filter(None, (path, overlay)):
            place = self.home.absolute(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            at = (NOW - timedelta(days=age_days)).timestamp()
            os.utime(place, (at, at))
        at = NOW - timedelta(days=age_days)
        with writing(self.engine) as connection:
            connection.execute(
                insert(Image).values(
                    id=number, sha256=digest, size_bytes=size, source_name="x", path=path,
                    received_at=at,
                )
            )  # fmt: skip
            connection.execute(
                insert(Result).values(
                    id=number, image_id=number, model_id=1, state=state, attempts=1, flags=[],
                    overlay=overlay, finished_at=None if state in UNFINISHED else at,
                )
            )  # fmt: skip
            if delivery is not None:
                connection.execute(
                    insert(Delivery).values(
                        result_id=number, destination="A@h:1", kind="sc", state=delivery,
                        attempts=0, refusals=0, created_at=at, commitment=commitment,
                    )
                )  # fmt: skip
        return path, overlay

    def keeper(self, **limits):
        return Retention(Config(home=self.home.root, **limits), self.home, self.engine)

    def clear(self, **limits):
        keeper = self.keeper(**limits)
        return [item for item in keeper.plan(NOW) if keeper.remove(item, NOW)]

    def exists(self, path):
        return self.home.exists(path)

    def agrees(self):
        report = Reconciler(self.home, self.engine, mend=False, is_running=True).run()
        return [item.kind for item in report.differences]


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path)
    yield found
    found.engine.dispose()


def test_without_limits_nothing_is_ever_removed(place):
    place.add(age_days=10_000)
    assert place.clear() == []


def test_what_is_older_than_its_folder_allows_goes_and_its_row_stays(place):
    old, old_overlay = place.add(age_days=31)
    young, _ = place.add(age_days=29)
    refused, _ = place.add(State.REJECTED, age_days=8)
    removed = place.clear(retain_done_days=30, retain_quarantine_days=7)
    assert {item.path for item in removed} == {old, refused}
    assert not place.exists(old)
    assert place.exists(young)
    assert place.exists(old_overlay)
    with reading(place.engine) as connection:
        row = connection.execute(select(Image.path, Image.removed_at).where(Image.id == 1)).one()
    assert row == (None, NOW)
    assert place.agrees() == []
    assert place.clear(retain_done_days=30, retain_quarantine_days=7) == []


def test_overlays_go_by_a_limit_of_their_own(place):
    path, overlay = place.add(age_days=3)
    place.clear(retain_overlays_days=2)
    assert (place.exists(path), place.exists(overlay)) == (True, False)
    assert not (place.home.overlays / "2026").exists()
    assert place.agrees() == []


def test_for_space_the_oldest_go_first_and_no_more_than_needed(place, monkeypatch):
    import lungwatch.daemon.retention as module

    monkeypatch.setattr(module, "_GIB", 10 * PAGE)  # so that a test need not write gigabytes
    paths = [place.add(State.REJECTED, age_days=age, size=4 * PAGE)[0] for age in (3, 5, 1, 4)]
    removed = place.clear(retain_quarantine_gb=1.0)
    assert [item.path for item in removed] == [paths[1], paths[3]]
    assert {item.why for item in removed} == {"space"}


def test_what_comes_into_use_between_plan_and_removal_stays(place):
    path, _ = place.add(State.REJECTED, age_days=100)
    keeper = place.keeper(retain_quarantine_days=1)
    (item,) = keeper.plan(NOW)
    with writing(place.engine) as connection:
        connection.execute(update(Result).values(state=State.QUEUED))
    assert keeper.remove(item, NOW) is False
    assert place.exists(path)


def test_a_link_in_a_file_s_place_is_not_followed(place, tmp_path):
    path, _ = place.add(age_days=100)
    (tmp_path / "precious").write_bytes(b"x")
    place.home.absolute(path).unlink()
    place.home.absolute(path).symlink_to(tmp_path / "precious")
    place.clear(retain_done_days=1)
    assert (tmp_path / "precious").exists()


def test_what_a_crash_leaves_between_row_and_file_is_removed_by_reconcile(place, monkeypatch):
    path, _ = place.add(age_days=100)
    content = place.home.absolute(path).read_bytes()
    place.clear(retain_done_days=1)
    place.home.absolute(path).parent.mkdir(parents=True, exist_ok=True)
    place.home.absolute(path).write_bytes(content)
    report = Reconciler(place.home, place.engine, mend=True, is_running=False).run()
    assert report.agrees
    assert not place.exists(path)
    assert list(place.home.incoming.iterdir()) == []


def test_each_folder_has_a_space_limit_of_its_own_that_counts_what_has_to_stay(place, monkeypatch):
    import lungwatch.daemon.retention as module

    monkeypatch.setattr(module, "_GIB", 10 * PAGE)  # as above
    refused = [place.add(State.REJECTED, age_days=age, size=4 * PAGE)[0] for age in (9, 8)]
    waiting, _ = place.add(age_days=7, size=7 * PAGE, delivery=DeliveryState.FAILED)
    sent, overlay = place.add(age_days=6, size=2 * PAGE, delivery=DeliveryState.SENT)
    assert [item.path for item in place.keeper(retain_done_gb=0.8).plan(NOW)] == [sent]
    assert [item.path for item in place.keeper(retain_quarantine_gb=0.8).plan(NOW)] == []
    removed = place.clear(retain_done_gb=0.8, retain_quarantine_gb=0.5, retain_overlays_gb=0.8)
    assert [item.path for item in removed] == [sent, refused[0], overlay]
    assert removed[0].reason == "done/ holds 0.9 GiB, retention.done_gb = 0.8"
    assert place.exists(waiting)
    assert place.agrees() == []
    row = get_result(place.engine, 4)
    assert (row.file_removed_at, row.overlay_removed_at) == (NOW, NOW)
    row = get_result(place.engine, 3)
    assert (row.file_removed_at, row.overlay_removed_at) == (None, None)


def test_old_backups_go_and_the_newest_stays_whatever_its_age(place):
    place.home.backups.mkdir()
    paths = []
    for day in (1, 2, 3):
        path = place.home.backups / f"lungwatch-2026010{day}T000000.000000Z.db"
        path.write_bytes(bytes(100))
        at = (NOW - timedelta(days=100 - day)).timestamp()
        os.utime(path, (at, at))
        paths.append(path)
    assert [item.folder for item in place.clear(retain_backups_days=98)] == ["backups"]
    removed = place.clear(retain_backups_days=1)
    assert [item.path for item in removed] == [place.home.relative(paths[1])]
    assert [path.exists() for path in paths] == [False, False, True]


CASES = st.lists(
    st.tuples(
        st.sampled_from(list(State)),
        st.integers(0, 60),
        st.sampled_from([None, *DeliveryState]),
    ),
    min_size=1,
    max_size=8,
)


@given(cases=CASES, days=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_nothing_unfinished_or_waiting_to_be_sent_is_ever_removed(cases, days):
    with TemporaryDirectory() as folder:
        place = Place(Path(folder))
        added = [(place.add(state, age, delivery=d), state, age, d) for state, age, d in cases]
        place.clear(
            retain_done_days=days, retain_quarantine_days=days, retain_overlays_days=days,
            retain_done_gb=1.0, retain_quarantine_gb=1.0, retain_overlays_gb=1.0,
        )  # fmt: skip
        for (path, overlay), state, age, delivery in added:
            in_use = state in UNFINISHED or delivery in (
                DeliveryState.QUEUED,
                DeliveryState.SENDING,
                DeliveryState.FAILED,
            )
            assert place.exists(path) == (in_use or age <= days)
            if overlay:
                assert place.exists(overlay) == (in_use or age <= days)
        place.engine.dispose()


@pytest.mark.parametrize("state", [None, *CommitmentState])
def test_what_is_sent_stays_until_its_commitment_has_an_end(place, state):
    path, overlay = place.add(age_days=60, delivery=DeliveryState.SENT, commitment=state)
    planned = place.keeper(retain_done_days=1, retain_overlays_days=1).plan(NOW)
    is_awaited = state in (CommitmentState.DUE, CommitmentState.REQUESTED)
    assert {item.path for item in planned} == (set() if is_awaited else {path, overlay})
    with writing(place.engine) as connection:
        connection.execute(update(Delivery).values(commitment=CommitmentState.COMMITTED))
    assert len(place.clear(retain_done_days=1, retain_overlays_days=1)) == 2


def test_what_is_to_be_committed_between_plan_and_removal_stays(place):
    path, overlay = place.add(age_days=60, delivery=DeliveryState.SENT)
    keeper = place.keeper(retain_done_days=1, retain_overlays_days=1)
    planned = keeper.plan(NOW)
    with writing(place.engine) as connection:
        connection.execute(update(Delivery).values(commitment=CommitmentState.DUE))
    assert [keeper.remove(item, NOW) for item in planned] == [False, False]
    assert place.exists(path)
    assert place.exists(overlay)


def test_a_sparse_file_counts_with_the_room_that_it_takes(place, monkeypatch):
    path, _ = place.add(State.REJECTED, age_days=9)
    sparse, _ = place.add(State.REJECTED, age_days=3)
    at = place.home.absolute(sparse).stat().st_mtime
    os.truncate(place.home.absolute(sparse), 8 * 1024**3)
    os.utime(place.home.absolute(sparse), (at, at))
    assert place.clear(retain_quarantine_gb=1.0) == []
    assert place.exists(path)


@pytest.mark.parametrize("change", ["future", "before the file", "before the receipt"])
def test_a_file_whose_times_contradict_one_another_is_kept_and_named(place, change):
    path, _ = place.add(age_days=100)
    with writing(place.engine) as connection:
        if change == "future":
            later = NOW + timedelta(days=3650)
            connection.execute(update(Result).values(finished_at=later))
        elif change == "before the receipt":
            connection.execute(update(Image).values(received_at=NOW - timedelta(days=50)))
            earlier = NOW - timedelta(days=100)
            connection.execute(update(Result).values(finished_at=earlier))
    if change == "before the file":
        os.utime(place.home.absolute(path), (NOW.timestamp(), NOW.timestamp()))
    keeper = place.keeper(retain_done_days=60, retain_done_gb=0.0)
    assert keeper.plan(NOW) == []
    assert place.exists(path)


def test_a_file_that_is_moved_while_a_plan_is_made_is_left_out(place, monkeypatch):
    path, _ = place.add(age_days=100)
    keeper = place.keeper(retain_done_days=60)
    found = keeper._candidates

    def moved():
        for item in found():
            place.home.absolute(item.path).unlink(missing_ok=True)
            yield item

    monkeypatch.setattr(keeper, "_candidates", moved)
    assert keeper.plan(NOW) == []
    assert keeper.implausible == []
    assert not place.exists(path)


READING = Reading(at=NOW, boot_id="a" * 32, boottime_s=1000.0)
YEARS = timedelta(days=3650)
DAY = timedelta(days=1)


@pytest.mark.parametrize(
    ("at", "boot_id", "boottime_s", "problem"),
    [
        (NOW + DAY, "a" * 32, 1000.0 + 86400, None),
        (NOW + YEARS, "a" * 32, 1000.0 + 86400, "clock_ahead"),
        (NOW + 3 * DAY, "a" * 32, 1000.0 + 86400, "clock_ahead"),
        (NOW, "a" * 32, 1000.0 + 86400, "clock_behind"),
        (NOW + 6 * DAY, "b" * 32, 5.0, None),
        (NOW + 8 * DAY, "b" * 32, 5.0, "clock_ahead"),
        (NOW - DAY, "b" * 32, 5.0, "clock_behind"),
        (NOW + YEARS, "", 1000.0 + 86400, "clock_ahead"),
    ],
)
def test_a_clock_that_jumped_is_told_from_one_that_ran(at, boot_id, boottime_s, problem):
    present = Reading(at=at, boot_id=boot_id, boottime_s=boottime_s)
    doubt = doubt_of(present, READING, None, max_pause=7 * DAY)
    assert (None if doubt is None else doubt.problem) == problem


def test_without_a_reading_the_newest_record_stands_in(place):
    place.add(age_days=1)
    keeper = place.keeper()
    assert keeper.check_clock(NOW) is None
    assert keeper.check_clock(NOW + YEARS).reason == "clock_ahead"
    assert keeper.check_clock(NOW - YEARS).reason == "clock_behind"


def test_a_run_that_removes_more_than_its_share_is_stopped_beyond_a_few_files(place):
    for _ in range(10):
        place.add(State.REJECTED, age_days=100)
    keeper = place.keeper(retain_quarantine_days=30)
    assert keeper.check_shares(keeper.shares(keeper.plan(NOW))) is None
    place.add(State.REJECTED, age_days=100)
    shares = keeper.shares(keeper.plan(NOW))
    assert (shares[0].files, shares[0].files_held, shares[0].largest) == (11, 11, 1.0)
    assert keeper.check_shares(shares).reason == "share_exceeded"
    keeper = place.keeper(retain_quarantine_days=30, retain_max_share=1.0)
    assert keeper.check_shares(shares) is None


class _Clock:
    """The system clock as a test sets it."""

    def __init__(self):
        self.shift = timedelta(0)

    def now(self):
        return datetime.now(UTC) + self.shift

    def monotonic(self):
        return 0.0


def test_a_daemon_keeps_readings_until_the_clock_jumps_and_retention_stops_then(place, caplog):
    clock = _Clock()
    watch = ClockWatch(
        place.engine,
        place.home,
        max_pause=7 * DAY,
        clock=clock,
        on_crash=lambda name, error: None,
    )
    assert last_reading(place.engine) is None
    watch.look()
    first = last_reading(place.engine)
    assert first is not None
    assert watch.doubts == {}
    clock.shift = YEARS
    for _ in range(2):
        watch.look()
    assert list(watch.doubts) == ["clock_ahead"]
    assert last_reading(place.engine) == first
    said = [record for record in caplog.records if "clock_doubted" in str(vars(record))]
    assert len(said) == 1
    assert place.keeper().check_clock(clock.now()).reason == "clock_ahead"
    clock.shift = timedelta(0)
    watch.look()
    assert watch.doubts == {}


def test_without_reading_and_row_the_newest_filed_file_stands_in(place):
    folder = place.home.done / "2026" / "05" / "31"
    folder.mkdir(parents=True)
    at = (NOW - DAY).timestamp()
    (folder / "x.png").write_bytes(b"x")
    os.utime(folder / "x.png", (at, at))
    assert place.keeper().check_clock(NOW) is None
    assert place.keeper().check_clock(NOW + YEARS).reason == "clock_ahead"


def test_health_shows_a_run_that_stopped_until_one_goes_through(place):
    keeper = place.keeper()
    keeper.stop(RetentionStopped("share_exceeded", "x"))
    assert health_counts(place.engine).retention_stopped == "share_exceeded"
    assert keeper.was_stopped
    keeper.run([])
    assert health_counts(place.engine).retention_stopped is None

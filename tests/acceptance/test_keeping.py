"""Backups and restores beside and after the real daemon, and who did what."""

import json
import os
import re
import sqlite3
import subprocess
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.record import sha256


def corrupt(path):
    """Overwrite pages in the middle, as a bad disk does."""
    data = bytearray(path.read_bytes())
    start = len(data) // 3 // 4096 * 4096
    data[start : start + 8 * 4096] = b"\xa5" * (8 * 4096)
    path.write_bytes(data)


def test_a_backup_beside_a_working_daemon_is_whole(make_home, picture):
    home = make_home()
    contents = [picture(n) for n in range(30)]
    with home.daemon() as daemon:
        for number, content in enumerate(contents):
            home.drop(f"{number}.png", content)
        made = [home.command("backup", "create", "--json") for _ in range(3)]
        home.wait_until_ended(contents)
        assert daemon.stop() == 0
    assert [said.returncode for said in made] == [0, 0, 0], made[0].stderr
    listed = json.loads(home.command("backup", "list", "--json").stdout)
    assert len(listed) == 3
    for row in listed:
        verified = home.command("backup", "verify", row["path"], with_home=False)
        assert verified.returncode == 0, verified.stderr
        with closing(sqlite3.connect(row["path"])) as connection:
            assert connection.execute("SELECT count(*) FROM result").fetchone()[0] <= 30
    kept = json.loads(home.command("backup", "create", "--keep", "2", "--json").stdout)
    assert len(kept["removed"]) == 2
    home.assert_settled(contents)


def test_a_damaged_database_is_refused_and_restored_and_nothing_is_lost(make_home, picture):
    home = make_home()
    before, after = ([picture(n) for n in numbers] for numbers in (range(12), range(12, 20)))
    for number, content in enumerate(before):
        home.drop(f"{number}.png", content)
    assert home.run_once().returncode == 0
    assert home.command("backup", "create").returncode == 0
    for number, content in enumerate(after):
        home.drop(f"later-{number}.png", content)
    assert home.run_once().returncode == 0

    corrupt(home.root / "lungwatch.db")
    refused = home.run_once()
    assert refused.returncode == 1
    assert "backup restore" in refused.stderr
    assert "Traceback" not in refused.stderr

    restored = home.command("backup", "restore", "--json")
    assert restored.returncode == 0, restored.stderr
    said = json.loads(restored.stdout)
    assert (said["put_back"], said["differences"]) == (8, 0)
    assert "before-restore" in said["kept_aside"]
    assert home.run_once().returncode == 0
    home.assert_settled([*before, *after])


def test_a_file_that_is_no_backup_changes_nothing(make_home, picture):
    home = make_home()
    home.drop("a.png", picture(1))
    assert home.run_once().returncode == 0
    wrong = home.root.parent / "wrong.db"
    wrong.write_bytes(b"no database at all")
    refused = home.command("backup", "restore", str(wrong))
    assert refused.returncode == 1
    assert "not an intact lungwatch database" in refused.stderr
    home.assert_settled([picture(1)])


def test_a_restore_needs_the_daemon_stopped(make_home, picture):
    home = make_home()
    with home.daemon():
        assert home.command("backup", "create").returncode == 0
        refused = home.command("backup", "restore")
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr


def test_who_did_what_is_written_down_and_cannot_be_altered(make_home, picture):
    home = make_home(RETAIN_QUARANTINE_DAYS="1")
    home.drop("broken.png", picture(1)[:500])
    assert home.run_once().returncode == 0
    (row,) = home.rows()
    assert home.command("retry", str(row.id)).returncode == 0
    assert (
        home.command("results", "export", "-o", str(home.root.parent / "all.csv")).returncode == 0
    )
    assert home.command("retention", "run").returncode == 0
    listed = json.loads(home.command("audit", "list", "--json").stdout)
    assert [item["action"] for item in listed] == ["results export", "retry"]
    assert all(item["actor"] and item["at"] and item["host"] for item in listed)
    assert {(item["uid"], item["outcome"]) for item in listed} == {(os.getuid(), "ok")}
    digest = sha256((home.root.parent / "all.csv").read_bytes())
    assert [item["target"] for item in listed] == [f"sha256 {digest}", f"result {row.id}"]
    assert "broken" not in json.dumps(listed)
    made = home.root.parent / "copies"
    made.mkdir()
    assert home.command("backup", "create", "-o", str(made)).returncode == 0
    assert home.command("results", "export", "-o", f"{made}/no/x.csv").returncode == 1
    assert json.loads(home.command("audit", "list", "--json").stdout)[0]["outcome"] == "failed"
    assert home.run_once().returncode in (0, 1)
    assert home.command("backup", "restore", str(next(made.iterdir()))).returncode == 0
    said = home.command("audit", "list", "--csv", "--action", "backup").stdout.splitlines()
    names = "id,at,actor,uid,host,action,target,outcome,detail,login,login_uid,environment"
    assert said[0].replace('"', "") == names
    assert len(said) == 2
    assert "backup restore" in said[1]
    by_nobody = home.command("audit", "list", "--json", "--actor", "no such user")
    assert json.loads(by_nobody.stdout) == []
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        for change in ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"):
            with pytest.raises(sqlite3.IntegrityError, match="only added to"):
                connection.execute(change)


def test_retention_beside_a_daemon_removes_what_is_over_the_limit(make_home, picture):
    home = make_home(RETAIN_DONE_DAYS="1")
    contents = [picture(n) for n in range(6)]
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content)
    assert home.run_once().returncode == 0
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        connection.execute("UPDATE result SET finished_at = '2020-01-01 00:00:00' WHERE id <= 3")
        connection.execute("UPDATE image SET received_at = '2020-01-01 00:00:00' WHERE id <= 3")
    for path in home.files("done"):
        os.utime(path, (1_577_000_000, 1_577_000_000))
    with home.daemon() as daemon:
        dry = json.loads(home.command("retention", "run", "--dry-run", "--json").stdout)
        said = json.loads(home.command("retention", "run", "--json").stdout)
        home.drop("again.png", contents[0])
        assert daemon.stop() == 0
    assert (dry["files"], said["files"]) == (3, 3)
    assert len(home.files("done")) in (3, 4)
    assert home.run_once().returncode == 0
    assert sha256(contents[0]) in home.kept(), "the same bytes, dropped again, are kept again"
    assert home.reconcile()[0] == 0


RESULT = "SELECT state, label, probability, flags, finished_at, claimed_at FROM result"
KEPT = "SELECT path, received_at, removed_at FROM image"
OVERLAY = "SELECT overlay, overlay_sha256, overlay_removed_at FROM result"


def removed_by_retention(make_home, content):
    """Return a home whose only file, and its overlay, retention has removed."""
    home = make_home(RETAIN_DONE_DAYS="1", RETAIN_OVERLAYS_DAYS="1")
    home.drop("first.png", content)
    assert home.run_once().returncode == 0
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        connection.execute("UPDATE result SET finished_at = '2020-01-01 00:00:00'")
        connection.execute("UPDATE image SET received_at = '2020-01-01 00:00:00'")
    for path in home.files("done", "overlays"):
        os.utime(path, (1_577_000_000, 1_577_000_000))
    done = home.command("retention", "run")
    assert done.returncode == 0, done.stderr
    assert home.files("done", "overlays") == []
    return home


def stored(home, statement):
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        return connection.execute(statement).fetchone()


def test_dropped_again_after_retention_a_file_gets_its_date_and_its_overlay(make_home, picture):
    home = removed_by_retention(make_home, picture(1))
    before = stored(home, RESULT)
    home.drop("again.png", picture(1))
    assert home.run_once().returncode == 0
    path, received_at, removed_at = stored(home, KEPT)
    assert path.startswith(f"done/{received_at[:10].replace('-', '/')}/")
    assert received_at > "2026"
    assert removed_at is None
    overlay, digest, overlay_removed_at = stored(home, OVERLAY)
    assert sha256((home.root / overlay).read_bytes()) == digest
    assert overlay_removed_at is None
    assert stored(home, RESULT) == before
    assert home.reconcile()[0] == 0
    assert json.loads(home.command("retention", "run", "--json").stdout)["files"] == 0


@pytest.mark.parametrize("point", ["claimed", "decoded", "overlaid"])
def test_killed_while_its_overlay_is_drawn_again_a_file_gets_it_at_the_next_start(
    make_home, picture, point
):
    home = removed_by_retention(make_home, picture(1))
    before = stored(home, RESULT)
    home.drop("again.png", picture(1))
    assert home.run_once(env={"CRASH_AT": point}).returncode < 0
    assert home.run_once().returncode == 0
    overlay, digest, _ = stored(home, OVERLAY)
    assert sha256((home.root / overlay).read_bytes()) == digest
    assert stored(home, RESULT) == before
    assert home.reconcile()[0] == 0


def test_an_overlay_that_would_show_other_values_is_not_drawn_again(make_home, picture):
    home = removed_by_retention(make_home, picture(1))
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        connection.execute("UPDATE result SET probability = 1 - probability")
    home.drop("again.png", picture(1))
    said = home.run_once()
    assert said.returncode == 0
    assert "action=not_redrawn" in said.stderr
    assert stored(home, OVERLAY)[0] is None
    assert home.files("overlays") == []
    assert home.reconcile()[0] == 0


FILES = 12
YEARS_S = 10 * 365 * 86400


@pytest.fixture
def aged(make_home, picture):
    """A home whose twelve rejected files are all past their limit, and that has no reading."""
    home = make_home(RETAIN_QUARANTINE_DAYS="1")
    for number in range(FILES):
        home.drop(f"{number}.png", picture(number)[:500])
    assert home.run_once().returncode == 0
    files = home.files("quarantine")
    assert len(files) == FILES
    then_s = time.time() - 30 * 86400
    then = datetime.fromtimestamp(then_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        connection.execute("UPDATE result SET finished_at = ?", (then,))
        connection.execute("UPDATE image SET received_at = ?", (then,))
    for path in files:
        os.utime(path, (then_s, then_s))
    return home


def retention_events(home):
    listed = json.loads(home.command("audit", "list", "--json").stdout)
    events = [event for event in listed if event["action"].startswith("retention")]
    return [(e["action"], e["target"], e["outcome"], e["detail"]) for e in reversed(events)]


def set_back_reading(home, seconds):
    """Make the kept reading of the clock as old as if the clock had jumped since."""
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        (at,) = connection.execute("SELECT at FROM clock_reading").fetchone()
        earlier = datetime.fromisoformat(at) - timedelta(seconds=seconds)
        connection.execute("UPDATE clock_reading SET at = ?", (str(earlier),))


def refused(said, reason, option):
    """Tell whether a run stopped with its reason, one line and no traceback."""
    lines = [line for line in said.stderr.splitlines() if "action=retention_stopped" not in line]
    assert said.returncode == 1
    assert f"action=retention_stopped reason={reason}" in said.stderr
    assert len(lines) == 1
    assert option in lines[0]
    assert "Traceback" not in said.stderr
    return True


def test_a_run_that_would_remove_more_than_its_share_stops_until_it_is_confirmed(aged):
    assert refused(aged.command("retention", "run"), "share_exceeded", "--yes")
    assert len(aged.files("quarantine")) == FILES
    assert retention_events(aged) == [
        ("retention run", "home", "failed", {"reason": "share_exceeded"})
    ]
    dry = aged.command("retention", "run", "--dry-run", "--json")
    assert dry.returncode == 0
    said = json.loads(dry.stdout)
    assert (said["files"], said["shares"], said["stops"]) == (
        FILES,
        {"quarantine": 1.0},
        "share_exceeded",
    )
    assert (
        "such a run stops (share_exceeded)" in aged.command("retention", "run", "--dry-run").stderr
    )
    assert len(aged.files("quarantine")) == FILES
    done = aged.command("retention", "run", "--yes")
    assert done.returncode == 0, done.stderr
    assert aged.files("quarantine") == []
    assert aged.reconcile()[0] == 0


def test_a_clock_that_jumped_stops_every_removal_until_it_is_confirmed(aged):
    # A first run keeps a reading of the clock.
    assert aged.command("retention", "run", env={"RETAIN_QUARANTINE_DAYS": "60"}).returncode == 0
    set_back_reading(aged, YEARS_S)
    for args in ((), ("--yes",)):
        assert refused(aged.command("retention", "run", *args), "clock_ahead", "--clock-is-right")
    assert len(aged.files("quarantine")) == FILES
    dry = json.loads(aged.command("retention", "run", "--dry-run", "--json").stdout)
    assert (dry["files"], dry["stops"]) == (FILES, "clock_ahead")
    # The confirmation is of the clock alone, and a stopped run keeps no reading.
    only_clock = aged.command("retention", "run", "--clock-is-right")
    assert refused(only_clock, "share_exceeded", "--yes")
    done = aged.command("retention", "run", "--clock-is-right", "--yes")
    assert done.returncode == 0, done.stderr
    assert aged.files("quarantine") == []
    events = retention_events(aged)
    assert [event[3].get("reason") for event in events[:3]] == [
        "clock_ahead",
        "clock_ahead",
        "share_exceeded",
    ]
    assert [event[0] for event in events[3:]] == [
        "retention confirm clock",
        "retention run",
        "retention run",
    ]
    set_back_reading(aged, -YEARS_S)
    assert refused(aged.command("retention", "run"), "clock_behind", "--clock-is-right")


def test_a_daemon_works_under_a_clock_that_jumped_and_says_so(make_home, picture):
    home = make_home()
    assert home.run_once().returncode == 0
    set_back_reading(home, YEARS_S)
    kept = stored(home, "SELECT at FROM clock_reading")
    with home.daemon() as daemon:
        daemon.wait_until_said("action=clock_doubted")
        home.drop("a.png", picture(1))
        home.wait_until_ended([picture(1)])
        assert daemon.stop() == 0
    assert stored(home, "SELECT at FROM clock_reading") == kept
    assert home.command("retention", "run", "--clock-is-right").returncode == 0
    assert "clock_doubted" not in home.run_once().stderr


@pytest.fixture(scope="module")
def two_states(make_home, picture):
    """A home with two results, and a backup outside of it from when there was one."""
    home = make_home()
    home.drop("a.png", picture(1))
    assert home.run_once().returncode == 0
    backup = home.root.parent / "one.db"
    assert home.command("backup", "create", "-o", str(backup)).returncode == 0
    home.drop("b.png", picture(2))
    assert home.run_once().returncode == 0
    return home, backup


def test_a_backup_is_not_written_over_what_is_there(two_states):
    home, backup = two_states
    before = backup.read_bytes()
    for place, why in ((backup, "is there already"), (Path("/nowhere/x.db"), "no folder")):
        refused = home.command("backup", "create", "-o", str(place))
        assert refused.returncode == 1
        assert why in refused.stderr
    assert backup.read_bytes() == before


@pytest.mark.parametrize("point", ["restore_copied", "restore_parted", "restore_replaced"])
def test_a_restore_that_is_killed_leaves_one_whole_database_and_says_what_to_do(two_states, point):
    home, backup = two_states
    contents = len(home.files("done"))
    killed = home.command("backup", "restore", str(backup), env={"CRASH_AT": point})
    assert killed.returncode == -9
    database = home.root / "lungwatch.db"
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (number,) = connection.execute("SELECT count(*) FROM result").fetchone()
    assert number == (1 if point == "restore_replaced" else 2)
    if point != "restore_copied":  # before that, nothing has been changed
        refused = home.run_once()
        assert refused.returncode == 1
        assert f"lungwatch backup restore {backup}" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert home.command("backup", "restore", str(backup)).returncode == 0
    assert home.run_once().returncode == 0
    assert len(home.rows()) == 2
    assert len(home.files("done")) == contents
    assert home.reconcile()[0] == 0


def test_a_second_home_on_one_database_is_refused(make_home, picture, empty_postgres):
    first, second = (make_home(DATABASE_URL=empty_postgres) for _ in range(2))
    first.drop("a.png", picture(1))
    assert first.run_once().returncode == 0
    for args in (("run", "--once"), ("reconcile",), ("retention", "run")):
        refused = second.command(*args)
        assert refused.returncode == 1
        assert "belongs to another home" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert first.run_once().returncode == 0
    for args in (("backup", "create"), ("backup", "restore")):
        said = first.command(*args)
        assert said.returncode == 1
        assert "pg_dump" in said.stderr
    listed = first.command("retention", "run", "--dry-run", "--json")
    assert json.loads(listed.stdout)["files"] == 0
    # The same home elsewhere: its mark goes with it, or is written where the message says.
    (second.root / ".home-id").write_bytes((first.root / ".home-id").read_bytes())
    assert second.command("retention", "run").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a tmpfs")
def test_claiming_pauses_before_the_disk_is_full_and_resumes_with_a_margin(make_home, picture):
    home = make_home(MIN_FREE_MB="20", METRICS_TEXTFILE="", RESCAN_S="0.1")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(home.root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        home.incoming.mkdir()
        with home.daemon() as daemon:
            free = os.statvfs(home.root)
            mib = free.f_bavail * free.f_frsize // 2**20
            filler = home.root / "filler"
            filler.write_bytes(bytes((mib - 19) * 2**20))
            home.drop("a.png", picture(1))
            daemon.wait_until_said("action=paused")
            # Above the limit, and not by the margin of a tenth.
            os.truncate(filler, (mib - 21) * 2**20)
            home.drop("b.png", picture(2))
            time.sleep(0.5)  # a few looks at the folder, none of which may resume
            os.truncate(filler, (mib - 30) * 2**20)
            home.wait_until_ended([picture(1), picture(2)])
            (free_mb,) = re.findall(r"action=resumed.* free_mb=(\d+)", daemon.log())
            assert int(free_mb) >= 22
            assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(home.root)], check=True)

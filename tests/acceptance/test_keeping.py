"""Backups and restores beside and after the real daemon, and who did what."""

import json
import sqlite3
from contextlib import closing

import pytest

from .conftest import sha256


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
    assert "no whole database" in refused.stderr
    home.assert_settled([picture(1)])


def test_a_restore_needs_the_daemon_stopped(make_home, picture):
    home = make_home()
    with home.daemon():
        assert home.command("backup", "create").returncode == 0
        refused = home.command("backup", "restore")
    assert refused.returncode == 1
    assert "stop it first" in refused.stderr


def test_who_did_what_is_written_down_and_cannot_be_altered(make_home, picture):
    home = make_home(RETAIN_MAX_GB="0", RETAIN_QUARANTINE_DAYS="1")
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
    assert all(item["actor"] and item["at"] for item in listed)
    assert "broken" not in json.dumps(listed)
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

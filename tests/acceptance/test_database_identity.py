"""A database that is removed or replaced under a daemon, or missing, or used by a copied home."""

import http.client
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.homes import Home
from tests.support.peers import free_port
from tests.support.record import read_rows, sha256
from tests.support.waits import PATIENCE_S, wait_for

_LEASE_S = 6.0


def health(port: int) -> tuple[int, set[str]]:
    """Return the status of /health and the codes of its reasons."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status, {reason["code"] for reason in json.loads(answer.read())["reasons"]}
    finally:
        connection.close()


def wait_until_failing(daemon, port: int) -> None:
    """Wait until /health fails because of the database."""

    def fails() -> bool:
        status, codes = health(port)
        return status == 503 and "outage_database_replaced" in codes

    wait_for(fails, daemon.log)


def wait_until_well(daemon, port: int) -> None:
    """Wait until /health is right again."""
    wait_for(lambda: health(port)[0] == 200, daemon.log)


def assert_no_traceback(daemon) -> None:
    """What is wrong with the database is said in a line, never with a stack."""
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(
    "suffix", [pytest.param(suffix, id=f"db{suffix}") for suffix in ("", "-wal", "-shm")]
)
def test_a_file_of_the_database_that_is_removed_stops_the_work_until_it_is_back(
    make_home, picture, suffix
):
    port = free_port()
    home = make_home(METRICS_PORT=str(port))
    path = Path(f"{home.root / 'lungwatch.db'}{suffix}")
    with home.daemon() as daemon:
        home.drop("1.png", picture(1))
        home.wait_until_ended([picture(1)])
        wait_until_well(daemon, port)
        os.link(path, home.root / "kept")
        path.unlink()
        daemon.wait_until_said("action=database_replaced")
        wait_until_failing(daemon, port)
        home.drop("2.png", picture(2))
        daemon.wait_until_said("action=database_saved")
        assert not path.exists(), "nothing makes a new one"
        assert len(home.files("done", "quarantine")) == 1
        (home.root / "kept").rename(path)
        daemon.wait_until_said("action=database_right_again")
        wait_until_well(daemon, port)
        home.wait_until_ended([picture(2)])
        assert daemon.stop() == 0
        assert_no_traceback(daemon)
    home.assert_settled([picture(1), picture(2)])


def test_what_was_open_of_a_removed_database_is_restored_from_the_rescued_copy(make_home, picture):
    home = make_home()
    with home.daemon() as daemon:
        home.drop("1.png", picture(1))
        home.wait_until_ended([picture(1)])
        for path in home.root.glob("lungwatch.db*"):
            path.unlink()
        daemon.wait_until_said("action=database_saved")
        assert daemon.stop() == 0
        assert_no_traceback(daemon)
    assert not (home.root / "lungwatch.db").exists(), "not at the stop either"
    refused = home.run_once()
    assert refused.returncode == 1
    assert "is missing or empty" in refused.stderr
    rescued = home.root / "backups" / "rescued-1.db"
    restored = home.command("backup", "restore", str(rescued))
    assert restored.returncode == 0, restored.stderr
    home.drop("2.png", picture(2), old=True)
    assert home.run_once().returncode == 0
    home.assert_settled([picture(1), picture(2)])


@pytest.mark.parametrize("into", ["a new file", "the same file"])
def test_a_backup_that_is_put_over_the_database_is_not_written_into(
    make_home, picture, tmp_path, into
):
    port = free_port()
    home = make_home(METRICS_PORT=str(port))
    database, backup = home.root / "lungwatch.db", tmp_path / "backup.db"
    home.drop("1.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    assert home.command("backup", "create", "-o", str(backup)).returncode == 0
    with home.daemon() as daemon:
        home.drop("2.png", picture(2))
        home.wait_until_ended([picture(2)])
        wait_until_well(daemon, port)
        if into == "a new file":
            shutil.copyfile(backup, home.root / "copy")
            (home.root / "copy").rename(database)
        else:
            shutil.copyfile(backup, database)
        daemon.wait_until_said("action=database_replaced")
        wait_until_failing(daemon, port)
        home.drop("3.png", picture(3))
        if into == "a new file":
            assert sha256(database.read_bytes()) == sha256(backup.read_bytes())
        assert len(home.files("done", "quarantine")) == 2
        assert daemon.stop() in (0, 1)
        assert_no_traceback(daemon)
    restored = home.command("backup", "restore", str(backup))
    assert restored.returncode == 0, restored.stderr
    assert home.run_once().returncode == 0
    home.assert_settled([picture(1), picture(2), picture(3)])


def test_a_truncated_database_stops_the_work(make_home, picture, tmp_path):
    port = free_port()
    home = make_home(METRICS_PORT=str(port))
    database, backup = home.root / "lungwatch.db", tmp_path / "backup.db"
    with home.daemon() as daemon:
        home.drop("1.png", picture(1))
        home.wait_until_ended([picture(1)])
        assert home.command("backup", "create", "-o", str(backup)).returncode == 0
        wait_until_well(daemon, port)
        os.truncate(database, 8192)
        daemon.wait_until_said("action=database_replaced")
        wait_until_failing(daemon, port)
        home.drop("2.png", picture(2))
        assert len(home.files("done", "quarantine")) == 1
        daemon.stop()
        assert_no_traceback(daemon)
    restored = home.command("backup", "restore", str(backup))
    assert restored.returncode == 0, restored.stderr
    assert home.run_once().returncode == 0
    home.assert_settled([picture(1), picture(2)])


def test_a_start_without_the_database_of_a_used_home_is_refused(make_home, picture):
    home = make_home()
    home.drop("1.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    for path in home.root.glob("lungwatch.db*"):
        path.unlink()
    refused = home.run_once()
    assert refused.returncode == 1
    assert "is missing or empty" in refused.stderr
    assert not (home.root / "lungwatch.db").exists()
    assert home.command("run", "--once", "--new-database").returncode == 0


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request, tmp_path):
    """A database outside of any home."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    return request.getfixturevalue("empty_postgres")


def copy_of(home: Home, root: Path) -> Home:
    """Copy a home with its mark, as a snapshot of a machine does."""
    copy = Home(root, dict(home.env))
    shutil.copytree(home.root, copy.root, dirs_exist_ok=True)
    return copy


def test_a_copied_home_with_its_mark_is_refused_the_database_in_use(
    make_home, tmp_path, shared_url
):
    home = make_home(DATABASE_URL=shared_url, LEASE_S=str(_LEASE_S))
    with home.daemon() as daemon:
        copy = copy_of(home, tmp_path / "copy" / "home")
        refused = copy.run_once()
        assert refused.returncode == 1
        assert "in use by another daemon" in refused.stderr
        assert copy.command("reconcile").returncode == 1
        assert daemon.is_running
        assert daemon.stop() == 0
    wait_for(lambda: copy.run_once().returncode == 0)


def test_a_daemon_whose_lease_was_taken_over_writes_nothing_more_and_ends(
    make_home, picture, tmp_path, shared_url
):
    """The first hangs for longer than the lease, and a copy of its home takes over."""
    home = make_home(DATABASE_URL=shared_url, LEASE_S=str(_LEASE_S))
    record = shared_url if shared_url.startswith("postgresql") else tmp_path / "shared.db"
    with home.daemon() as first:
        home.drop("1.png", picture(1))
        wait_for(lambda: [row.state for row in read_rows(record)] == ["done"], first.log)
        wait_for(lambda: not any((home.root / "work").iterdir()), first.log)
        copy = copy_of(home, tmp_path / "copy" / "home")
        first.suspend()
        with copy.daemon() as second:
            assert "action=lease_awaited" in second.log()
            home.drop("2.png", picture(2))
            first.resume()
            assert first.process.wait(PATIENCE_S) == 1
            assert "was taken over by another daemon" in first.log()
            assert_no_traceback(first)
            assert [row.sha256 for row in read_rows(record)] == [sha256(picture(1))]
            assert len(home.files("done", "quarantine")) == 1
            copy.drop("3.png", picture(3))
            wait_for(lambda: len(read_rows(record)) == 2, second.log)
            assert second.is_running
            assert second.stop() == 0
    found = {row.sha256 for row in read_rows(record)}
    assert found == {sha256(picture(1)), sha256(picture(3))}


def test_a_daemon_that_was_killed_leaves_no_lease_to_wait_for(make_home, picture, tmp_path):
    """Its process is known to have ended, so that the next start does not wait."""
    home = make_home(DATABASE_URL=f"sqlite:///{tmp_path / 'shared.db'}", LEASE_S="3600")
    with home.daemon() as daemon:
        daemon.kill()
    home.drop("1.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    with closing(sqlite3.connect(tmp_path / "shared.db")) as connection:
        (token,) = connection.execute("SELECT token FROM lease").fetchone()
    assert token is None, "given back at the end"

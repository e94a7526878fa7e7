"""Hazards of a server: faults that delay or stop the daemon without losing a file."""

import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime

import pytest

COUNT = 8


@pytest.fixture
def contents(picture):
    return [picture(number) for number in range(COUNT)]


def drop(home, contents):
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content, old=True)


def test_a_locked_database_delays_and_loses_nothing(make_home, contents):
    home = make_home()
    with home.daemon() as daemon:
        with closing(sqlite3.connect(home.root / "lungwatch.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            drop(home, contents)
            time.sleep(3)
            assert home.rows() == []
            other.rollback()
        home.wait_until_ended(contents)
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled(contents)


def test_a_database_locked_beyond_the_timeout_is_waited_for_and_a_stop_is_still_heard(
    make_home, contents
):
    """It says so once and stays; told to stop meanwhile, it ends in order and loses nothing."""
    home = make_home(DRAIN_S="1")
    with home.daemon() as daemon:
        with closing(sqlite3.connect(home.root / "lungwatch.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            drop(home, contents)
            daemon.wait_until_said("action=database_away")
            assert daemon.process.poll() is None
            assert daemon.stop() == 0, daemon.log()
            other.rollback()
        assert daemon.log().count("action=database_away") == 1
        assert "locked" in daemon.log()
        assert "Traceback" not in daemon.log()
    assert home.run_once().returncode == 0
    home.assert_settled(contents)


@pytest.mark.parametrize("args", [(), ("--once",)], ids=["run", "run --once"])
def test_a_dead_thread_stops_the_daemon_and_the_next_start_goes_on(make_home, contents, args):
    """No overlay can be written: it does not wait for ever for what will never end."""
    home = make_home(MAX_IN_FLIGHT="1")
    year = home.root / "overlays" / str(datetime.now(UTC).year)
    year.parent.mkdir()
    year.write_text("a file where a folder has to be")
    drop(home, contents)
    # With something in it, the home counts as worked in.
    daemon = home.daemon(*args, "--new-database").launch()
    try:
        assert daemon.process.wait(240) == 1
    finally:
        daemon.kill()
    assert "action=crashed" in daemon.log()
    assert "Traceback" not in daemon.log()
    year.unlink()
    assert home.run_once().returncode == 0
    assert {row.state for row in home.rows()} == {"done"}
    home.assert_settled(contents)

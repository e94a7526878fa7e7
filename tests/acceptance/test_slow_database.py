"""A database server that is not there yet when the daemon starts, as after a power cut."""

import hashlib

import pytest

from tests.support.postgres import find_programs, running
from tests.support.waits import wait_for


@pytest.fixture
def programs():
    pytest.importorskip("psycopg", reason="the extra 'postgres' is not installed")
    found = find_programs()
    if found is None:
        pytest.skip("no PostgreSQL server is installed")
    return found


@pytest.fixture
def late(make_home, tmp_path, picture):
    """A home with a file in it, whose server will be reached by a folder that is to appear."""
    home = make_home(DATABASE_URL=f"postgresql://postgres@/postgres?host={tmp_path / 'late'}")
    home.drop("x.png", picture(1), old=True)
    return home


def test_a_server_that_boots_later_is_waited_for(programs, late, tmp_path, picture):
    """Said once, with the reason; then every file has its end."""
    daemon = late.daemon().launch()
    try:
        daemon.wait_until_said("action=database_away")
        with running(programs) as server:
            (tmp_path / "late").symlink_to(server.url.partition("host=")[2])
            daemon.wait_until_said("action=ready")
            wait_for(late.kept, daemon.log)
            assert daemon.stop() == 0, daemon.log()
    finally:
        daemon.kill()
    assert daemon.log().count("action=database_away") == 1
    assert "action=database_back" in daemon.log()
    assert late.kept() == {hashlib.sha256(picture(1)).hexdigest(): 1}


def test_a_stop_is_heard_while_it_is_waited_for(late):
    daemon = late.daemon().launch()
    try:
        daemon.wait_until_said("action=database_away")
        assert daemon.stop() == 0, daemon.log()
    finally:
        daemon.kill()
    assert "Traceback" not in daemon.log()
    assert late.files("incoming") == [late.root / "incoming" / "x.png"]


def test_run_once_does_not_wait(late):
    done = late.run_once()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("lungwatch: error: the database postgresql")
    assert "is not available" in line

"""A database that is removed or replaced under a daemon, or missing, or used by a copied home."""

import shutil

from tests.support.homes import Home
from tests.support.waits import wait_for


def test_a_database_that_is_moved_away_stops_the_work_until_it_is_back(make_home, picture):
    home = make_home()
    database = home.root / "lungwatch.db"
    with home.daemon() as daemon:
        home.drop("1.png", picture(1))
        home.wait_until_ended([picture(1)])
        database.rename(home.root / "away")
        daemon.wait_until_said("action=database_replaced")
        home.drop("2.png", picture(2))
        daemon.wait_until_said("action=database_saved")
        assert not database.exists()
        assert len(home.files("done", "quarantine")) == 1
        (home.root / "away").rename(database)
        daemon.wait_until_said("action=database_right_again")
        home.wait_until_ended([picture(2)])
        assert daemon.stop() == 0
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


def test_a_copied_home_with_its_mark_is_refused_the_database_in_use(make_home, tmp_path):
    home = make_home(DATABASE_URL=f"sqlite:///{tmp_path / 'shared.db'}", LEASE_S="6")
    with home.daemon() as daemon:
        copy = Home(tmp_path / "copy" / "home", dict(home.env))
        shutil.copytree(home.root, copy.root, dirs_exist_ok=True)
        refused = copy.run_once()
        assert refused.returncode == 1
        assert "in use by another daemon" in refused.stderr
        assert copy.command("reconcile").returncode == 1
        assert daemon.is_running
        assert daemon.stop() == 0
    wait_for(lambda: copy.run_once().returncode == 0)

"""`doctor` finds a good home good, and names the check that a bad one fails."""

import json

import pytest

CHECKS = {"folders", "space", "watching", "database", "model", "clock", "synthetic X-ray"}


def examine(home, env=None):
    """Return the exit status and the checks by name."""
    said = home.command("doctor", "--json", env=env)
    assert said.returncode in (0, 1), said.stderr
    assert "Traceback" not in said.stderr
    return said.returncode, {check["name"]: check for check in json.loads(said.stdout)}


def failing(checks):
    return {name for name, check in checks.items() if check["ok"] is False}


@pytest.fixture
def home(make_home):
    return make_home()


def test_a_good_home_passes_every_check_and_keeps_no_trace_of_the_trial(home):
    assert home.run_once().returncode == 0
    status, checks = examine(home)
    assert failing(checks) == set()
    assert status == 0
    assert set(checks) >= CHECKS
    assert home.rows() == []
    assert home.files("incoming", "work", "done", "quarantine", "overlays") == []


def test_it_is_readable_by_people(home):
    said = home.command("doctor")
    assert said.returncode == 0, said.stdout
    assert all(name in said.stdout for name in CHECKS)
    assert "FAILED" not in said.stdout


def test_it_passes_while_a_daemon_runs(home, picture):
    with home.daemon() as daemon:
        status, checks = examine(home)
        assert (status, failing(checks)) == (0, set())
        home.drop("x.png", picture(1))
        home.wait_until_ended([picture(1)])
        assert daemon.stop() == 0
    home.assert_settled([picture(1)])


def test_too_little_space(home):
    status, checks = examine(home, env={"MIN_FREE_MB": "9999999"})
    assert (status, failing(checks)) == (1, {"space"})
    assert "min_free_mb" in checks["space"]["detail"]


def test_a_database_that_is_none(home):
    (home.root / "lungwatch.db").write_bytes(b"garbage " * 1000)
    status, checks = examine(home)
    assert (status, failing(checks)) == (1, {"database"})


def test_an_altered_model(home, altered_bundle):
    status, checks = examine(home, env={"MODEL": str(altered_bundle)})
    assert status == 1
    assert failing(checks) == {"model", "synthetic X-ray"}
    assert "SHA-256" in checks["model"]["detail"]


def test_a_model_that_is_not_there(home):
    status, checks = examine(home, env={"MODEL": "no-such-model"})
    assert status == 1
    assert "no-such-model" in checks["model"]["detail"]


def test_a_folder_whose_place_is_taken(home):
    (home.root / "work").write_text("a file")
    status, checks = examine(home)
    assert status == 1
    assert "folders" in failing(checks)


@pytest.mark.usefixtures("has_no_privilege")
def test_a_folder_that_cannot_be_written(home):
    assert home.run_once().returncode == 0
    (home.root / "done").chmod(0o500)
    try:
        status, checks = examine(home)
    finally:
        (home.root / "done").chmod(0o700)
    assert status == 1
    assert "folders" in failing(checks)


def test_a_bad_configuration_is_one_line_that_names_the_key(home):
    (home.root / "lungwatch.toml").write_text("batchsize = 3\n")
    said = home.command("doctor")
    assert said.returncode == 1
    (line,) = said.stderr.splitlines()
    assert "batchsize" in line

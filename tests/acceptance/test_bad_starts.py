"""A start that cannot be is one line that says why and what to do, and changes nothing."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest


@pytest.fixture
def home(make_home, picture):
    home = make_home()
    home.drop("x.png", picture(1), old=True)
    return home


@pytest.fixture
def refusal(home, picture):
    """Start the daemon, and return the line with which it refuses to."""

    def start(*args, status=1, **env):
        refused = home.command("run", *args, env=env)
        assert refused.returncode == status, refused.stderr
        assert refused.stdout == ""
        assert "Traceback" not in refused.stderr
        assert (home.incoming / "x.png").read_bytes() == picture(1)
        if status == 2:
            return refused.stderr
        (line,) = refused.stderr.splitlines()
        assert line.startswith("lungwatch: error: ")
        return line

    return start


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("batchsize = 4", "batchsize"),
        ("batch_size = 0", "batch_size"),
        ("batch_size = 'four'", "batch_size"),
        ("observer = 'telepathy'", "observer"),
        ("modalities = 'CR'", "modalities"),
        ("batch_size = = 4", "lungwatch.toml"),
    ],
)
def test_a_bad_configuration_file_names_the_key(home, refusal, toml, named):
    (home.root / "lungwatch.toml").write_text(toml)
    line = refusal()
    assert named in line
    assert "lungwatch.toml" in line


@pytest.mark.parametrize(
    ("key", "value"), [("BATCHSIZE", "4"), ("BATCH_SIZE", "many"), ("STABILITY_S", "-1")]
)
def test_a_bad_setting_in_the_environment_names_the_variable(refusal, key, value):
    assert f"LUNGWATCH_{key}" in refusal(**{key: value})


def test_a_configuration_file_that_is_not_there(refusal):
    assert "nowhere.toml" in refusal("--config", "nowhere.toml")


def test_an_unknown_option_is_a_usage_error(refusal):
    assert "--tiwce" in refusal("--tiwce", status=2)


def test_a_model_that_is_not_there_lists_those_that_are(refusal):
    line = refusal(MODEL="no-such-model")
    assert "no-such-model" in line
    assert "baseline" in line


def test_an_altered_model(refusal, altered_bundle):
    assert "SHA-256" in refusal(MODEL=str(altered_bundle))


def test_a_model_without_its_bundle_file(refusal, tmp_path, shipped_bundle):
    (tmp_path / "bare").mkdir()
    shutil.copy(shipped_bundle / "model.onnx", tmp_path / "bare")
    assert "bare" in refusal(MODEL=str(tmp_path / "bare"))


def test_less_free_space_than_the_limit(refusal):
    line = refusal(MIN_FREE_MB="9999999")
    assert "min_free_mb" in line
    assert "free" in line


def test_a_database_that_is_none(home, refusal):
    (home.root / "lungwatch.db").write_bytes(b"garbage " * 1000)
    assert "lungwatch.db is not a database" in refusal()
    assert (home.root / "lungwatch.db").read_bytes() == b"garbage " * 1000


def test_a_database_of_another_program(home, refusal):
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        connection.execute("CREATE TABLE recipe (name TEXT)")
    assert "another program" in refusal()


def test_a_database_in_a_folder_that_is_not_there(home, refusal):
    assert "nowhere" in refusal(DATABASE_URL=f"sqlite:///{home.root}/nowhere/x.db")


def test_a_database_url_that_is_none(refusal):
    assert "database URL" in refusal(DATABASE_URL="the blue one")


def test_a_folder_whose_place_is_taken_by_a_file(home, refusal):
    (home.root / "done").write_text("a file")
    assert "done" in refusal()


def test_a_folder_on_another_file_system(home, refusal):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == home.root.stat().st_dev:
        pytest.skip("/dev/shm is not another, writable file system here")
    (home.root / "done").symlink_to(shm)
    assert "another file system" in refusal()


@pytest.mark.usefixtures("has_no_privilege")
def test_a_home_that_cannot_be_written(home, refusal):
    home.root.chmod(0o500)
    try:
        assert str(home.root) in refusal()
    finally:
        home.root.chmod(0o700)


@pytest.mark.usefixtures("has_no_privilege")
def test_a_home_whose_lock_cannot_be_opened(home, refusal):
    (home.root / ".lock").touch(mode=0)
    line = refusal()
    assert ".lock" in line
    assert "owner or mode" in line


def test_the_results_of_a_home_without_a_database(home):
    said = home.command("results", "list")
    assert said.returncode == 1
    (line,) = said.stderr.splitlines()
    assert "no database" in line

"""Configuration: every key from every source, and nothing that is not a key."""

from pathlib import Path

import pytest

from lungwatch.daemon.config import Config
from lungwatch.daemon.configfile import load_config
from lungwatch.errors import ConfigError


def test_defaults_need_neither_file_nor_environment(tmp_path):
    config = load_config(home=tmp_path, environ={})
    assert config.home == tmp_path
    assert config.database_url == f"sqlite:///{tmp_path / 'lungwatch.db'}"


def test_command_line_beats_environment_beats_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('home = "/from-file"\nbatch_size = 3\nrescan_s = 2\n')
    environ = {"LUNGWATCH_BATCH_SIZE": "5", "LUNGWATCH_HOME": "/from-env"}
    config = load_config(file, environ=environ)
    assert (config.home, config.batch_size, config.rescan_s) == (Path("/from-env"), 5, 2.0)
    assert load_config(file, home=tmp_path, environ=environ).home == tmp_path


def test_a_file_in_the_home_is_found(tmp_path):
    (tmp_path / "lungwatch.toml").write_text("max_attempts = 7\n")
    assert load_config(home=tmp_path, environ={}).max_attempts == 7


def test_environment_values_take_the_type_of_their_key(tmp_path):
    environ = {
        "LUNGWATCH_MODALITIES": "CR, DX",
        "LUNGWATCH_REJECT_LATERAL": "false",
        "LUNGWATCH_RESCAN_S": "0.25",
    }
    config = load_config(home=tmp_path, environ=environ)
    assert config.modalities == ("CR", "DX")
    assert config.reject_lateral is False
    assert config.rescan_s == 0.25
    assert config.read_policy.modalities == frozenset({"CR", "DX"})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("batchsize = 3", "batchsize"),
        ('batch_size = "3"', "batch_size"),
        ("batch_size = true", "batch_size"),
        ("batch_size = 0", "batch_size"),
        ('observer = "kqueue"', "observer"),
        ('modalities = "CR"', "modalities"),
        ("[daemon]\nbatch_size = 3", "daemon"),
        ("batch_size = ", "TOML"),
    ],
)
def test_a_bad_key_or_value_in_the_file_is_named(tmp_path, content, named):
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(file, environ={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LUNGWATCH_BATCHSIZE", "3"),
        ("LUNGWATCH_BATCH_SIZE", "many"),
        ("LUNGWATCH_REJECT_LATERAL", "perhaps"),
        ("LUNGWATCH_MAX_ATTEMPTS", "-1"),
    ],
)
def test_a_bad_variable_in_the_environment_is_named(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name):
        load_config(home=tmp_path, environ={name: value})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist"):
        load_config(tmp_path / "absent.toml", environ={})


def test_the_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().batch_size = 1


def test_a_home_that_no_url_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="home"):
        load_config(home=tmp_path / "what?", environ={})

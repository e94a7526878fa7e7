"""Configuration: every key from every source, and nothing that is not a key."""

import logging
import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from lungwatch.daemon.config import Config
from lungwatch.daemon.configfile import KEYS, load_config, sample
from lungwatch.errors import ConfigError
from lungwatch.imaging.radiograph import ReadPolicy


def write(folder, text):
    file = folder / "c.toml"
    file.write_text(text)
    return file


def test_defaults_need_neither_file_nor_environment(tmp_path):
    config = load_config(home=tmp_path, environ={})
    assert config.home == tmp_path
    assert config.database_url == f"sqlite:///{tmp_path / 'lungwatch.db'}"


def test_the_reader_accepts_by_default_what_the_configuration_says():
    assert Config().read_policy == ReadPolicy()


def test_command_line_beats_environment_beats_file(tmp_path):
    file = write(
        tmp_path, 'home = "/from-file"\n[intake]\nrescan_s = 2\n[pipeline]\nbatch_size = 3\n'
    )
    environ = {"LUNGWATCH_PIPELINE_BATCH_SIZE": "5", "LUNGWATCH_HOME": "/from-env"}
    config = load_config(file, environ=environ)
    assert (config.home, config.batch_size, config.rescan_s) == (Path("/from-env"), 5, 2.0)
    assert load_config(file, home=tmp_path, environ=environ).home == tmp_path


def test_a_file_in_the_home_is_found(tmp_path):
    (tmp_path / "lungwatch.toml").write_text("[pipeline]\nmax_attempts = 7\n")
    assert load_config(home=tmp_path, environ={}).max_attempts == 7


@pytest.mark.parametrize("section", ["", "RADIOGRAPHS_"])
def test_environment_values_take_the_type_of_their_key(tmp_path, section):
    environ = {
        f"LUNGWATCH_{section}MODALITIES": "CR, DX",
        f"LUNGWATCH_{section}REJECT_LATERAL": "false",
        "LUNGWATCH_RESCAN_S": "0.25",
        "LUNGWATCH_RETENTION_DONE_DAYS": "30",
        "LUNGWATCH_RETAIN_DONE_GB": "1.5",
    }
    config = load_config(home=tmp_path, environ=environ)
    assert config.modalities == ("CR", "DX")
    assert config.reject_lateral is False
    assert config.rescan_s == 0.25
    assert config.read_policy.modalities == frozenset({"CR", "DX"})
    assert (config.retain_done_days, config.retain_done_gb) == (30, 1.5)


def test_one_key_under_two_variables_is_refused(tmp_path):
    environ = {"LUNGWATCH_PIPELINE_BATCH_SIZE": "5", "LUNGWATCH_BATCH_SIZE": "5"}
    with pytest.raises(ConfigError, match="LUNGWATCH_BATCH_SIZE"):
        load_config(home=tmp_path, environ=environ)


def test_each_old_name_in_the_file_is_read_with_one_warning_that_says_where_it_is_now(
    tmp_path, caplog
):
    file = write(
        tmp_path, 'pacs_port = 104\nbatch_size = 3\nmodel = "m"\n[pacs]\nsr = "comprehensive"'
    )
    with caplog.at_level(logging.WARNING, logger="lungwatch"):
        config = load_config(file, home=tmp_path, environ={})
    assert (config.pacs_port, config.batch_size, config.model) == (104, 3, "m")
    assert config.pacs_sr == "comprehensive"
    assert [
        record.event_fields["now"]
        for record in caplog.records
        if record.event_fields["action"] == "config_key_moved"
    ] == ["[pacs] port", "[pipeline] batch_size"]


def test_the_sample_with_every_key_uncommented_says_the_defaults(tmp_path):
    keys = [line.removeprefix("#") for line in sample().splitlines() if not line.startswith("# ")]
    config = load_config(write(tmp_path, "\n".join(keys)), home=tmp_path, environ={})
    assert config == load_config(home=tmp_path, environ={})


def test_every_key_is_read_under_its_old_name(tmp_path):
    old = "".join(f"{key.attribute} = {key.default}\n" for key in KEYS.values())
    config = load_config(write(tmp_path, old), home=tmp_path, environ={})
    assert config == load_config(home=tmp_path, environ={})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("batchsize = 3", "'batchsize'.*did you mean pipeline.batch_size"),
        ("[pipeline]\nbatchsize = 3", "'pipeline.batchsize'.*did you mean pipeline.batch_size"),
        ('[pipeline]\nbatch_size = "3"', "pipeline.batch_size"),
        ('batch_size = "3"', "pipeline.batch_size"),
        ("[pipeline]\nbatch_size = true", "pipeline.batch_size"),
        ("[pipeline]\nbatch_size = 0", "pipeline.batch_size.*1"),
        ("[pipeline]\ndrain_s = inf", "pipeline.drain_s"),
        ('[intake]\nobserver = "kqueue"', "intake.observer.*polling"),
        ('[radiographs]\nmodalities = "CR"', "radiographs.modalities"),
        ("[radiographs]\nmodalities = [1]", "radiographs.modalities"),
        ('home = ""', "'home'"),
        ("home = 3", "'home'"),
        ("pacs = 3", "'pacs'"),
        ("[daemon]\nbatch_size = 3", "'daemon'"),
        ("batch_size = 3\n[pipeline]\nbatch_size = 3", "'pipeline.batch_size' is set twice"),
        ("batch_size = ", "TOML"),
    ],
)
def test_a_bad_key_or_value_in_the_file_is_named(tmp_path, content, named):
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(write(tmp_path, content), environ={})
    assert "\n" not in str(caught.value)
    assert "c.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LUNGWATCH_BATCHSIZE", "3"),
        ("LUNGWATCH_BATCH_SIZE", "many"),
        ("LUNGWATCH_REJECT_LATERAL", "perhaps"),
        ("LUNGWATCH_PIPELINE_MAX_ATTEMPTS", "-1"),
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
    with pytest.raises(ValidationError):
        Config().batch_size = 1


def test_a_configuration_made_in_code_reads_no_environment(monkeypatch):
    monkeypatch.setenv("LUNGWATCH_BATCH_SIZE", "3")
    assert Config().batch_size == 8


def test_a_home_that_no_url_can_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="home"):
        load_config(home=tmp_path / "what?", environ={})


def test_a_file_that_is_a_pipe_is_read(tmp_path):
    """As of `--config <(…)` in a shell."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("[pipeline]\nbatch_size = 3\n",))
    writer.start()
    assert load_config(pipe, home=tmp_path, environ={}).batch_size == 3
    writer.join()

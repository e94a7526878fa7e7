"""A password comes from a file, and is seen nowhere else."""

import pytest
from sqlalchemy import make_url

from lungwatch.daemon.configfile import load_config
from lungwatch.db.maintenance import open_database
from lungwatch.errors import ConfigError, LungwatchError

URL = "postgresql://screen@db.example/lungwatch"


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "password"
    file.write_text("s3cr:t/@ \n")
    return file


def load(home, file, url=URL):
    environ = {"LUNGWATCH_DATABASE_URL": url, "LUNGWATCH_DATABASE_PASSWORD_FILE": str(file)}
    return load_config(home=home, environ=environ)


def test_the_url_gets_the_password_whatever_its_characters(tmp_path, secret):
    """It comes out of the URL as it stands in the file, but for the line's end."""
    config = load(tmp_path, secret)
    assert make_url(config.database_url).password == "s3cr:t/@ "
    assert make_url(config.database_url).host == "db.example"


def test_the_configuration_does_not_show_it(tmp_path, secret):
    """Neither does whoever prints the configuration."""
    assert "s3cr" not in repr(load(tmp_path, secret))


@pytest.mark.parametrize(
    ("url", "content", "said"),
    [
        (URL, None, "cannot be read: No such file"),
        (URL, b"", "is empty"),
        (URL, b"\xff", "not UTF-8"),
        ("sqlite:////var/lib/x.db", b"secret", "no password"),
        ("postgresql://screen:known@db/x", b"secret", "holds a password already"),
    ],
)
def test_what_makes_no_sense_is_refused_without_the_secret(tmp_path, url, content, said):
    """One line that says what is wrong and holds no password."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        load(tmp_path, file, url)
    assert "secret" not in str(refused.value)
    assert "known" not in str(refused.value)


def test_a_server_out_of_reach_is_told_without_it(tmp_path, secret):
    """By the very call that the daemon starts with."""
    pytest.importorskip("psycopg", reason="the extra 'postgres' is not installed")
    config = load(tmp_path, secret, f"postgresql://screen@/lungwatch?host={tmp_path}/nowhere")
    with pytest.raises(LungwatchError) as refused:
        open_database(config.database_url)
    for shown in ("s3cr", "s3cr%3At"):
        assert shown not in str(refused.value)

"""A destination is understood, or the start says which one is not."""

from pathlib import Path

import pytest

from lungwatch.daemon.config import parse_destination
from lungwatch.daemon.configfile import load_config
from lungwatch.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "ae_title", "host", "port", "tls"),
    [
        ("ORTHANC@localhost:4242", "ORTHANC", "localhost", 4242, False),
        ("ARCHIVE@10.0.0.7:104+tls", "ARCHIVE", "10.0.0.7", 104, True),
        ("MY PACS@pacs.example.org:11112", "MY PACS", "pacs.example.org", 11112, False),
        ("A@B@host:1", "A@B", "host", 1, False),
        ("PACS@[::1]:65535", "PACS", "::1", 65535, False),
    ],
)
def test_what_is_a_destination(text: str, ae_title: str, host: str, port: int, tls: bool) -> None:
    found = parse_destination(text)
    assert (found.ae_title, found.host, found.port, found.tls) == (ae_title, host, port, tls)
    assert found.name == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ORTHANC",
        "ORTHANC@localhost",
        "@localhost:104",
        "   @localhost:104",
        "ORTHANC@:104",
        "ORTHANC@localhost:0",
        "ORTHANC@localhost:65536",
        "ORTHANC@localhost:x",
        "ORTHANC@local host:104",
        "SEVENTEEN-LETTERS@localhost:104",
        "BACK\\SLASH@localhost:104",
        "ORTHANC@localhost:104+ssl",
        "ORTHANC@::1:104",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no destination"):
        parse_destination(text)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('pacs_destinations = ["x"]', r"'pacs_destinations': 'x' is no destination"),
        ('pacs_destinations = ["A@b:1", "A@b:1"]', "'pacs_destinations': one is named twice"),
        ('pacs_ae_title = "LONGER-THAN-SIXTEEN"', "'pacs_ae_title'.*16 characters"),
        ('pacs_send = ["gsps"]', "'pacs_send'.*is not of sc and sr"),
        ("pacs_send = []", "'pacs_send'"),
        ('pacs_sr = "basic-text"', "'pacs_sr'.*comprehensive-3d or comprehensive"),
        ("pacs_deidentify = true", "'pacs_deidentify' needs 'pacs_deidentify_key'"),
        ("pacs_retry_s = 60\npacs_retry_max_s = 30", "'pacs_retry_max_s' is less"),
        ("pacs_retry_s = 0", "'pacs_retry_s'.*not within"),
    ],
)
def test_a_bad_setting_stops_the_start_with_its_name(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "lungwatch.toml").write_text(lines)
    with pytest.raises(ConfigError, match=says):
        load_config(home=tmp_path, environ={})


def test_good_settings_are_read_from_the_environment_too(tmp_path: Path) -> None:
    config = load_config(
        home=tmp_path,
        environ={
            "LUNGWATCH_PACS_DESTINATIONS": "A@b:1, C@d:2+tls",
            "LUNGWATCH_PACS_SEND": "sr",
            "LUNGWATCH_PACS_SR": "comprehensive",
        },
    )
    assert config.pacs_destinations == ("A@b:1", "C@d:2+tls")
    assert (config.pacs_send, config.pacs_sr) == (("sr",), "comprehensive")

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
        ('destinations = ["x"]', r"'pacs.destinations': 'x' is no destination"),
        ('destinations = ["A@b:1", "A@b:1"]', "'pacs.destinations': one is listed twice"),
        ('ae_title = "LONGER-THAN-SIXTEEN"', "'pacs.ae_title'.*16 characters"),
        ('send = ["gsps"]', "'pacs.send'.*is not a list of sc and sr"),
        ("send = []", "'pacs.send'"),
        ('sr = "basic-text"', "'pacs.sr'.*'comprehensive-3d' or 'comprehensive'"),
        ("deidentify = true", "'pacs.deidentify' needs 'pacs.deidentify_key'"),
        ("retry_s = 60\nretry_max_s = 30", "'pacs.retry_max_s' is less"),
        ("retry_s = 0", "'pacs.retry_s'.*greater than or equal to 0.1"),
    ],
)
def test_a_bad_setting_stops_the_start_with_its_name(tmp_path: Path, lines: str, says: str) -> None:
    (tmp_path / "lungwatch.toml").write_text(f"[pacs]\n{lines}")
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

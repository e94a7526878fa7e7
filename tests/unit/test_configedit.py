"""One key of the configuration file is set; the rest stays, byte by byte."""

import tomllib

import pytest

from lungwatch.daemon.configfile import set_text
from lungwatch.errors import ConfigError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, 'model = "new-1.0.0"\n'),
        ("", 'model = "new-1.0.0"\n'),
        ("# ours\ngate = 'flag'", "# ours\ngate = 'flag'\nmodel = \"new-1.0.0\"\n"),
        (
            '# first\nmodel="old" # why\r\ngate = "flag"\r\n',
            '# first\nmodel = "new-1.0.0" # why\r\ngate = "flag"\r\n',
        ),
        ("gate = 'flag'\r\n", "gate = 'flag'\r\nmodel = \"new-1.0.0\"\r\n"),
        (
            'note = """\nmodel = "not this"\n"""\nmodel = \'old\'\n',
            'note = """\nmodel = "not this"\n"""\nmodel = "new-1.0.0"\n',
        ),
        ("[table]\nmodel = 'x'\n", "model = \"new-1.0.0\"\n[table]\nmodel = 'x'\n"),
    ],
)
def test_the_rest_stays_as_it_is(tmp_path, before, after):
    path = tmp_path / "lungwatch.toml"
    if before is not None:
        path.write_bytes(before.encode())
        path.chmod(0o640)
    set_text(path, "model", "new-1.0.0")
    assert path.read_bytes().decode() == after
    assert tomllib.loads(after)["model"] == "new-1.0.0"
    assert before is None or path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_with_quotes_comes_back(tmp_path):
    path = tmp_path / "lungwatch.toml"
    set_text(path, "model", 'a "b" \\ é')
    assert tomllib.loads(path.read_text())["model"] == 'a "b" \\ é'


def test_a_link_stays_one(tmp_path):
    target = tmp_path / "real.toml"
    target.write_text("gate = 'flag'\n")
    (tmp_path / "lungwatch.toml").symlink_to(target)
    set_text(tmp_path / "lungwatch.toml", "model", "new")
    assert (tmp_path / "lungwatch.toml").is_symlink()
    assert tomllib.loads(target.read_text()) == {"gate": "flag", "model": "new"}


@pytest.mark.parametrize("text", ['"model" = "old"\n', "model = '''old'''\n"])
def test_a_form_that_is_not_understood_is_left_alone(tmp_path, text):
    path = tmp_path / "lungwatch.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="in a form that is not changed here"):
        set_text(path, "model", "new")
    assert path.read_text() == text


def test_what_is_no_toml_is_left_alone(tmp_path):
    path = tmp_path / "lungwatch.toml"
    path.write_text("model =\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        set_text(path, "model", "new")

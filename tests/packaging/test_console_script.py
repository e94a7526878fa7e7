"""The installed command, as a user calls it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY, __version__
from lungwatch.cli.main import main
from tests.support.commands import walk, words

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("lungwatch")


def lungwatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def test_help_says_what_it_is_and_that_it_is_for_research_only():
    done = lungwatch("--help")
    assert done.returncode == 0
    assert RESEARCH_USE_ONLY in done.stdout
    assert not done.stderr


def test_the_version_is_the_one_of_pyproject():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == version
    assert version in lungwatch("--version").stdout


def test_an_unknown_command_is_a_usage_error():
    done = lungwatch("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


@pytest.mark.parametrize("context", list(walk()), ids=lambda context: context.command_path)
def test_every_command_explains_itself_and_every_option(context):
    for option in ("-h", "--help"):
        done = CliRunner().invoke(main, [*words(context), option])
        assert done.exit_code == 0, done.output
        assert done.output.startswith("Usage:")
    assert context.command.help, "no description"
    undescribed = [
        parameter.name
        for parameter in context.command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert not undescribed

"""The configuration's page names every key and its default."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

from lungwatch.daemon.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_key_is_documented_and_no_other():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert documented == {field.name for field in fields(Config)}


def test_the_table_is_what_the_code_says():
    """After a change: python docs/configuration.py."""
    generator = runpy.run_path(str(PAGE.with_suffix(".py")))
    text = PAGE.read_text(encoding="utf-8")
    assert generator["rendered"](text) == text

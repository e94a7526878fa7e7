"""The configuration's page and the sample file are what the code says."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_page_and_sample_are_generated_from_the_keys():
    """After a change: python docs/configuration.py."""
    generator = runpy.run_path(str(DOCS / "configuration.py"))
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert generator["rendered"](text) == text
    assert generator["sample"]() == (DOCS / "lungwatch.sample.toml").read_text(encoding="utf-8")

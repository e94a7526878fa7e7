"""Writes configuration.md's tables and lungwatch.sample.toml: python docs/configuration.py."""

from pathlib import Path

from lungwatch.daemon.configfile import reference, sample

PAGE = Path(__file__).with_suffix(".md")
SAMPLE = Path(__file__).with_name("lungwatch.sample.toml")
BEGIN = "<!-- From here on written by configuration.py. -->\n\n"


def rendered(page: str) -> str:
    """Return the page with its tables as the code has them."""
    return page.partition(BEGIN)[0] + BEGIN + reference()


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SAMPLE.write_text(sample(), encoding="utf-8")

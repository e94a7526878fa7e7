"""The table of flags is that of the code, and every flag has a meaning and a rule."""

import re
import runpy
from pathlib import Path

from lungwatch.daemon.config import Config
from lungwatch.errors import FLAGS, GATE_REASONS, Flag

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def rows(page: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]


def test_the_table_is_what_the_code_says():
    """After a change: python docs/flags.py."""
    generator = runpy.run_path(str(PAGE.with_suffix(".py")))
    text = PAGE.read_text(encoding="utf-8")
    assert [row[:3] for row in rows(generator["rendered"](text))] == [row[:3] for row in rows(text)]


def test_the_tests_on_the_page_name_the_flag():
    tests = PAGE.parents[1] / "tests"
    sources = {path.name: path.read_text("utf-8") for path in tests.rglob("test_*.py")}
    for flag, *_, named in rows(PAGE.read_text(encoding="utf-8"))[: len(FLAGS)]:
        code = flag.strip("`")
        for name in re.findall(r"`(test_[a-z_]+\.py)`", named):
            assert re.search(rf"{Flag(code).name}|{code}", sources[name]), (code, name)


def test_every_flag_has_a_meaning_and_a_rule_in_the_lists_order():
    generator = runpy.run_path(str(PAGE.with_suffix(".py")))
    assert tuple(FLAGS) == tuple(Flag)
    assert set(Flag) <= set(generator["RULES"])


def test_every_reason_of_the_gate_can_be_a_flag_and_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for reason in GATE_REASONS:
        assert Flag(reason.value) in FLAGS
        assert f"`{reason}`" in text
    assert f"`{Config().gate}` (default)" in text

"""The table of flags is that of the code, and every flag has a meaning and a rule."""

import runpy
from pathlib import Path

from lungwatch.daemon.config import Config
from lungwatch.flags import FLAGS, Flag
from lungwatch.gate import GATE_REASONS

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_table_is_what_the_code_says():
    """After a change: python docs/flags.py."""
    generator = runpy.run_path(str(PAGE.with_suffix(".py")))
    text = PAGE.read_text(encoding="utf-8")
    assert generator["rendered"](text) == text


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

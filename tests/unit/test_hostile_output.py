"""Names and values from outside, in what the commands print: nothing steers what reads it."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungwatch.cli.output import cell_text, to_csv, to_json
from lungwatch.errors import visible

FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
STEERING = "\x1b\x07\x00\x9b\x85\u202e\u2066\u200b\u200d\ufeff\u2028\u2029\udcff\ud800\r\n\t\x7f"
ANY_TEXT = st.text(st.one_of(st.sampled_from(STEERING + "=+-@,;\"'"), st.characters()))
HOSTILE = "a\x1b]0;x\x07\x9b31m\u202egnp.\n\udcff\U0001f600"


def assert_harmless(text):
    """Valid UTF-8 in which only the line feed is not shown as itself."""
    text.encode()
    unseen = {char for char in text if not char.isprintable() and char != "\n"}
    assert {char for char in unseen if unicodedata.category(char) != "Zs"} == set()


def test_json_holds_every_value_and_nothing_that_steers_a_terminal():
    text = to_json({HOSTILE: [HOSTILE, "Größe"]})
    assert json.loads(text) == {HOSTILE: [HOSTILE, "Größe"]}
    assert all(char == "\n" or char.isprintable() for char in text)
    assert text.encode()
    assert "Größe" in text


def test_a_table_cell_is_one_printable_line():
    text = cell_text(HOSTILE)
    assert text.isprintable()
    assert text.encode()


@pytest.mark.parametrize("start", list("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"))
def test_no_csv_cell_is_a_formula(start):
    for value in (f"{start}1+1", Path(f"{start}1+1"), [f"{start}1+1", "x"]):
        (row,) = csv.DictReader(io.StringIO(to_csv(["name"], [{"name": value}]), newline=""))
        assert row["name"].startswith(f"'{visible(start)}1+1")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(text=ANY_TEXT)
def test_whatever_a_text_holds_it_stays_one_harmless_line(text):
    table = to_csv(["name", "number"], [{"name": text, "number": -1.5}])
    assert table.count("\n") == 2
    assert_harmless(table)
    (row,) = csv.DictReader(io.StringIO(table, newline=""))
    assert not row["name"].startswith(FORMULA_STARTS)
    assert row["name"].removeprefix("'") == visible(text).removeprefix("'")
    assert row["number"] == "-1.5"
    assert_harmless(cell_text(text))
    assert "\n" not in cell_text(text)
    assert json.loads(to_json({text: text})) == {text: text}
    assert_harmless(to_json([text]))


@pytest.mark.parametrize("text", ["Größe", "胸部\u3000正面.dcm", "a\u00a0b", "\U0001f600", "a\\b"])
def test_what_is_plain_text_in_any_script_is_left_as_it_is(text):
    assert visible(text) == text
    assert to_csv(["name"], [{"name": text}]).splitlines()[1] == f'"{text}"'


def test_a_negative_number_stays_one():
    assert to_csv(["logit"], [{"logit": -1.5}]).splitlines()[1] == "-1.5"

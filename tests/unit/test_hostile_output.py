"""Names and values from outside, in what the commands print: nothing steers what reads it."""

import csv
import io
import json

import pytest

from lungwatch.cli.output import cell_text, to_csv, to_json

HOSTILE = "a\x1b]0;x\x07\x9b31m\u202egnp.\n\udcff\U0001f600"


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
    (row,) = csv.DictReader(io.StringIO(to_csv(["name"], [{"name": start + "1+1"}]), newline=""))
    assert row["name"] == f"'{start}1+1"


def test_a_negative_number_stays_one():
    assert to_csv(["logit"], [{"logit": -1.5}]).splitlines()[1] == "-1.5"

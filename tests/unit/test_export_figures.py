"""Tables measured elsewhere reach the card as given, and anything else is refused by its place."""

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from lungwatch.bundle import read_bundle
from lungwatch.errors import ConfigError
from lungwatch.export.card import FIGURES, of_data_sets, read_figures, write_card
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.scorers import OnnxScorer

SHIPPED = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT

TABLES = {
    "Leave one source out": {
        "armiro": {"ROC-AUC": 0.91234, "images": 502},
        "a|b": {"ROC-AUC": 1.0},
    },
    "Lungs": {"blacked out": {"ROC-AUC": 0.61}},
}


def written(tmp_path, text):
    file = tmp_path / "figures.json"
    file.write_text(text, encoding="utf-8")
    return file


def test_tables_are_read_as_they_are(tmp_path):
    assert read_figures(written(tmp_path, json.dumps(TABLES))) == TABLES


def test_each_table_stands_under_its_title_with_gaps_left_empty():
    before = OnnxScorer(read_bundle(SHIPPED).model).contract
    text = write_card(replace(before, metrics={FIGURES: TABLES}))
    assert "### Leave one source out\n\n|  | ROC-AUC | images |\n| --- | --- | --- |" in text
    assert "| armiro | 0.912 | 502 |" in text
    assert r"| a\|b | 1.000 |  |" in text
    assert text.index("### Lungs") > text.index("armiro")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "holds no tables"),
        ("{}", "holds no tables"),
        ('{"Lungs": 1}', "Lungs holds no tables"),
        ('{"Lungs": {"row": {}}}', "Lungs: row holds no tables"),
        ('{"Lungs": {"row": {"col": "0.9"}}}', "Lungs: row: col is '0.9', not a number"),
        ('{"Lungs": {"row": {"col": true}}}', "not a number"),
        ('{"Lungs": {"row": {"col": NaN}}}', "not a number"),
        ('{"a\\nb": {"row": {"col": 1}}}', "no name"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_by_its_place(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_figures(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_figures(tmp_path / "nowhere.json")


def test_tables_from_elsewhere_are_told_from_data_sets():
    assert of_data_sets({"some/test": 1, FIGURES: TABLES}) == {"some/test": 1}

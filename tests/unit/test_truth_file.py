"""Truth files as sites write them, and what is said of those that cannot be used."""

import pytest

from lungwatch.training.evaluation.calibration import TruthFileError, nearest, read_truths


def read(tmp_path, text, *, encoding="utf-8"):
    path = tmp_path / "truth.csv"
    path.write_bytes(text.encode(encoding))
    return read_truths(path)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("sha256,truth", "sha256"),
        ("SOP Instance UID;Diagnosis", "sop_uid"),
        ("id\ttruth", "id"),
        ("Accession Number,PCR", "accession"),
        ("accession,label", "accession"),
    ],
)
def test_columns_go_by_their_usual_names(tmp_path, header, kind):
    separator = max(",;\t", key=header.count)
    truths = read(tmp_path, f"\ufeff{header}\r\na1{separator}COVID\r\nb2{separator}Other\r\n")
    assert (truths.kind, truths.covid) == (kind, {"a1": True, "b2": False})


@pytest.mark.parametrize("word", ["COVID", "covid-19", "Positive", "1", "yes", " covid "])
def test_spellings_of_covid(tmp_path, word):
    assert read(tmp_path, f"id,truth\n7,{word}\n").covid == {"7": True}


@pytest.mark.parametrize("word", ["other", "NEGATIVE", "normal", "0", "non_covid", "No finding"])
def test_spellings_of_something_else(tmp_path, word):
    assert read(tmp_path, f"id,truth\n7,{word}\n").covid == {"7": False}


def test_what_is_not_understood_is_counted_by_word(tmp_path):
    truths = read(tmp_path, "id,truth\n1,covid\n2,perhaps\n3,Perhaps\n4,\n,covid\n5,other\n")
    assert truths.covid == {"1": True, "5": False}
    assert truths.unknown_labels == {"perhaps": 2}


def test_a_case_with_both_truths_is_left_out(tmp_path):
    truths = read(tmp_path, "id,truth\n1,covid\n1,other\n2,covid\n2,positive\n")
    assert truths.covid == {"2": True}
    assert truths.contradictory == ("1",)


def test_a_models_own_answer_is_no_truth(tmp_path):
    """`results export` has a column `label`, which is what is to be calibrated."""
    with pytest.raises(TruthFileError, match="'label' beside 'probability' is the model's own"):
        read(tmp_path, "id,sha256,label,probability\n1,ab,COVID,0.9\n")
    assert read(tmp_path, "sha256,label,probability,truth\n'ab,COVID,0.9,other\n").covid == {
        "ab": False
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("name,truth\nx,covid\n", "no column of identifiers.*'name', 'truth'"),
        ("id,answer\n1,covid\n", "no column 'truth'"),
        ("id,truth\n1,maybe\n2,unclear\n", "no truth that is understood: 'maybe', 'unclear'"),
        ("id,truth\n", "no truth that is understood"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, said):
    with pytest.raises(TruthFileError, match=said):
        read(tmp_path, text)


def test_another_encoding_is_named(tmp_path):
    with pytest.raises(TruthFileError, match="is not UTF-8"):
        read(tmp_path, "id,truth\nÄ,covid\n", encoding="latin-1")


def test_the_nearest_are_named():
    assert nearest({"ACC-1": True}, {"ACC1": 0, "zzz": 0}) == "; the nearest to 'ACC-1': ACC1"
    assert nearest({"ACC-1": True}, {"zzz": 0}) == ""

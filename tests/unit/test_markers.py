"""Markers follow from a test's folder and source, and what `-m` leaves out is not imported."""

import pytest

from tests.support.markers import is_left_out, of_module


@pytest.fixture
def write(tmp_path):
    def module(source, folder="unit", name="test_x.py"):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        return path

    return module


# Below the first function: they would mark this very module.
IN_MODULE = 'import pytest\npytest.importorskip("tensorflow")\n\ndef test_it():\n    pass\n'
IN_TEST = 'import pytest\n\ndef test_it():\n    pytest.importorskip("tensorflow")\n'


def test_what_a_module_asks_for_marks_all_of_it_and_what_a_test_asks_for_does_not(write):
    assert of_module(write(IN_MODULE)) == {"tensorflow"}
    assert of_module(write(IN_TEST)) == set()


def test_every_acceptance_test_is_slow(write):
    assert of_module(write(IN_TEST, "acceptance")) == {"slow"}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("not slow and not tensorflow", True),
        ("not tensorflow", True),
        ("not slow", False),
        ("tensorflow", False),
        ("postgres or not tensorflow", False),
        ("", False),
    ],
)
def test_a_module_is_left_out_only_if_none_of_its_tests_can_be_chosen(write, expression, expected):
    assert is_left_out(write(IN_MODULE), expression) is expected


def test_no_other_file_is_left_out(write):
    assert not is_left_out(write(IN_MODULE, name="conftest.py"), "not tensorflow")

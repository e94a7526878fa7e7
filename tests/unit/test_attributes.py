"""Attributes: documented as they are declared; instants are one moment in UTC, or none."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom import config
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileDataset

from lungwatch.attributes import ATTRIBUTES, Attribute, checked_instant, meta_from_json
from lungwatch.imaging.radiograph import _stated

DOCUMENT = Path(__file__).parents[2] / "docs/dicom-reading.md"
STUDY = Attribute(keywords=("StudyDate", "StudyTime"), kind="instant")


def instant(date, moment, zone=None):
    dataset = FileDataset("x", {})
    with config.disable_value_validation():
        dataset.StudyDate, dataset.StudyTime = date, moment
        if zone is not None:
            dataset.TimezoneOffsetFromUTC = zone
    return _stated(dataset, STUDY)


@pytest.mark.parametrize(
    ("stated", "utc"),
    [
        (("20140131", "101500", "+0100"), datetime(2014, 1, 31, 9, 15, tzinfo=UTC)),
        (("20140131", "2315", "-0500"), datetime(2014, 2, 1, 4, 15, tzinfo=UTC)),
        (("20140131", "101500.25", "+0000"), datetime(2014, 1, 31, 10, 15, 0, 250000, tzinfo=UTC)),
        (("20140131", "101500", "nowhere"), None),
        (("20140131", "", "+0100"), None),
        (("", "101500", "+0100"), None),
        (("20141331", "101500", "+0100"), None),
        (("20140131", "996199", "+0100"), None),
        # No database of another zone, and no UTC, has these.
        (("00010101", "000000", "+1400"), None),
        (("99991231", "235959", "-1200"), None),
    ],
)
def test_date_time_and_zone_are_one_moment_or_none(stated, utc):
    assert instant(*stated) == utc


def test_without_a_zone_it_is_the_machines_own(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-7")
    time.tzset()
    try:
        assert instant("20140131", "101500") == datetime(2014, 1, 31, 3, 15, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["2014-01-31T10:15:00", "0001-01-01T00:00:00+14:00"])
def test_what_cannot_be_stored_is_refused_from_a_decoding_process(text):
    with pytest.raises(ValueError, match="not an instant"):
        checked_instant(datetime.fromisoformat(text))


@pytest.mark.parametrize("value", [2**31, 10**30, -(2**31) - 1])
def test_a_number_that_no_column_can_hold_is_refused_from_a_decoding_process(value):
    with pytest.raises(ValueError, match="rows is out of range"):
        meta_from_json({"rows": value})


def test_a_files_number_that_no_column_can_hold_is_as_none():
    dataset = FileDataset("x", {})
    dataset.add_new("Rows", "IS", "99999999999")
    assert _stated(dataset, ATTRIBUTES["rows"]) == 0


def test_each_attribute_is_documented_with_its_tags_and_its_key():
    found = {}
    for name, source, listed_as in re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| `?(\w*)`? ?\|$", DOCUMENT.read_text(), re.MULTILINE
    ):
        found[name] = (re.findall(r"(\w+) \(([0-9A-F]{4}),([0-9A-F]{4})\)", source), listed_as)
    assert found == {
        name: (
            [
                (keyword, f"{tag >> 16:04X}", f"{tag & 0xFFFF:04X}")
                for keyword in attribute.keywords
                for tag in [tag_for_keyword(keyword)]
            ],
            attribute.listed_as or "",
        )
        for name, attribute in ATTRIBUTES.items()
    }

"""Lungwatch's own objects, recognised whatever a PACS changed in them; no other object is."""

import io

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from lungwatch.daemon.intake.claims import is_own_object
from lungwatch.daemon.pacs.objects import build_objects
from tests.support.results import result_facts

pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
COMPUTED_RADIOGRAPHY = "1.2.840.10008.5.1.4.1.1.1"


@pytest.fixture(params=[None, b"sixteen bytes or more"], ids=["as it is", "de-identified"])
def sent(request, tmp_path, find_testdata):
    """A Secondary Capture and a Structured Report of a result, as bytes."""
    facts = result_facts(tmp_path)
    source = find_testdata("RG1_UNCR.dcm")
    return [item.data for item in build_objects(facts, source, deidentify_key=request.param)]


@pytest.fixture
def is_own(tmp_path):
    """Ask of a data set, or of bytes."""

    def ask(content):
        path = tmp_path / "asked"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save_as(path, enforce_file_format=True)
        return is_own_object(path)

    return ask


def changed(data, syntax=None, **values):
    """A data set as a PACS may have rewritten it; None removes an attribute."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    for keyword, value in values.items():
        if value is None:
            dataset.pop(keyword, None)
        else:
            setattr(dataset, keyword, value)
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


CHANGES = {
    "untouched": {},
    "implicit": {"syntax": ImplicitVRLittleEndian},
    "deflated": {"syntax": DeflatedExplicitVRLittleEndian},
    "other UIDs and patient": {
        "StudyInstanceUID": "1.2.3",
        "PatientID": "other",
        "PatientName": "Other^Name",
        "SpecificCharacterSet": "ISO_IR 100",
    },
    "cleaned by a gateway": {
        "SeriesDescription": None,
        "ImageComments": None,
        "DerivationDescription": None,
    },
    "manufacturer removed": {"Manufacturer": ""},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_own_objects_are_known_again(sent, is_own, change):
    assert [is_own(changed(data, **change)) for data in sent] == [True, True]


def test_one_without_preamble_and_meta_information_is_known_too(sent, is_own):
    for data in sent:
        start = 144 + int.from_bytes(data[140:144], "little")
        assert is_own(data[start:])


def test_no_other_object_is_taken_for_one(sent, is_own, find_testdata):
    """By its class, by its maker; and damaged bytes are no reason to stop."""
    strange = {
        "Manufacturer": "Somebody Else",
        "SeriesDescription": "captures of lungwatch",
        "ImageComments": "for research",
        "DerivationDescription": "lungwatch",
    }
    for data in sent:
        assert not is_own(changed(data, SOPClassUID=COMPUTED_RADIOGRAPHY))
        assert not is_own(changed(data, **strange))
        assert not is_own(data[:300])
        assert not is_own(b"\0" * 128 + b"DICM" + b"lungwatch" * 1000)
    x_ray = pydicom.dcmread(find_testdata("RG1_UNCR.dcm"))
    x_ray.Manufacturer = "lungwatch"
    assert not is_own(x_ray)
    assert not is_own(b"\x89PNG\r\n\x1a\n lungwatch")
    assert not is_own(b"")

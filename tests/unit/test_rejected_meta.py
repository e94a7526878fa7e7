"""A refused file is still found by what it says of its patient and study."""

from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.reader import read_radiograph


def test_a_refused_dicom_file_keeps_its_attributes_for_the_database():
    path = Path(str(get_testdata_file("RG3_UNCR.dcm")))
    with pytest.raises(FileRejected) as caught:
        read_radiograph(path)
    assert caught.value.reason is Reason.WRONG_BODY_PART
    meta = caught.value.meta
    assert meta is not None
    assert meta.body_part == "EXTREMITY"
    assert meta.study_uid is not None
    assert str(meta.patient_id) not in str(caught.value)


def test_a_refused_picture_has_none(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no picture")
    with pytest.raises(FileRejected) as caught:
        read_radiograph(path)
    assert caught.value.meta is None

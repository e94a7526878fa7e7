"""Odd sources, and objects that were broken on purpose: valid, or refused with the reason."""

import copy
import io
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lungwatch.daemon.pacs.objects import (
    _NOT_EMPTY,
    _OF_KIND,
    InvalidObjectError,
    build_objects,
    validate,
)
from lungwatch.daemon.pacs.report import MANDATORY_ITEMS
from lungwatch.daemon.pacs.source import ResultFacts, UnusableSourceError, read_source

pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
SECRET = b"sixteen bytes or more"
OF_FACTS = (
    *("122157", "122411", "121106", "121077", "111001", "111003"),
    *("DECISION", "UNCERTAINFROM", "UNCERTAINTO", "121071"),
)


@pytest.fixture
def facts(tmp_path):
    """A result whose overlay has an odd number of bytes."""
    overlay = tmp_path / "overlay.png"
    cv2.imwrite(str(overlay), np.full((41, 31, 3), 90, dtype=np.uint8))
    return ResultFacts(
        sha256="ab" * 32,
        label="COVID",
        probability=0.9123456789,
        threshold=1 / 3,
        uncertain_from=0.3,
        uncertain_to=0.4,
        flags=("empty_map", "a_flag_longer_than_sixteen"),
        model_name="guided",
        model_version="0.1.0",
        model_sha256="cd" * 32,
        finished_at=datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
        overlay=overlay,
    )


def minimal(folder, **values):
    """A DX with nothing but its UIDs, and what is given."""
    dataset = Dataset()
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    with pydicom.config.disable_value_validation():
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path, enforce_file_format=True)
    return path


ODD = {
    "MONOCHROME1": {"Modality": "CR", "PhotometricInterpretation": "MONOCHROME1"},
    "long": {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": "Ä" + "A" * 200,
        "StudyDescription": "ß" * 99,
        "StudyID": "S" * 40,
    },
    "malformed": {
        "PatientSex": "male?",
        "PatientBirthDate": "1.1.70",
        "StudyDate": "99999999",
        "StudyTime": "noon",
        "PatientOrientation": ["left"],
        "Laterality": "X",
    },
    "unknown character set": {"SpecificCharacterSet": "KLINGON", "PatientName": "K^Worf"},
}


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's package 'dicom3tools'")
@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
@pytest.mark.parametrize("secret", [None, SECRET], ids=["as it is", "de-identified"])
def test_dicom3tools_finds_no_error_whatever_the_source_says(facts, tmp_path, values, secret):
    for built in build_objects(facts, minimal(tmp_path, **values), deidentify_key=secret):
        path = tmp_path / "object.dcm"
        path.write_bytes(built.data)
        checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        said = (checked.stdout + checked.stderr).splitlines()
        assert said
        assert [line for line in said if line.startswith("Error")] == [], built.kind


@pytest.mark.parametrize("secret", [None, SECRET], ids=["as it is", "de-identified"])
def test_dates_are_of_the_record_never_of_the_clock(facts, tmp_path, secret):
    """No date or time but the record's, which a de-identified object does not hold either."""
    recorded = facts.finished_at.astimezone().strftime("%Y%m%d")
    for built in build_objects(facts, minimal(tmp_path), deidentify_key=secret):
        days = {
            str(element.value)[:8]
            for element in built.dataset.iterall()
            if element.VR in ("DA", "DT") and element.value
        }
        assert days == {recorded if secret is None else "19000101"}


def test_names_of_another_script_arrive_unharmed(facts, tmp_path):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    path = minimal(
        tmp_path, SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name, PatientID="日本"
    )
    for built in build_objects(facts, path):
        read = pydicom.dcmread(io.BytesIO(built.data))
        assert (str(read.PatientName), read.PatientID) == (name, "日本")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyInstanceUID", "1.2.x"),
        ("SeriesInstanceUID", "1." + "2" * 70),
        ("SOPInstanceUID", "../1.2.3"),
        ("SOPClassUID", "1.02.3"),
    ],
)
def test_a_source_that_cannot_be_answered_is_refused_by_attribute_not_value(
    facts, tmp_path, keyword, value
):
    with pytest.raises(UnusableSourceError, match=keyword) as refusal:
        build_objects(facts, minimal(tmp_path, **{keyword: value}))
    assert value not in str(refusal.value)


def plain(facts, path, kind):
    """An object as a receiver reads it, and the source that it is validated against."""
    (built,) = build_objects(facts, path, (kind,))
    dataset, study = pydicom.dcmread(io.BytesIO(built.data)), read_source(path).attributes
    validate(dataset, kind, facts, study)
    return dataset, study


@pytest.mark.parametrize("kind", ["sc", "sr"])
def test_any_mandatory_attribute_that_is_empty_is_caught(facts, tmp_path, kind):
    dataset, study = plain(facts, minimal(tmp_path), kind)
    for keyword in (*_NOT_EMPTY, *_OF_KIND[kind]):
        broken = copy.deepcopy(dataset)
        setattr(broken, keyword, b"" if keyword == "PixelData" else None)
        with pytest.raises(InvalidObjectError, match=keyword):
            validate(broken, kind, facts, study)


@pytest.mark.parametrize("kind", ["sc", "sr"])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"),
        ("PatientName", "An^Other"),
        ("AccessionNumber", "17 characters too"),
        ("Manufacturer", "m" * 65),
        ("StudyDate", "20260231x"),
        ("PatientSex", "male"),
    ],
)
def test_a_wrong_value_is_caught(facts, tmp_path, kind, keyword, value):
    dataset, study = plain(facts, minimal(tmp_path), kind)
    with pydicom.config.disable_value_validation():
        setattr(dataset, keyword, value)
    with pytest.raises(InvalidObjectError):
        validate(dataset, kind, facts, study)


SPOILT_PICTURES = {
    "another height": lambda image: setattr(image, "Rows", image.Rows + 1),
    "another depth": lambda image: setattr(image, "BitsStored", 12),
    "grey": lambda image: setattr(image, "PhotometricInterpretation", "MONOCHROME2"),
    "two sources": lambda image: image.SourceImageSequence.append(Dataset()),
    "no meta UID": lambda image: delattr(image.file_meta, "MediaStorageSOPInstanceUID"),
    "no transfer syntax": lambda image: delattr(image.file_meta, "TransferSyntaxUID"),
}


@pytest.mark.parametrize("spoil", SPOILT_PICTURES.values(), ids=SPOILT_PICTURES)
def test_a_wrong_picture_is_caught(facts, tmp_path, spoil):
    dataset, study = plain(facts, minimal(tmp_path), "sc")
    spoil(dataset)
    with pytest.raises(InvalidObjectError):
        validate(dataset, "sc", facts, study)


def cut_out(dataset, code):
    """Remove all content items of a concept, at any depth; return how many there were."""
    removed = 0
    for item in list(dataset.get("ContentSequence") or ()):
        if item.ConceptNameCodeSequence[0].get("CodeValue") == code:
            dataset.ContentSequence.remove(item)
            removed += 1
        else:
            removed += cut_out(item, code)
    return removed


def test_an_overlay_that_is_not_the_recorded_one_is_not_sent(facts, tmp_path):
    source = minimal(tmp_path)
    recorded = replace(facts, overlay_sha256=sha256(facts.overlay.read_bytes()).hexdigest())
    assert build_objects(recorded, source, kinds=("sc",))
    cv2.imwrite(str(facts.overlay), np.full((41, 31, 3), 91, dtype=np.uint8))
    with pytest.raises(InvalidObjectError, match="SHA-256 differs"):
        build_objects(recorded, source, kinds=("sc",))
    assert build_objects(replace(recorded, overlay_sha256=None), source, kinds=("sc",))


@pytest.mark.parametrize("code", [*(code for code, _ in MANDATORY_ITEMS), *OF_FACTS])
def test_a_report_without_any_mandatory_item_is_caught(facts, tmp_path, code):
    dataset, study = plain(facts, minimal(tmp_path), "sr")
    assert cut_out(dataset, code) > 0
    with pytest.raises(InvalidObjectError):
        validate(dataset, "sr", facts, study)


@pytest.mark.parametrize(
    "other",
    [
        {"probability": 0.5},
        {"threshold": 0.5},
        {"uncertain_from": 0.1},
        {"uncertain_to": 0.8},
        {"label": "NEGATIVE"},
        {"model_name": "another"},
        {"model_version": "9"},
    ],
    ids=str,
)
def test_a_report_of_other_facts_is_caught(facts, tmp_path, other):
    dataset, study = plain(facts, minimal(tmp_path), "sr")
    with pytest.raises(InvalidObjectError):
        validate(dataset, "sr", replace(facts, **other), study)


def item_of(dataset, code):
    """The first content item of a concept, and what it lies in."""
    for item in dataset.get("ContentSequence") or ():
        if item.ConceptNameCodeSequence[0].get("CodeValue") == code:
            return item, dataset
        if (found := item_of(item, code)) is not None:
            return found
    return None


@pytest.mark.parametrize("label", ["NEGATIVE", "UNCERTAIN"])
def test_a_finding_that_was_not_made_is_caught(facts, tmp_path, label):
    """Whatever a report says below, a heading "Finding: COVID-19" is taken for one."""
    path = minimal(tmp_path)
    finding, _ = item_of(plain(facts, path, "sr")[0], "121071")
    other = replace(facts, label=label, probability=0.01)
    dataset, study = plain(other, path, "sr")
    item_of(dataset, "COVIDPATTERN")[1].ContentSequence.append(finding)
    with pytest.raises(InvalidObjectError, match="finding"):
        validate(dataset, "sr", other, study)


@pytest.mark.parametrize("said", ["Absent", "Indeterminate"])
def test_a_presence_that_is_not_the_labels_is_caught(facts, tmp_path, said):
    dataset, study = plain(facts, minimal(tmp_path), "sr")
    item, _ = item_of(dataset, "COVIDPATTERN")
    item.ConceptCodeSequence[0].CodeValue = getattr(codes.SCT, said).value
    with pytest.raises(InvalidObjectError, match="presence"):
        validate(dataset, "sr", facts, study)


def test_an_algorithm_named_twice_is_caught(facts, tmp_path):
    dataset, study = plain(facts, minimal(tmp_path), "sr")
    item, group = item_of(dataset, "111001")
    group.ContentSequence.append(copy.deepcopy(item))
    with pytest.raises(InvalidObjectError, match="once"):
        validate(dataset, "sr", facts, study)

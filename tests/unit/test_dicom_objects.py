"""Secondary Capture and Structured Report: valid by dicom3tools, stable, in the source study."""

import html
import io
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.pacs.objects import InvalidObjectError, build_objects, validate
from lungwatch.daemon.pacs.source import (
    ResultFacts,
    UnusableSourceError,
    read_source,
    stable_uid,
)
from lungwatch.db.deliveries import SentReport
from lungwatch.errors import FLAGS, Flag

pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
KEY = b"a secret of this test"


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    overlay = tmp_path_factory.mktemp("overlay") / "overlay.png"
    picture = np.random.default_rng(1).integers(0, 255, (75, 101, 3), dtype=np.uint8)
    assert cv2.imwrite(str(overlay), picture)
    return ResultFacts(
        sha256="ab" * 32,
        label="COVID",
        probability=0.8123456,
        threshold=0.29,
        uncertain_from=0.2,
        uncertain_to=0.4,
        flags=("empty_map",),
        gate_score=0.98765,
        lung_area=0.3123,
        lung_share=0.6241,
        model_name="guided",
        model_version="1.0.0",
        model_sha256="cd" * 32,
        finished_at=datetime(2026, 1, 31, 8, 30, tzinfo=UTC),
        overlay=overlay,
    )


def minimal(path, **values):
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(image, keyword, generate_uid())
    for keyword, value in values.items():
        setattr(image, keyword, value)
    image.save_as(path, enforce_file_format=True)
    return path


SOURCES = {
    "hardly any tags": {},
    "Japanese": {
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
        "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "PatientID": "J1",
        "Modality": "DX",
    },
    "UTF-8": {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Grüß^Jörg", "PatientID": "ü"},
    "damaged values": {
        "PatientID": "7",
        "StudyID": "a very long study identifier",
        "Modality": "CR",
        "ImageLaterality": "X",
    },
}


@pytest.fixture(params=["RG1_UNCR.dcm", "RG1_J2KR.dcm", *SOURCES])
def source(request, tmp_path, find_testdata):
    if request.param in SOURCES:
        return minimal(tmp_path / "source.dcm", **SOURCES[request.param])
    return find_testdata(request.param)


def problems(data, tmp_path):
    """What dicom3tools' validator calls an error."""
    (tmp_path / "object.dcm").write_bytes(data)
    said = subprocess.run(
        ["dciodvfy", tmp_path / "object.dcm"], capture_output=True, text=True, check=False
    )
    return [line for line in said.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's package 'dicom3tools'")
@pytest.mark.parametrize("report_class", ["comprehensive-3d", "comprehensive"])
@pytest.mark.parametrize("key", [None, KEY], ids=["as it is", "de-identified"])
def test_dicom3tools_finds_no_error(facts, source, tmp_path, report_class, key):
    for label in ("COVID", "NEGATIVE", "UNCERTAIN"):
        built = build_objects(
            replace(facts, label=label), source, sr=report_class, deidentify_key=key
        )
        assert [item.kind for item in built] == ["sc", "sr"]
        for item in built:
            assert problems(item.data, tmp_path) == [], item.kind


@pytest.mark.skipif(not shutil.which("dsrdump"), reason="needs Debian's package 'dcmtk'")
def test_dcmtk_prints_what_the_report_says(facts, source, tmp_path):
    (report,) = build_objects(facts, source, kinds=("sr",))
    (tmp_path / "report.dcm").write_bytes(report.data)
    said = subprocess.run(
        ["dsrdump", "+Pl", tmp_path / "report.dcm"], capture_output=True, text=True, check=True
    ).stdout
    for part in (
        '"Finding")=(840539006,SCT,"COVID-19")',
        '"Probability")="0.812" (1,UCUM',
        '"Threshold Value")="0.290" (1,UCUM',
        '"Lower bound of the uncertain band")="0.200" (1,UCUM',
        '"Upper bound of the uncertain band")="0.400" (1,UCUM',
        '"Content gate score")="0.988" (1,UCUM',
        '"Share of the image that is lung")="31.2" (%,UCUM',
        '"Share of the map inside the lungs")="62.4" (%,UCUM',
        '"COVID-19 pattern")=(52101004,SCT,"Present")',
        '"Decision of the algorithm")=(COVID,99LUNGWATCH,"COVID")',
        f'"Trust flag")=(empty_map,99LUNGWATCH,"{FLAGS[Flag.EMPTY_MAP]}")',
        '"Conclusion")="COVID: COVID-19 pattern found."',
        '"Algorithm Name")="guided"',
        '"Algorithm Version")="1.0.0"',
        f'"Comment")="{RESEARCH_USE_ONLY}"',
    ):
        assert part in said, said
    assert said.count('"Algorithm Name"') == 1


# The answers, with what their reports read as.
ANSWERS = {
    "NEGATIVE": (0.0312, "Absent", "no COVID-19 pattern found; other disease is not assessed."),
    "UNCERTAIN": (0.2571, "Indeterminate", "the model abstains; COVID-19 pattern indeterminate."),
    "COVID": (0.8123, "Present", "COVID-19 pattern found."),
}


def as_page(facts, source, tmp_path):
    """The report as DCMTK's HTML page, without its tags, in lines."""
    (report,) = build_objects(facts, source, kinds=("sr",))
    (tmp_path / "report.dcm").write_bytes(report.data)
    subprocess.run(
        ["dsr2html", tmp_path / "report.dcm", tmp_path / "report.html"],
        check=True,
        capture_output=True,
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8", errors="replace")
    text = html.unescape(re.sub(r"<[^>]+>", "", page.partition("<body>")[2]))
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.skipif(not shutil.which("dsr2html"), reason="needs Debian's package 'dcmtk'")
@pytest.mark.parametrize("label", ANSWERS)
def test_a_reader_of_the_page_sees_the_answer_and_a_finding_only_if_there_is_one(
    facts, source, tmp_path, label
):
    probability, presence, words = ANSWERS[label]
    lines = as_page(replace(facts, label=label, probability=probability), source, tmp_path)
    page = "\n".join(lines)
    pattern = lines[lines.index("COVID-19 pattern:") + 1]
    assert pattern.startswith(presence)
    assert f"Conclusion:\n{label}: {words}" in page
    assert f"Decision of the algorithm:\n{label}" in page
    assert f"Probability:\n{probability:.3f}" in page
    assert "Threshold Value:\n0.290" in page
    assert "Lower bound of the uncertain band:\n0.200" in page
    assert f"Comment:\n{RESEARCH_USE_ONLY}" in page
    is_covid = label == "COVID"
    assert ("Finding:" in lines) == is_covid
    assert ("Present" in page) == is_covid
    assert ("Finding Site" in page) == is_covid
    assert ("(840539006, SCT)" in page) == is_covid
    assert ("Share of the map inside the lungs:" in lines) == (label != "NEGATIVE")
    assert "NORMAL" not in page


OPAQUE = {
    "label": "NEGATIVE",
    "probability": 0.0312,
    "findings": {"covid": 0.0312, "opacity": 0.6249, "nodule": 0.04},
}


@pytest.mark.skipif(not shutil.which("dsr2html"), reason="needs Debian's package 'dcmtk'")
def test_a_negative_answer_with_an_opacity_heads_it_as_its_finding(facts, source, tmp_path):
    """With its probability, present, in the lungs; and the conclusion is of no normal chest."""
    lines = as_page(replace(facts, flags=("other_opacity",), **OPAQUE), source, tmp_path)
    page = "\n".join(lines)
    assert lines.count("Finding:") == 1
    assert lines[lines.index("Finding:") + 1].startswith("opacity")
    assert "Finding Site = Lung (39607008, SCT)" in page
    assert lines[lines.index("opacity:") + 1].startswith("Present")
    assert lines[lines.index("COVID-19 pattern:") + 1].startswith("Absent")
    assert "(RID28530, RADLEX)" in page
    assert "(840539006, SCT)" not in page
    found = [lines[i + 1] for i, line in enumerate(lines) if line == "Probability:"]
    assert [line.split()[0] for line in found] == ["0.031", "0.625"]
    assert "Probability of nodule:\n0.040" in page
    assert "Probability of opacity:" not in lines
    sentence = "no COVID-19 pattern found, but an opacity; this does not mean a normal chest X-ray."
    assert f"Conclusion:\nNEGATIVE: {sentence}" in page


@pytest.mark.skipif(not shutil.which("dsr2html"), reason="needs Debian's package 'dcmtk'")
@pytest.mark.parametrize("label", ANSWERS)
def test_without_the_flag_an_opacity_has_a_probability_and_is_no_finding(
    facts, source, tmp_path, label
):
    lines = as_page(replace(facts, **{**OPAQUE, "label": label}), source, tmp_path)
    page = "\n".join(lines)
    assert "Probability of opacity:\n0.625" in page
    assert "Probability of nodule:\n0.040" in page
    assert "RID28530" not in page
    assert lines.count("Probability:") == 1
    assert lines.count("Finding:") == (label == "COVID")
    assert f"Conclusion:\n{label}: {ANSWERS[label][2]}" in page


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs Debian's package 'dicom3tools'")
@pytest.mark.parametrize("report_class", ["comprehensive-3d", "comprehensive"])
@pytest.mark.parametrize("flags", [(), ("other_opacity",)])
def test_dicom3tools_finds_no_error_in_objects_with_an_opacity(
    facts, source, tmp_path, report_class, flags
):
    opaque = replace(facts, flags=flags, **OPAQUE)
    for item in build_objects(opaque, source, sr=report_class):
        assert problems(item.data, tmp_path) == [], item.kind


def test_the_capture_says_that_the_chest_is_not_normal(facts, source):
    opaque = replace(facts, flags=("other_opacity",), **OPAQUE)
    (capture,) = build_objects(opaque, source, kinds=("sc",))
    image = pydicom.dcmread(io.BytesIO(capture.data))
    assert "does not mean a normal chest X-ray" in image.DerivationDescription


@pytest.mark.parametrize("flags", [(), ("other_opacity",)])
def test_a_report_with_another_opacity_than_the_record_is_invalid(facts, find_testdata, flags):
    """Another probability, one that is not headed, and one that is headed without the flag."""
    path = find_testdata("RG1_UNCR.dcm")
    source = read_source(path).attributes
    opaque = replace(facts, flags=flags, **OPAQUE)
    (report,) = build_objects(opaque, path, kinds=("sr",))
    validate(report.dataset, "sr", opaque, source)
    other = replace(opaque, findings={**opaque.findings, "opacity": 0.5})
    turned = replace(opaque, flags=() if flags else ("other_opacity",))
    for wrong in (other, turned):
        with pytest.raises(InvalidObjectError):
            validate(report.dataset, "sr", wrong, source)


def numbers_in(item):
    """Name and value of every number of a report, as written in the file."""
    found = {}
    for child in item.get("ContentSequence") or ():
        if child.ValueType == "NUM":
            (measured,) = child.MeasuredValueSequence
            assert "FloatingPointValue" not in measured
            name = child.ConceptNameCodeSequence[0].CodeMeaning
            found[name] = str(measured.NumericValue)
        found |= numbers_in(child)
    return found


def report_of(facts, source):
    (report,) = build_objects(facts, source, kinds=("sr",))
    return pydicom.dcmread(io.BytesIO(report.data))


def test_three_decimals_and_more_only_where_three_would_mislead(facts, find_testdata):
    source = find_testdata("RG1_UNCR.dcm")
    for probability, label, expected in (
        (0.8123456, "COVID", "0.812"),
        (0.5, "COVID", "0.500"),
        (0.39997, "UNCERTAIN", "0.39997"),
        (0.99971, "COVID", "0.9997"),
    ):
        found = numbers_in(report_of(replace(facts, label=label, probability=probability), source))
        assert found["Probability"] == expected
        decimals = len(expected) - 2
        assert found["Threshold Value"] == f"{0.29:.{decimals}f}"
        assert found["Upper bound of the uncertain band"] == f"{0.4:.{decimals}f}"


@pytest.mark.parametrize(
    "changes",
    [
        {"uncertain_from": None, "uncertain_to": None},
        {"uncertain_from": 0.29, "uncertain_to": 0.29},
    ],
    ids=["older than the band", "never abstains"],
)
def test_what_there_is_not_is_not_written(facts, find_testdata, changes):
    bare = replace(facts, gate_score=None, lung_area=None, lung_share=None, **changes)
    found = numbers_in(report_of(bare, find_testdata("RG1_UNCR.dcm")))
    assert found == {"Probability": "0.812", "Threshold Value": "0.290"}


def test_every_flag_is_written_in_whole_words(facts, find_testdata):
    report = report_of(replace(facts, flags=tuple(Flag)), find_testdata("RG1_UNCR.dcm"))
    told = {
        child.ConceptCodeSequence[0].CodeMeaning
        for child in children_of(report)
        if child.ConceptNameCodeSequence[0].CodeMeaning == "Trust flag"
    }
    # A code's meaning has no room for more (PS3.5 6.2: LO).
    assert max(map(len, FLAGS.values())) <= 64
    assert told == set(FLAGS.values())


class TestPredecessor:
    """A report by another model names the one that was sent before (PS3.3 C.17.2)."""

    @staticmethod
    def revise(facts, source, first, **options):
        before = SentReport(
            sha256=facts.sha256,
            model_sha256=facts.model_sha256,
            sop_instance_uid=str(first.SOPInstanceUID),
        )
        revised = replace(facts, model_sha256="ef" * 32, predecessor=before, calibration="x-1")
        (report,) = build_objects(revised, source, kinds=("sr",), **options)
        return report

    @pytest.mark.parametrize("before", ["comprehensive-3d", "comprehensive"])
    @pytest.mark.parametrize("key", [None, KEY], ids=["as it is", "de-identified"])
    def test_it_is_referenced_whole(self, facts, source, tmp_path, before, key):
        (built,) = build_objects(facts, source, kinds=("sr",), sr=before, deidentify_key=key)
        first = built.dataset
        report = self.revise(facts, source, first, deidentify_key=key)
        (document,) = report.dataset.PredecessorDocumentsSequence
        (series,) = document.ReferencedSeriesSequence
        (instance,) = series.ReferencedSOPSequence
        assert (
            document.StudyInstanceUID,
            series.SeriesInstanceUID,
            instance.ReferencedSOPClassUID,
            instance.ReferencedSOPInstanceUID,
        ) == (
            first.StudyInstanceUID,
            first.SeriesInstanceUID,
            first.SOPClassUID,
            first.SOPInstanceUID,
        )
        if shutil.which("dciodvfy"):
            assert problems(report.data, tmp_path) == []

    def test_another_document_is_not_named(self, facts, find_testdata):
        source = find_testdata("RG1_UNCR.dcm")
        first = report_of(facts, source)
        report = self.revise(facts, source, first, deidentify_key=KEY)
        assert "PredecessorDocumentsSequence" not in report.dataset
        assert "PredecessorDocumentsSequence" not in first

    def test_the_calibration_is_named_among_the_parameters(self, facts, find_testdata):
        source = find_testdata("RG1_UNCR.dcm")
        report = self.revise(facts, source, report_of(facts, source))
        texts = {child.get("TextValue") for child in children_of(report.dataset)}
        assert "site calibration x-1" in texts


def children_of(item):
    for child in item.get("ContentSequence") or ():
        yield child
        yield from children_of(child)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(["R", "H"], ["L", "F"]), (["L", "F"], ["L", "F"]), (["F", "R"], ["L", "F"]), (None, [])],
)
def test_the_picture_says_how_it_lies_not_how_the_file_did(facts, tmp_path, stated, expected):
    """A reader turns what states another orientation, before the overlay is drawn."""
    values = {} if stated is None else {"PatientOrientation": stated}
    path = minimal(tmp_path / "source.dcm", **values)
    (capture,) = build_objects(facts, path, kinds=("sc",))
    assert list(capture.dataset.PatientOrientation or ()) == expected


def test_the_picture_is_the_overlay(facts, source):
    (capture,) = build_objects(facts, source, kinds=("sc",))
    wanted = cv2.cvtColor(cv2.imread(str(facts.overlay)), cv2.COLOR_BGR2RGB)
    assert (capture.dataset.pixel_array == wanted).all()
    assert capture.dataset.ImageComments == RESEARCH_USE_ONLY


def test_objects_belong_to_the_source_study_in_series_of_their_own(facts, find_testdata):
    path = find_testdata("RG1_UNCR.dcm")
    source = pydicom.dcmread(path, stop_before_pixels=True)
    built = build_objects(facts, path)
    for item in built:
        assert item.dataset.StudyInstanceUID == source.StudyInstanceUID
        assert item.dataset.PatientID == source.PatientID
        assert item.dataset.PatientName == source.PatientName
        assert item.dataset.SeriesInstanceUID != source.SeriesInstanceUID
    assert len({item.dataset.SeriesInstanceUID for item in built}) == 2


def test_the_same_result_makes_the_same_bytes_and_another_model_other_uids(facts, source):
    first, second = build_objects(facts, source), build_objects(facts, source)
    assert [item.data for item in first] == [item.data for item in second]
    changed = (
        build_objects(replace(facts, model_sha256="ef" * 32), source),
        build_objects(facts, source, deidentify_key=KEY),
        build_objects(facts, source, deidentify_key=b"another"),
    )
    uids = [item.sop_instance_uid for items in (first, *changed) for item in items]
    assert len(set(uids)) == len(uids)


def test_nothing_of_the_patient_leaves_where_that_is_configured(facts, tmp_path):
    secrets = {
        "PatientName": "Unmistakable^Person",
        "PatientID": "PID-4711",
        "AccessionNumber": "ACC-0815",
        "ReferringPhysicianName": "Careful^Doctor",
        "StudyDescription": "Thorax of somebody",
        "IssuerOfPatientID": "Somewhere",
        "StudyID": "S-42",
        "StudyDate": "20190203",
        "PatientBirthDate": "19450607",
        "InstitutionName": "Hospital of a Town",
        "OperatorsName": "Quick^Hand",
    }
    path = minimal(tmp_path / "source.dcm", **secrets)
    source = pydicom.dcmread(path)
    for item in build_objects(facts, path, deidentify_key=KEY):
        data = item.data
        for value in secrets.values():
            for word in value.split("^"):
                assert word.encode() not in data, word
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            assert str(source.get(keyword)).encode() not in data
        assert item.dataset.PatientIdentityRemoved == "YES"


def test_one_patient_keeps_one_pseudonym(facts, tmp_path):
    study = generate_uid()
    paths = [
        minimal(tmp_path / f"{n}.dcm", PatientID="P1", StudyInstanceUID=study) for n in range(2)
    ]
    built = [build_objects(facts, path, ("sr",), deidentify_key=KEY)[0].dataset for path in paths]
    assert built[0].PatientID == built[1].PatientID != "P1"
    assert built[0].StudyInstanceUID == built[1].StudyInstanceUID != study


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_a_source_without_uids_cannot_be_answered(facts, tmp_path, keyword):
    path = minimal(tmp_path / "source.dcm")
    source = pydicom.dcmread(path)
    delattr(source, keyword)
    source.save_as(path)
    with pytest.raises(UnusableSourceError, match=keyword):
        build_objects(facts, path)


def test_what_is_no_dicom_file_cannot_be_answered(facts):
    with pytest.raises(UnusableSourceError):
        build_objects(facts, facts.overlay)


@pytest.mark.parametrize("kind", ["sc", "sr"])
def test_whatever_is_broken_is_found_before_it_is_sent(facts, find_testdata, kind):
    """Every attribute that must be there is taken out, and then emptied or overgrown."""
    path = find_testdata("RG1_UNCR.dcm")
    source = read_source(path).attributes
    from lungwatch.daemon.pacs import objects as module

    needed = (*module._NOT_EMPTY, *module._PRESENT, *module._OF_KIND[kind])
    for keyword in needed:
        (item,) = build_objects(facts, path, kinds=(kind,))
        validate(item.dataset, kind, facts, source)
        delattr(item.dataset, keyword)
        with pytest.raises(InvalidObjectError, match=keyword):
            validate(item.dataset, kind, facts, source)
    breaks = {
        "SOPInstanceUID": lambda d: setattr(d, "SeriesInstanceUID", "1." * 32 + "1"),
        "leading zero": lambda d: setattr(d, "SeriesInstanceUID", "1.02.3"),
        "other study": lambda d: setattr(d, "StudyInstanceUID", "1.2.3"),
        "other patient": lambda d: setattr(d, "PatientID", "somebody else"),
        "same series": lambda d: setattr(d, "SeriesInstanceUID", source.SeriesInstanceUID),
    }
    if kind == "sc":
        breaks |= {
            "short": lambda d: setattr(d, "PixelData", d.PixelData[:-2]),
            "image": lambda d: setattr(
                d.SourceImageSequence[0], "ReferencedSOPInstanceUID", "1.2.3"
            ),
            "notice": lambda d: setattr(d, "ImageComments", "fine"),
        }
    else:
        breaks |= {
            "root": lambda d: setattr(d.ConceptNameCodeSequence[0], "CodeValue", "1"),
            "template": lambda d: setattr(
                d.ContentTemplateSequence[0], "TemplateIdentifier", "2000"
            ),
            "notice": lambda d: d.ContentSequence.pop(),
            # highdicom's own `remove` takes another item away.
            "measurements": lambda d: setattr(
                d,
                "ContentSequence",
                pydicom.Sequence(
                    item
                    for item in d.ContentSequence
                    if item.ConceptNameCodeSequence[0].CodeValue != "126010"
                ),
            ),
        }
    for name, spoil in breaks.items():
        (item,) = build_objects(facts, path, kinds=(kind,))
        spoil(item.dataset)
        with pytest.raises(InvalidObjectError):
            validate(item.dataset, kind, facts, source)
        assert name
    (item,) = build_objects(facts, path, kinds=(kind,))
    with pytest.raises(InvalidObjectError):
        validate(item.dataset, "sr" if kind == "sc" else "sc", facts, source)


@given(parts=st.lists(st.text(max_size=300), max_size=5), key=st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_uids_are_valid_whatever_they_are_made_of(parts, key):
    uid = stable_uid(*parts, key=key)
    assert uid == stable_uid(*parts, key=key)
    assert len(uid) <= 64
    assert pydicom.uid.UID(uid).is_valid
    assert uid != stable_uid(*parts, "", key=key)

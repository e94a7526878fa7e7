"""Attributes copied from the source: unchanged where they identify, else valid or empty."""

import shutil
import subprocess

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from lungwatch.daemon.pacs.objects import build_objects
from tests.support.results import result_facts

pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
KEY = b"sixteen bytes or more"
PLACE = "X" * 40
STUDY = "1.2.276.0.7230010.3.1.2.20250102.091500.0123"


@pytest.fixture
def facts(tmp_path):
    return result_facts(tmp_path)


@pytest.fixture
def source(tmp_path):
    """Write a DX with some values, and bytes in place of one of them."""

    def write(keyword=None, raw=b"", *, syntax=ExplicitVRLittleEndian, **values):
        image = Dataset()
        image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
        for uid in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            setattr(image, uid, generate_uid())
        image.Modality, image.PatientID = "DX", "P1"
        with pydicom.config.disable_value_validation():
            for name, value in values.items():
                setattr(image, name, value)
            if keyword is not None:
                setattr(image, keyword, PLACE)
            image.file_meta = FileMetaDataset()
            image.file_meta.TransferSyntaxUID = syntax
            path = tmp_path / "source.dcm"
            image.save_as(path, enforce_file_format=True)
        data = path.read_bytes()
        assert data.count(PLACE.encode()) == (keyword is not None)
        path.write_bytes(data.replace(PLACE.encode(), raw.ljust(len(PLACE))))
        return path

    return write


@pytest.fixture
def answers(facts, tmp_path):
    """Build both objects; return, of each, what a receiver finds in it, and dciodvfy's errors."""

    def answer(path, key=None):
        found = []
        for item in build_objects(facts, path, deidentify_key=key):
            sent = tmp_path / f"{item.kind}.dcm"
            sent.write_bytes(item.data)
            found.append((pydicom.dcmread(sent), errors_of(sent)))
        assert len(found) == 2
        return found

    return answer


def errors_of(path):
    if not shutil.which("dciodvfy"):
        return []
    said = subprocess.run(
        ["dciodvfy", path], capture_output=True, text=True, errors="replace", check=False
    )
    return [line for line in said.stderr.splitlines() if line.startswith("Error")]


def bytes_of(dataset, keyword):
    return dataset.get_item(keyword).value.rstrip(b" ")


LATIN, UNICODE = "Müller^Zoë".encode("latin-1"), "Müller^Zoë".encode()
JAPANESE = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"
KOREAN = b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7"
# Character sets of the source, its bytes, and what goes back: the bytes, or nothing.
TEXTS = {
    "none, cp1251": (None, "Иванова^Анна".encode("cp1251"), False),
    "none, gbk": (None, "王^小明".encode("gbk"), False),
    "none, utf-8": (None, UNICODE, False),
    "none, euc-kr": (None, "김^희중".encode("euc-kr"), False),
    "latin-1": ("ISO_IR 100", LATIN, True),
    "latin-1, utf-8": ("ISO_IR 100", UNICODE, True),
    "latin-1, cp1251": ("ISO_IR 100", "Иванова^Анна".encode("cp1251"), True),
    "latin-1, shift-jis": ("ISO_IR 100", "山田".encode("shift_jis"), False),
    "cyrillic": ("ISO_IR 144", "Иванова^Анна".encode("iso8859-5"), True),
    "utf-8": ("ISO_IR 192", UNICODE, True),
    "utf-8, latin-1": ("ISO_IR 192", LATIN, False),
    "gb18030": ("GB18030", "王^小明".encode("gb18030"), True),
    "gb18030, broken": ("GB18030", b"\xff\xff", False),
    "japanese": (["", "ISO 2022 IR 87"], JAPANESE, True),
    "japanese, shift-jis": (["", "ISO 2022 IR 87"], "山田^太郎".encode("shift_jis"), False),
    "korean": (["", "ISO 2022 IR 149"], KOREAN, True),
    "escapes without their set": ("ISO_IR 100", JAPANESE, False),
    "a control character": ("ISO_IR 100", b"M\xfcller\x07", False),
}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(("sets", "raw", "goes_back"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("keyword", ["PatientName", "StudyDescription"])
def test_text_goes_back_byte_for_byte_under_its_set_or_not_at_all(
    source, answers, keyword, sets, raw, goes_back, syntax
):  # fmt: skip
    values = {} if sets is None else {"SpecificCharacterSet": sets}
    for sent, errors in answers(source(keyword, raw, syntax=syntax, **values)):
        assert errors == []
        if goes_back:
            assert bytes_of(sent, keyword) == raw
            assert sent.SpecificCharacterSet == sets
        else:
            assert not sent.get(keyword)
        assert sent.PatientID == "P1"


@pytest.mark.parametrize("key", [None, KEY], ids=["as it is", "de-identified"])
def test_no_byte_of_a_name_leaves_with_a_de_identified_answer(source, answers, key):
    path = source("PatientName", LATIN, SpecificCharacterSet="ISO_IR 100")
    for sent, errors in answers(path, key):
        assert errors == []
        assert bool(sent.PatientName) == (key is None)
        assert sent.SpecificCharacterSet == ("ISO_IR 192" if key else "ISO_IR 100")


PATIENT_IDS = {
    "too long": (None, b"P" * 40 + b"Q" * 40),
    "two values": (None, b"4711\\4712"),
    "no character set": (None, "Ü-1".encode("latin-1")),
    "latin-1": ("ISO_IR 100", "Ü-1".encode("latin-1")),
}


@pytest.mark.parametrize(("sets", "raw"), PATIENT_IDS.values(), ids=PATIENT_IDS)
def test_a_patient_id_goes_back_as_it_came(source, answers, sets, raw):
    """It decides whose the answer is: two patients must not become one, nor one two."""
    values = {} if sets is None else {"SpecificCharacterSet": sets}
    if len(raw) > len(PLACE):
        path = source(PatientID=raw.decode())
    else:
        path = source("PatientID", raw, **values)
    for sent, _ in answers(path):
        assert bytes_of(sent, "PatientID") == raw
    (one, _), (two, _) = answers(path, KEY)
    assert one.PatientID == two.PatientID
    assert len(one.PatientID) == 16


UIDS = {
    "leading zero": STUDY,
    "empty component": "1.2.840..3",
    "trailing dot": "1.2.840.3.",
    "one number": "12345",
}


@pytest.mark.parametrize("uid", UIDS.values(), ids=UIDS)
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_a_uid_goes_back_as_the_pacs_has_it(source, answers, keyword, uid):
    """At every depth, and in no other place; the objects' own UIDs are valid."""
    path = source(**{keyword: uid})
    original = pydicom.dcmread(path)
    for sent, errors in answers(path):
        assert sent.StudyInstanceUID == original.StudyInstanceUID
        assert sent.SOPInstanceUID.is_valid
        assert sent.SeriesInstanceUID.is_valid
        named = {str(e.value) for e in sent.iterall() if e.VR == "UI"}
        assert original.SOPInstanceUID in named
        assert [e for e in errors if uid not in e and "contains invalid data" not in e] == []
    for sent, errors in answers(path, KEY):
        assert errors == []
        assert uid.encode() not in sent.StudyInstanceUID.encode()


def test_what_decides_nothing_and_is_invalid_is_empty_or_put_right(source, answers):
    path = source(
        AccessionNumber="HOSP2025010212345678",
        IssuerOfPatientID="I" * 65,
        StudyDate="2025.01.02",
        StudyTime="10:15:30",
        PatientBirthDate="00000000",
        StudyID="S" * 20,
    )
    for sent, errors in answers(path):
        assert errors == []
        assert (sent.AccessionNumber, sent.get("IssuerOfPatientID")) == ("", None)
        assert (sent.StudyDate, sent.StudyTime) == ("20250102", "101530")
        assert sent.PatientBirthDate == ""
        assert sent.StudyID == "S" * 16

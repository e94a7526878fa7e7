"""Attributes of a real DICOM file: from the drop folder to JSON, CSV and an export."""

import csv
import io
import json
from datetime import UTC, datetime

import pydicom
import pytest

# What `results list --json` has at least: the contract of the command line.
KEYS = {
    *("id", "sha256", "source_name", "status", "reason", "message", "label", "probability"),
    *("threshold", "uncertain_from", "uncertain_to", "findings", "flags", "gate_score"),
    *("lung_share", "model", "model_version", "overlay", "patient_id", "patient_sex"),
    *("patient_age", "study_uid", "series_uid", "sop_uid", "accession", "study_time", "station"),
    *("view", "sending_ae", "received_at", "finished_at", "duration_ms"),
}
STATED = {
    "patient_id": "P1",
    "patient_sex": "F",
    "patient_age": "061Y",
    "accession": "A1",
    "station": "ROOM1",
    "view": "PA",
    "sending_ae": "CT_ROOM 3",
}


@pytest.fixture(scope="module")
def screened(make_home, rg1):
    """A home with a real chest X-ray and a refused lower leg of one patient, and its log."""
    home = make_home()
    for name in (rg1, rg1.with_name("RG3_UNCR.dcm")):
        image = pydicom.dcmread(name)
        image.PatientID, image.PatientSex, image.PatientAge = "P1", "F", "061Y"
        image.AccessionNumber, image.StationName, image.ViewPosition = "A1", "ROOM1", "PA"
        image.StudyDate, image.StudyTime = "20140131", "101500"
        image.TimezoneOffsetFromUTC = "+0100"
        image.file_meta.SendingApplicationEntityTitle = "CT_ROOM 3"
        file = io.BytesIO()
        image.save_as(file)
        home.drop(name.name, file.getvalue(), old=True)
    ran = home.run_once()
    assert ran.returncode == 0, ran.stderr
    return home, ran.stderr


def test_json_has_the_keys_of_the_contract_and_the_values_of_the_file(screened):
    home, _ = screened
    rows = home.results()
    assert {row["status"] for row in rows} == {"done", "rejected"}
    for row in rows:
        assert set(row) >= KEYS
        assert {name: row[name] for name in STATED} == STATED
        assert datetime.fromisoformat(row["study_time"]) == datetime(2014, 1, 31, 9, 15, tzinfo=UTC)
        assert row["study_time"].endswith("+00:00"), "like every other time"


def test_csv_show_and_export_have_the_same_values(screened, tmp_path):
    home, _ = screened
    time = "2014-01-31T09:15:00+00:00"
    wanted = STATED | {"study_time": time}
    for row in csv.DictReader(io.StringIO(home.command("results", "list", "--csv").stdout)):
        assert {name: row[name] for name in wanted} == wanted
        shown = json.loads(home.command("results", "show", row["id"], "--json").stdout)
        assert {name: shown[name] for name in wanted} == wanted
        assert (shown["view_position"], shown["study_date"]) == ("PA", "20140131")
    for kind in ("csv", "json"):
        path = tmp_path / f"out.{kind}"
        assert home.command("results", "export", "-o", str(path)).returncode == 0
        text = path.read_text()
        rows = json.loads(text) if kind == "json" else csv.DictReader(io.StringIO(text))
        for row in rows:
            assert {name: row[name] for name in wanted} == wanted


def test_the_log_names_none_of_it(screened):
    _, log = screened
    assert "action=filed" in log
    for value in (*STATED.values(), "20140131", "2014-01-31"):
        if len(value) > 3:
            assert value not in log

"""The daemon's log names no patient: neither from file names nor from what files say."""

import os
from io import BytesIO

import pydicom
import pytest

NAME = "Zzyzxson"
PATIENT_ID = "PID0815X"


@pytest.fixture(scope="module")
def named(sample):
    """Write a patient into a real file, also where the value is not allowed to be."""

    def write(name, **values):
        dataset = pydicom.dcmread(BytesIO(sample(name)))
        dataset.PatientName, dataset.PatientID = f"{NAME}^Ada", PATIENT_ID
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        file = BytesIO()
        dataset.save_as(file)
        return file.getvalue()

    return write


def test_no_patient_is_named_in_the_log_whatever_becomes_of_the_file(make_home, named, picture):
    home = make_home(MAX_IN_FLIGHT="4")
    done = named("RG1_J2KI.dcm")
    rejected = named("RG3_J2KI.dcm")
    # pydicom says what it does not like about a value by quoting it.
    odd = named("RG3_J2KI.dcm", StudyDate="20260101").replace(b"20260101", NAME.encode()[:8])
    contents = [done, rejected, odd, rejected[:-500], named("CT_small.dcm"), picture(1), b"text"]
    with home.daemon() as daemon:
        os.mkfifo(home.incoming / f"{NAME} fifo.dcm")
        (home.incoming / f"{NAME} link.dcm").symlink_to("nowhere")
        for number, content in enumerate(contents):
            home.drop(f"{NAME} {PATIENT_ID}/{NAME}-{number}.dcm", content)
        home.wait_until_ended(contents)
        duplicate = home.drop(f"{NAME} twice.dcm", done)
        while duplicate.exists():
            assert daemon.process.poll() is None, daemon.log()
        assert daemon.stop() == 0
        log = daemon.log()
    assert {row.state for row in home.rows()} == {"done", "rejected"}
    for action in ("filed", "rejected", "duplicate"):
        assert f"action={action}" in log
    assert log.count("action=left_alone") == 2  # said once of each, not at every look
    # The record does know: it is what the log is silent about.
    assert {result["patient_id"] for result in home.results()} >= {PATIENT_ID, None}
    assert NAME.lower() not in log.lower()
    assert PATIENT_ID not in log


def test_no_patient_is_named_when_a_folder_is_unusable(make_home, named, picture):
    """`work/` is made unusable while the daemon runs: the file stays where it is."""
    home = make_home()
    with home.daemon() as daemon:
        # The start looks for what was left in `work/`; it is over once a file has its end.
        home.drop("first.png", picture(1), old=True)
        home.wait_until_ended([picture(1)])
        daemon.wait_for(lambda: not list((home.root / "work").iterdir()))
        daemon.suspend()  # a look at the folder in between would find none
        (home.root / "work").rmdir()
        (home.root / "work").write_text("not a folder")
        daemon.resume()
        home.drop(f"{NAME}.dcm", named("RG1_J2KI.dcm"), old=True)
        daemon.wait_until_said("action=left_alone")
        assert daemon.stop() == 0
        log = daemon.log()
    assert "Traceback" not in log
    assert NAME.lower() not in log.lower()
    assert (home.incoming / f"{NAME}.dcm").exists()

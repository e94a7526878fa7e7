"""Own objects that come back, by network or in the drop folder, are set aside."""

import io
import shutil
import signal
import subprocess
import zipfile
from datetime import UTC, datetime, timedelta

import pydicom
import pytest

from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.home import Home
from lungwatch.daemon.pacs.objects import build_objects
from lungwatch.daemon.retention import Retention
from lungwatch.db.engine import open_engine
from tests.support.peers import free_port
from tests.support.record import sha256
from tests.support.results import result_facts
from tests.support.waits import wait_for

pytestmark = pytest.mark.skipif(
    not shutil.which("storescu"), reason="needs DCMTK (Debian's package 'dcmtk')"
)


@pytest.fixture(scope="module")
def echoes(find_testdata, tmp_path_factory):
    """The SC and the SR that another lungwatch sent of a chest X-ray, as bytes."""
    pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
    facts = result_facts(tmp_path_factory.mktemp("other"))
    return [item.data for item in build_objects(facts, find_testdata("RG1_UNCR.dcm"))]


def own_files(home):
    return sorted(path.name for path in (home.root / "quarantine").rglob("*") if path.is_file())


def kept_as(contents):
    return sorted(f"{sha256(content)}.dcm" for content in contents)


def assert_agrees(home):
    status, report = home.reconcile()
    assert (status, report["differences"]) == (0, [])
    assert home.files("incoming", "work") == []


def test_forwarded_objects_are_acknowledged_counted_and_make_no_row(
    make_home, echoes, sample, tmp_path
):
    """Again and again: each is kept once, and a real image beside them has its result."""
    port = free_port()
    home = make_home(PACS_PORT=str(port))
    for number, content in enumerate(echoes):
        (tmp_path / f"{number}.dcm").write_bytes(content)
    (tmp_path / "chest.dcm").write_bytes(sample("RG1_UNCR.dcm"))
    with home.daemon() as daemon:
        for _ in range(2):
            sent = subprocess.run(
                [
                    "storescu",
                    "-R",
                    "-aec",
                    "LUNGWATCH",
                    "127.0.0.1",
                    str(port),
                    "+sd",
                    str(tmp_path),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            assert sent.returncode == 0, sent.stderr
        wait_for(
            lambda: (
                daemon.log().count("action=own_object") == 4
                and [row.arrivals for row in home.rows() if row.is_kept] == [2]
            ),
            daemon.log,
        )
        assert daemon.stop() == 0, daemon.log()
    assert [row.state for row in home.rows()] == ["done"]
    assert {path.parent.name for path in home.files("quarantine")} == {"own_objects"}
    # The meta information is the listener's own: the data set is what came.
    kept = {pydicom.dcmread(path).SOPInstanceUID for path in home.files("quarantine")}
    assert kept == {pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID for content in echoes}
    assert_agrees(home)


def test_dropped_ones_leave_the_folder_whatever_they_are_called(make_home, echoes, picture):
    """As files, and in an archive that is an export of the study."""
    home = make_home()
    with zipfile.ZipFile(home.root.parent / "study.zip", "w") as archive:
        archive.writestr("SC000001", echoes[0])
        archive.writestr("chest.png", picture(1))
    packed = (home.root.parent / "study.zip").read_bytes()
    home.drop("study.zip", packed, old=True)
    home.drop("report", echoes[1], old=True)
    home.drop("report again.png", echoes[1], old=True)
    done = home.run_once()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("action=own_object") == 3
    assert {(row.state, row.reason) for row in home.rows()} == {
        ("done", "unpacked"),
        ("done", None),
    }
    assert own_files(home) == kept_as(echoes)
    assert_agrees(home)


@pytest.mark.parametrize("point", ["renamed", "own_object"])
def test_killed_on_the_way_they_are_set_aside_by_the_next_start(make_home, echoes, point):
    home = make_home()
    home.drop("echo.dcm", echoes[0], old=True)
    assert home.run_once(env={"CRASH_AT": point}).returncode == -signal.SIGKILL
    assert home.run_once().returncode == 0
    assert home.rows() == []
    assert own_files(home) == kept_as(echoes[:1])
    assert_agrees(home)


def test_what_lies_among_them_and_is_none_goes_back_to_the_drop_folder(make_home, echoes, picture):
    home = make_home()
    home.drop("echo.dcm", echoes[0], old=True)
    assert home.run_once().returncode == 0
    place = home.root / "quarantine" / "own_objects"
    (place / f"{sha256(picture(1))}.dcm").write_bytes(picture(1))
    (place / "renamed.dcm").write_bytes(echoes[1])
    status, report = home.reconcile()
    assert status == 0
    assert [item["kind"] for item in report["differences"]] == ["unknown_file", "unknown_file"]
    assert home.run_once().returncode == 0
    assert [row.state for row in home.rows()] == ["done"]
    assert own_files(home) == kept_as(echoes)
    assert_agrees(home)


def test_retention_removes_them_by_age(make_home, echoes):
    home = make_home()
    home.drop("echo.dcm", echoes[0], old=True)
    assert home.run_once().returncode == 0
    environ = {"LUNGWATCH_RETAIN_QUARANTINE_DAYS": "30"}
    config = load_config(None, home.root, environ)
    engine = open_engine(config.database_url)
    retention = Retention(config, Home(home.root), engine)
    (path,) = home.files("quarantine")
    came = datetime.fromtimestamp(path.stat().st_ctime, UTC)
    assert retention.plan(came + timedelta(days=29)) == []
    (removal,) = retention.plan(came + timedelta(days=31))
    assert retention.remove(removal, came + timedelta(days=31))
    assert home.files("quarantine") == []
    engine.dispose()

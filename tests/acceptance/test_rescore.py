"""Rescoring of filed X-rays by another model: both rows stay, whatever happens in between."""

import json
import signal
import subprocess
from collections import Counter

import cv2
import numpy as np
import pydicom
import pytest

from tests.support.peers import StoreScp, program
from tests.support.record import sha256
from tests.support.waits import wait_for

SIGKILLED = -signal.SIGKILL
OTHER = "baseline-1.1.0"
# Those that a file in done/ passes on its way to a second result.
POINTS = ("renamed", "claimed", "decoded", "classified", "overlaid", "recorded", "filed")


@pytest.fixture
def home(make_home, picture):
    """Two X-rays with a result of the model that ships as the default."""
    home = make_home()
    for number in (1, 2):
        home.drop(f"{number}.png", picture(number), old=True)
    ran = home.run_once()
    assert ran.returncode == 0, ran.stderr
    return home


def rescore(home, *args, **env):
    return home.command("rescore", "--model", OTHER, "--json", *args, env=env)


def assert_both(home, contents, *, models):
    """Each content once in done/, with one ended row a model; folders and database agree."""
    results = home.results()
    digests = {sha256(content) for content in contents}
    assert Counter(row["sha256"] for row in results) == Counter(dict.fromkeys(digests, models))
    assert {row["status"] for row in results} == {"done"}
    assert len({row["overlay"] for row in results}) == len(results)
    assert {sha256(path.read_bytes()) for path in home.files("done")} == digests
    assert len(home.files("done")) == len(digests)
    assert home.files("work", "quarantine", "incoming") == []
    status, report = home.reconcile()
    assert (status, report["differences"]) == (0, [])


def test_a_second_model_adds_rows_and_changes_none(home, picture):
    before = {row["id"]: row for row in home.results()}
    assert json.loads(rescore(home, "--dry-run").stdout)["chosen"] == 2
    assert home.results() == list(before.values())

    said = rescore(home)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert (told["chosen"], told["made"], told["left"]) == (2, 2, 0)
    after = {row["id"]: row for row in home.results()}
    assert {number: after[number] for number in before} == before
    assert_both(home, [picture(1), picture(2)], models=2)
    assert {row["arrivals"] for row in after.values()} == {0, 1}

    new = [row for row in after.values() if row["id"] not in before]
    assert {f"{row['model']}-{row['model_version']}" for row in new} == {OTHER}
    listed = home.command("results", "list", "--json", "--made-since", told["at"])
    assert {row["id"] for row in json.loads(listed.stdout)} == {row["id"] for row in new}
    finished = [row["finished_at"] for row in json.loads(listed.stdout)]
    assert finished == sorted(finished, reverse=True)

    assert json.loads(rescore(home).stdout)["chosen"] == 0
    audited = json.loads(home.command("audit", "list", "--json").stdout)
    assert [row["detail"] for row in audited if row["action"] == "rescore"][-1] == {"results": 2}


def test_a_limit_takes_the_newest(home, picture):
    home.drop("3.png", picture(3), old=True)
    assert home.run_once().returncode == 0
    assert json.loads(rescore(home, "--limit", "1").stdout)["made"] == 1
    (row,) = [row for row in home.results() if row["model"] == "baseline"]
    assert row["sha256"] == sha256(picture(3))


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_the_command_given_again_finishes(home, picture, point):
    assert rescore(home, CRASH_AT=point).returncode == SIGKILLED
    again = rescore(home)
    if again.returncode:  # between the move and the claim nobody knows for whom it was moved
        assert point == "renamed"
        assert "an interrupted run has left files" in again.stderr
        assert home.run_once().returncode == 0
        again = rescore(home)
    assert again.returncode == 0, again.stderr
    assert_both(home, [picture(1), picture(2)], models=2)


@pytest.mark.parametrize("point", ["renamed", "classified", "recorded", "filed"])
def test_killed_the_daemon_of_the_first_model_puts_the_file_back(home, picture, point):
    assert rescore(home, CRASH_AT=point).returncode == SIGKILLED
    assert home.run_once().returncode == 0
    assert len(home.files("done")) == 2
    assert home.files("work", "quarantine") == []
    assert rescore(home).returncode == 0
    assert_both(home, [picture(1), picture(2)], models=2)


def test_what_a_daemon_left_in_hand_is_not_given_to_another_model(home, picture):
    home.drop("3.png", picture(3), old=True)
    assert home.run_once(env={"CRASH_AT": "decoded"}).returncode == SIGKILLED
    refused = rescore(home)
    assert refused.returncode == 1
    assert "run --once" in refused.stderr
    assert home.run_once().returncode == 0
    assert rescore(home).returncode == 0
    assert_both(home, [picture(number) for number in (1, 2, 3)], models=2)


def test_the_drop_folder_is_left_to_the_daemon(home, picture):
    home.drop("3.png", picture(3), old=True)
    assert json.loads(rescore(home).stdout)["made"] == 2
    assert [path.name for path in home.files("incoming")] == ["3.png"]


def test_a_running_daemon_takes_up_what_its_own_model_is_asked_for(home, picture):
    home.env["MODEL"] = OTHER
    with home.daemon() as daemon:
        said = rescore(home)
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["daemon_running"] is True
        wait_for(
            lambda: [row.state for row in home.rows()] == ["done"] * 4,
            lambda: f"{home.rows()} {daemon.log()}",
        )
        assert daemon.stop() == 0
    assert_both(home, [picture(1), picture(2)], models=2)


def test_a_running_daemon_of_another_model_leaves_the_requests_alone(home, picture):
    with home.daemon() as daemon:
        assert json.loads(rescore(home).stdout)["left"] == 2
        home.drop("3.png", picture(3), old=True)
        home.wait_until_ended([picture(3)])
        assert Counter(row.state for row in home.rows()) == {"done": 3, "queued": 2}
        assert daemon.stop() == 0
    assert json.loads(rescore(home).stdout)["made"] == 3
    assert_both(home, [picture(number) for number in (1, 2, 3)], models=2)


def test_what_the_second_model_refuses_stays_where_the_first_ones_result_is(
    make_home, shipped_bundle, picture, tmp_path
):
    pytest.importorskip("onnx")
    gated = pytest.importorskip("tests.support.bundles")
    bundle = gated.gated_bundle(shipped_bundle, tmp_path)
    grey = cv2.imdecode(np.frombuffer(picture(2), np.uint8), cv2.IMREAD_GRAYSCALE)
    # Of full range, and dark on the whole: darker by a factor would be stretched.
    dark = cv2.imencode(".png", np.uint8(255 * (grey / 255.0) ** 8))[1].tobytes()
    home = make_home()
    home.drop("dark.png", dark, old=True)
    assert home.run_once().returncode == 0
    said = home.command("rescore", "--model", str(bundle), env={"GATE": "refuse"})
    assert said.returncode == 0, said.stderr
    assert [(row.state, row.path[:5]) for row in home.rows()] == [
        ("done", "done/"),
        ("rejected", "done/"),
    ]
    assert len(home.files("done")) == 1
    assert home.files("quarantine", "work") == []
    status, report = home.reconcile()
    assert (status, report["differences"]) == (0, [])


def test_the_shift_is_told_and_activating_asks_first(home):
    asked = home.command("model", "activate", OTHER)
    assert asked.returncode == 1
    assert "no image was scored by both" in asked.stderr
    assert not (home.root / "lungwatch.toml").exists()

    assert rescore(home).returncode == 0
    compared = home.command("results", "compare", "--model", "guided", "--model", OTHER, "--json")
    shift = json.loads(compared.stdout)
    assert (shift["images"], shift["model_b"]) == (2, OTHER)
    by_model = {
        name: {row["sha256"]: row for row in home.results() if row["model"] == name}
        for name in ("guided", "baseline")
    }
    pairs = [(by_model["guided"][one], by_model["baseline"][one]) for one in by_model["guided"]]
    assert shift["agreement"] == np.mean([a["label"] == b["label"] for a, b in pairs])
    assert shift["mean"] == pytest.approx(
        np.mean([b["probability"] - a["probability"] for a, b in pairs])
    )

    few = home.command("model", "activate", OTHER)
    assert few.returncode == 1
    assert "only 2 images were scored by both" in few.stderr
    (home.root / "lungwatch.toml").write_text("# ours\ngate = 'flag'  # research\n")
    done = home.command("model", "activate", OTHER, "--yes")
    assert done.returncode == 0, done.stderr
    assert (home.root / "lungwatch.toml").read_text() == (
        f"# ours\ngate = 'flag'  # research\nmodel = \"{OTHER}\"\n"
    )
    with home.daemon() as daemon:
        assert f"model={OTHER}" in daemon.log()
    audited = json.loads(home.command("audit", "list", "--json").stdout)
    (noted,) = [row for row in audited if row["action"] == "model activate"]
    assert (noted["target"], noted["outcome"]) == (f"model {OTHER}", "ok")
    assert noted["detail"]["compared"] == 2


def test_an_altered_bundle_is_not_activated(home, altered_bundle):
    refused = home.command("model", "activate", str(altered_bundle), "--yes")
    assert refused.returncode == 1
    assert "SHA-256 differs" in refused.stderr
    assert not (home.root / "lungwatch.toml").exists()


def test_a_revised_report_names_the_one_that_was_sent_before(make_home, sample, tmp_path):
    pytest.importorskip("highdicom", reason="needs the extra 'pacs'")
    program("storescp", "dcmtk")
    with StoreScp(tmp_path / "received") as peer:
        home = make_home(PACS_DESTINATIONS=peer.name, PACS_SEND="sr")
        home.drop("chest.dcm", sample("RG1_UNCR.dcm"), old=True)
        assert home.run_once().returncode == 0
        assert peer.receipts() == 1
        (first,) = [pydicom.dcmread(path) for path in peer.folder.iterdir()]
        assert "PredecessorDocumentsSequence" not in first
        said = rescore(home)
        assert said.returncode == 0, said.stderr
        assert peer.receipts() == 2
        files = {pydicom.dcmread(path).SOPInstanceUID: path for path in peer.folder.iterdir()}
    (path,) = [path for uid, path in files.items() if uid != first.SOPInstanceUID]
    (document,) = pydicom.dcmread(path).PredecessorDocumentsSequence
    (series,) = document.ReferencedSeriesSequence
    (instance,) = series.ReferencedSOPSequence
    assert document.StudyInstanceUID == first.StudyInstanceUID
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert instance.ReferencedSOPClassUID == first.SOPClassUID
    assert instance.ReferencedSOPInstanceUID == first.SOPInstanceUID
    checked = subprocess.run(
        [program("dciodvfy", "dicom3tools"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in checked.stderr.splitlines() if line.startswith("Error")] == []

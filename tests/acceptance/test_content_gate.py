"""The content gate in the real daemon: what it refuses, what it flags, and what SQL tells of it."""

import json
import shutil
import sqlite3
from contextlib import closing

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx")
gated = pytest.importorskip("tests.support.bundles")
_COLUMNS = "state, reason, message, label, flags, gate_score, lung_area, lung_share, uncertain_from"


@pytest.fixture(scope="module")
def bundle(shipped_bundle, tmp_path_factory):
    return gated.gated_bundle(shipped_bundle, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def chest(picture):
    return picture(1)


@pytest.fixture(scope="module")
def dark(picture):
    """The same caricature, so dark that the gate takes it for no chest."""
    grey = cv2.imdecode(np.frombuffer(picture(2), np.uint8), cv2.IMREAD_GRAYSCALE)
    # A part stays as it is: what is dark all over is read as if it were of fewer bits.
    middle = slice(len(grey) // 3, len(grey) // 2)
    dark = grey // 8
    dark[middle, middle] = grey[middle, middle]
    done, data = cv2.imencode(".png", dark)
    assert done
    return data.tobytes()


def sql(home):
    """The columns of each result, by its file's name, as anybody can read them."""
    query = f"SELECT source_name, {_COLUMNS} FROM result JOIN image ON image.id = image_id"
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        rows = connection.execute(query).fetchall()
    return {row[0]: dict(zip(_COLUMNS.split(", "), row[1:], strict=True)) for row in rows}


def test_a_dark_picture_is_refused_with_its_score_and_a_chest_is_scored(
    make_home, bundle, chest, dark
):
    home = make_home(MODEL=str(bundle), GATE="refuse")
    home.drop("chest.png", chest, old=True)
    home.drop("dark.png", dark, old=True)
    ran = home.run_once()
    assert ran.returncode == 0, ran.stderr
    assert "action=rejected" in ran.stderr
    assert "reason=not_frontal_chest" in ran.stderr
    assert "not_gated" not in ran.stderr
    rows = sql(home)
    refused, scored = rows["dark.png"], rows["chest.png"]
    assert (refused["state"], refused["reason"]) == ("rejected", "not_frontal_chest")
    assert refused["gate_score"] < 0.2
    assert refused["message"].startswith(
        f"content gate: 'frontal' scores {refused['gate_score']:.3f}, at least 0.200 is needed"
    )
    assert refused["lung_area"] == pytest.approx(1.0, abs=0.02)
    assert (refused["label"], refused["lung_share"], refused["uncertain_from"]) == (None,) * 3
    assert (scored["state"], scored["reason"]) == ("done", None)
    assert scored["label"] in ("COVID", "NEGATIVE", "UNCERTAIN")
    assert 0.2 < scored["gate_score"] < 0.8
    assert 0 < scored["lung_area"] < 1
    assert 0 < scored["uncertain_from"] < 1
    assert "not_gated" not in scored["flags"]
    assert [path.name for path in home.files("quarantine")] != []
    home.assert_settled([chest, dark])
    told = {row["source_name"]: row for row in home.results()}
    for name in ("gate_score", "lung_area", "lung_share", "uncertain_from"):
        assert told["chest.png"][name] == scored[name]
    refused_only = home.command("results", "list", "--status", "rejected", "--json")
    assert [row["gate_score"] for row in json.loads(refused_only.stdout)] == [refused["gate_score"]]


def test_what_was_refused_is_scored_and_flagged_once_the_gate_is_told_to(
    make_home, bundle, chest, dark
):
    home = make_home(MODEL=str(bundle), GATE="refuse")
    home.drop("dark.png", dark, old=True)
    home.run_once()
    (row,) = home.rows()
    assert home.command("retry", str(row.id)).returncode == 0
    ran = home.run_once({"GATE": "flag"})
    assert ran.returncode == 0, ran.stderr
    found = sql(home)["dark.png"]
    assert (found["state"], found["reason"]) == ("done", None)
    assert "not_frontal_chest" in json.loads(found["flags"])
    assert found["gate_score"] < 0.2
    assert found["label"] is not None
    listed = home.command("results", "list", "--flag", "not_frontal_chest", "--json")
    assert [one["id"] for one in json.loads(listed.stdout)] == [row.id]
    home.drop("chest.png", chest, old=True)
    assert home.run_once({"GATE": "flag"}).returncode == 0
    assert "not_frontal_chest" not in json.loads(sql(home)["chest.png"]["flags"])


def test_without_a_gate_the_result_the_log_and_doctor_say_so(
    make_home, chest, shipped_bundle, tmp_path
):
    bundle = gated.gateless_bundle(shipped_bundle, tmp_path)
    home = make_home(MODEL=str(bundle), GATE="refuse")
    home.drop("chest.png", chest, old=True)
    ran = home.run_once()
    assert ran.stderr.count("action=not_gated") == 1
    found = sql(home)["chest.png"]
    assert "not_gated" in json.loads(found["flags"])
    assert (found["gate_score"], found["lung_area"], found["lung_share"]) == (None,) * 3
    checks = json.loads(home.command("doctor", "--json").stdout)
    (check,) = [check for check in checks if check["name"] == "content gate"]
    assert check["ok"] is None
    assert "not_gated" in check["detail"]


def test_doctor_tells_the_checks_and_passes_with_a_gate_that_refuses_its_caricature(
    make_home, bundle
):
    home = make_home(MODEL=str(bundle), GATE="refuse")
    said = json.loads(home.command("doctor", "--json").stdout)
    checks = {check["name"]: check for check in said}
    assert checks["content gate"]["detail"] == (
        "frontal from 0.20, positive from 0.20; what fails is refused"
    )
    assert checks["synthetic X-ray"]["ok"] is True
    assert checks["model"]["ok"] is True


def test_a_bundle_whose_gate_is_missing_stops_the_start_by_name(make_home, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / bundle.name)
    (copy / "gate.onnx").unlink()
    home = make_home(MODEL=str(copy))
    ran = home.run_once()
    assert ran.returncode == 1
    assert "gate.onnx" in ran.stderr
    assert "Traceback" not in ran.stderr

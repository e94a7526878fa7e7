"""A site's calibration in the real daemon: made of its own results, named in what it decides."""

import json
import sqlite3
from contextlib import closing

import pytest

CASES = 64


@pytest.fixture(scope="module")
def home(make_home, picture):
    home = make_home()
    for number in range(CASES):
        home.drop(f"{number}.png", picture(number), old=True)
    ran = home.run_once()
    assert ran.returncode == 0, ran.stderr
    return home


@pytest.fixture(scope="module")
def truth(home):
    """The higher half of the scores is COVID but for every eighth case: identifier to truth."""
    query = "SELECT sha256 FROM result JOIN image ON image.id = image_id ORDER BY logit, sha256"
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        ranked = [sha256 for (sha256,) in connection.execute(query)]
    assert len(ranked) == CASES
    return {
        sha256: "COVID" if (place >= CASES // 2) != (place % 8 == 0) else "other"
        for place, sha256 in enumerate(ranked)
    }


def write(path, truth):
    path.write_text("sha256,truth\n" + "".join(f"{a},{b}\n" for a, b in truth.items()))
    return str(path)


def calibrate(home, path, *args):
    return home.command("calibrate", "--labels", path, "--error", "0.1", "--json", *args)


def test_a_calibration_decides_from_the_next_start_on(home, truth, picture, tmp_path):
    path = write(tmp_path / "truth.csv", truth)
    folder = home.root / "calibrations"
    before = home.results()
    assert {row["calibration"] for row in before} == {None}
    dry = calibrate(home, path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not folder.exists()

    made = calibrate(home, path)
    assert made.returncode == 0, made.stderr
    record = json.loads(made.stdout)
    assert (record["covid_cases"], record["other_cases"]) == (32, 32)
    assert record["cases"]["matched"] == CASES
    (file,) = folder.iterdir()
    assert file.name.startswith(f"guided-1.1.0-{record['model_sha256'][:12]}")
    patient_free = file.read_text()
    assert not any(sha256[:12] in patient_free for sha256 in truth)

    home.drop("new.png", picture(1000), old=True)
    ran = home.run_once()
    assert f"calibration={record['id']}" in ran.stderr
    (new,) = [row for row in home.results() if row["source_name"] == "new.png"]
    decision = record["decision"]
    assert new["calibration"] == record["id"]
    assert new["threshold"] == decision["threshold"]
    assert (new["uncertain_from"], new["uncertain_to"]) == (
        decision["uncertain_low"],
        decision["uncertain_high"],
    )
    assert [row for row in home.results() if row["source_name"] != "new.png"] == before

    shown = json.loads(home.command("model", "show", "guided-1.1.0", "--json").stdout)
    assert shown["site_calibration"]["id"] == record["id"]
    assert shown["decision"] != decision
    checks = {one["name"]: one for one in json.loads(home.command("doctor", "--json").stdout)}
    assert checks["calibration"]["ok"] is True
    assert record["id"] in checks["calibration"]["detail"]

    whole = file.read_text()
    file.write_text(whole.replace('"error": 0.1', '"error": 0.2'))
    refused = home.run_once()
    assert refused.returncode == 1
    assert "altered since it was made" in refused.stderr
    file.write_text(whole)

    removed = home.command("calibrate", "--remove")
    assert removed.returncode == 0, removed.stderr
    home.drop("newer.png", picture(1001), old=True)
    assert home.run_once().returncode == 0
    (newer,) = [row for row in home.results() if row["source_name"] == "newer.png"]
    assert newer["calibration"] is None
    assert newer["threshold"] == before[0]["threshold"]
    assert [path.name for path in (folder / "former").iterdir()] != []
    audited = json.loads(home.command("audit", "list", "--json").stdout)
    details = [row["detail"] for row in audited if row["action"] == "calibrate"]
    assert details[0] == {"removed": True}
    assert details[1]["calibration"] == record["id"]
    assert home.reconcile()[0] == 0


def test_what_does_not_match_is_named_and_counted(home, truth, tmp_path):
    ids = list(truth)
    some = {**truth, "f" * 64: "COVID", ids[0]: "perhaps"}
    said = calibrate(home, write(tmp_path / "truth.csv", some), "--error", "0.02")
    assert said.returncode == 1
    assert "identifiers that are not in the database: 1 ('ffff" in said.stderr
    assert "lines with neither COVID nor other: 1 ('perhaps')" in said.stderr
    assert "too few cases: 31 with COVID and 32 others" in said.stderr
    assert "needs 49 of each" in said.stderr


def test_where_nothing_matches_the_nearest_are_named(home, truth, tmp_path):
    known = next(iter(truth))
    said = calibrate(home, write(tmp_path / "truth.csv", {known[:60] + "0000": "COVID"}))
    assert said.returncode == 1
    assert "none of the 1 identifiers (sha256) is in the database" in said.stderr
    assert known in said.stderr


def test_a_result_of_another_model_is_asked_for(home, truth, tmp_path):
    said = home.command(
        *("calibrate", "--model", "baseline-1.1.0", "--labels"),
        write(tmp_path / "truth.csv", truth),
    )
    assert said.returncode == 1
    assert "images without a score of baseline-1.1.0: 64 (`lungwatch rescore" in said.stderr

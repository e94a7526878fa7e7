"""A negative answer with an opacity in the real daemon: row, JSON, CSV, flag, filter, overlay."""

import csv
import io
import json
import sqlite3
from contextlib import closing

import cv2
import pytest

pytest.importorskip("onnx")
gated = pytest.importorskip("tests.support.bundles")
# Of the bundle's calibration, slope 2 and intercept 1; the threshold is 0.5.
PRESENT, ABSENT = 0.25, -1.0
PROBABILITY = {PRESENT: 0.8175744761936437, ABSENT: 0.2689414213699951}


def scored(make_home, shipped_bundle, picture, folder, logit):
    """A home in which one picture was scored with an opacity of this logit."""
    bundle = gated.opacity_bundle(shipped_bundle, folder, logit=logit)
    home = make_home(MODEL=str(bundle))
    home.drop("chest.png", picture(1), old=True)
    ran = home.run_once()
    assert ran.returncode == 0, ran.stderr
    return home


@pytest.mark.parametrize("logit", [PRESENT, ABSENT])
def test_the_opacity_is_recorded_and_flagged_from_its_threshold(
    make_home, shipped_bundle, picture, tmp_path, logit
):
    home = scored(make_home, shipped_bundle, picture, tmp_path, logit)
    (row,) = home.results()
    assert row["label"] == "NEGATIVE"
    wanted = {"covid": row["probability"], "opacity": pytest.approx(PROBABILITY[logit], abs=1e-6)}
    assert row["findings"] == wanted
    assert ("other_opacity" in row["flags"]) is (logit == PRESENT)
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection:
        query = "SELECT json_extract(findings, '$.opacity') FROM result"
        assert connection.execute(query).fetchone() == (wanted["opacity"],)
    (told,) = csv.DictReader(io.StringIO(home.command("results", "list", "--csv").stdout))
    assert json.loads(told["findings"]) == wanted
    chosen = ("results", "list", "--json", "--finding", "opacity", "--min-score", "0.5")
    assert len(json.loads(home.command(*chosen).stdout)) == (logit == PRESENT)


def test_the_overlay_has_the_opacitys_map_only_where_there_is_one(
    make_home, shipped_bundle, picture, tmp_path
):
    """In colour beside the untouched X-ray; a plain negative answer has no colour on it."""
    shapes = []
    for logit in (PRESENT, ABSENT):
        folder = tmp_path / str(logit)
        folder.mkdir()
        home = scored(make_home, shipped_bundle, picture, folder, logit)
        (row,) = home.results()
        shapes.append(cv2.imread(row["overlay"]).shape)
    assert shapes[0][1] > shapes[1][1], "the pair is wider than the X-ray alone"

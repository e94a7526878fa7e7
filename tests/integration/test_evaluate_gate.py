"""`lungwatch evaluate --gate-images`, with a gate that looks at the mean grey value."""

import csv
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.main import main
from lungwatch.models import SHIPPED_DEFAULT

pytest.importorskip("onnx")
gated = pytest.importorskip("tests.support.bundles")

pytestmark = pytest.mark.slow
SHIPPED = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return gated.gated_bundle(SHIPPED, tmp_path_factory.mktemp("made"))


def draw(path: Path, grey: int, side: int = 80):
    rng = np.random.default_rng(grey)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = rng.normal(grey, 6, (side, side))
    # What is dark all over would be read as if it were of fewer bits.
    middle = slice(side // 2, side * 3 // 4)
    picture[middle, middle] = rng.normal(140, 20, picture[middle, middle].shape)
    assert cv2.imwrite(str(path), np.clip(picture, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, find_testdata):
    """`chest`: 3 grey pictures; `odd`: one dark, one bright, one too small, a CT; and a text."""
    root = tmp_path_factory.mktemp("pictures") / "some"
    for number, grey in enumerate((120, 130, 140)):
        draw(root / "chest" / f"{number}.png", grey)
    draw(root / "odd" / "deeper" / "dark.jpg", 12)
    draw(root / "odd" / "bright.png", 240)
    draw(root / "odd" / "small.png", 120, side=40)
    (root / "odd" / "slice").write_bytes(find_testdata("693_UNCR.dcm").read_bytes())
    (root / "odd" / "list.csv").write_text("a,b\n")
    return root


def invoke(*arguments: object):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_rates_are_told_by_folder_and_reason(bundle, pictures):
    result = invoke(bundle, "--gate-images", pictures, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["model"] == "gated-1.0.0"
    assert found["checks"] == {"frontal": 0.2, "positive": 0.2}
    rates = {rate["folder"]: rate for rate in found["rates"]}
    assert list(rates) == ["some/chest", "some/odd", "some/odd/deeper", "all"]
    assert (rates["some/chest"]["pictures"], rates["some/chest"]["kept_share"]) == (3, 1.0)
    odd = rates["some/odd"]
    assert odd["refused_by_gate"] == {"inverted": 1}
    assert odd["refused_by_reader"] == {"too_small": 1, "not_a_radiograph": 1}
    assert rates["some/odd/deeper"]["refused_by_gate"] == {"not_frontal_chest": 1}
    assert (rates["all"]["pictures"], rates["all"]["kept"]) == (7, 3)
    assert rates["all"]["refused_share"] == pytest.approx(4 / 7, abs=1e-6)


def test_copies_are_looked_at_too(bundle, pictures):
    result = invoke(bundle, "--gate-images", pictures / "odd" / "deeper", "--turned", "--json")
    rates = json.loads(result.stdout)["rates"]
    assert [(rate["variant"], rate["refused_by_gate"]) for rate in rates] == [
        ("as it is", {"not_frontal_chest": 1}),
        ("turned by 90°", {"not_frontal_chest": 1}),
        ("turned by 180°", {"not_frontal_chest": 1}),
        ("turned by 270°", {"not_frontal_chest": 1}),
        ("inverted", {"inverted": 1}),
    ]


def test_the_table_and_the_folder_with_a_plot(bundle, pictures, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")
    out = tmp_path / "out"
    result = invoke(bundle, "--gate-images", pictures, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[-1] == RESEARCH_USE_ONLY
    assert "not_a_radiograph 1, too_small 1" in result.stdout
    (chest,) = [line for line in lines if line.startswith("some/chest")]
    assert "100.0%" in chest
    assert "0.0%" in chest
    plot = cv2.imread(str(out / "gate.png"))
    assert plot is not None
    assert min(plot.shape[:2]) > 100
    assert json.loads((out / "gate.json").read_text())["note"] == RESEARCH_USE_ONLY
    with (out / "gate.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7
    dark = rows["odd/deeper/dark.jpg"]
    assert (dark["reason"], dark["check"]) == ("not_frontal_chest", "frontal")
    assert float(dark["score"]) == pytest.approx((15 * 12 + 140) / 16 / 255, abs=0.01)
    assert float(dark["lung_area"]) >= 0.9
    assert (rows["odd/slice"]["reason"], rows["odd/slice"]["check"]) == ("not_a_radiograph", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--turned",), "--turned needs --gate-images"),
        ((), "give DATA to evaluate on"),
        (("data", "--gate-images", "."), "DATA does not go with --gate-images"),
    ],
)
def test_what_makes_no_sense_together_is_a_usage_error(bundle, arguments, message):
    result = invoke(bundle, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_without_a_gate_and_a_folder_without_pictures_are_refused(bundle, tmp_path):
    plain = tmp_path / "none"
    plain.mkdir()
    result = invoke(bundle, "--gate-images", plain)
    assert (result.exit_code, result.stderr) == (
        1,
        f"lungwatch: error: {plain}: no DICOM, PNG or JPEG file in it\n",
    )
    draw(plain / "x.png", 100)
    without = invoke(gated.gateless_bundle(SHIPPED, tmp_path), "--gate-images", plain)
    assert (without.exit_code, without.stderr) == (
        1,
        "lungwatch: error: gateless-1.0.0 has no content gate\n",
    )


def test_it_needs_no_tensorflow(bundle, pictures):
    program = (
        "import sys; from lungwatch.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'tensorflow', 'keras', 'onnx', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "evaluate", bundle, "--gate-images", pictures],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr

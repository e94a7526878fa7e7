"""The content gate that ships keeps chest radiographs and refuses the rest for the right reason."""

import hashlib
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from lungwatch.bundle import read_bundle
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.errors import Reason
from lungwatch.imaging.reader import read_radiograph
from lungwatch.models import SHIPPED_STATEMENTS
from lungwatch.preprocess import golden_input, preprocess

MODELS = Path(str(resources.files("lungwatch.models")))
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def gate():
    found = Classifier.load(MODELS / "baseline-1.1.0", threads=1).gate
    assert found is not None
    return found


@pytest.fixture(scope="module")
def chest(rg1):
    return read_radiograph(rg1).pixels


def verdict(gate, pixels: np.ndarray):
    picture = np.ascontiguousarray(pixels, dtype=np.float32)
    (answer,) = gate.run(preprocess(picture, gate.contract.preprocess)[np.newaxis])
    return answer.verdict


def as_shown(path: Path) -> np.ndarray:
    """A DICOM file's pixels as a screenshot of it has them, whatever its tags say."""
    stored = pydicom.dcmread(path)
    grey = stored.pixel_array.astype(np.float32)
    low, high = np.percentile(grey, (0.5, 99.5))
    grey = np.clip((grey - low) / (high - low), 0, 1)
    return 1 - grey if stored.PhotometricInterpretation == "MONOCHROME1" else grey


def text_page(rng: np.random.Generator) -> np.ndarray:
    page = np.full((900, 700), 255, np.uint8)
    for row in range(50, 880, 34):
        line = " ".join(rng.choice(["report", "finding", "chest", "normal", "view"], 8))
        cv2.putText(page, line, (30, row), cv2.FONT_HERSHEY_SIMPLEX, 0.7, 0, 1)
    return page.astype(np.float32) / 255


def test_both_bundles_carry_the_same_gate_and_it_is_small():
    gates = [read_bundle(MODELS / name).gate for name in SHIPPED_STATEMENTS]
    assert len(gates) == 2
    assert gates[0] is not None
    assert gates[0] == gates[1]
    assert len(gates[0]) < 3_000_000


@pytest.mark.parametrize("name", SHIPPED_STATEMENTS)
def test_statements_and_card_of_a_shipped_bundle_are_its_own(name):
    files = read_bundle(MODELS / name)
    files.check_digests()
    assert hashlib.sha256(files.statement()).hexdigest() == SHIPPED_STATEMENTS[name]
    contract = Classifier.load(MODELS / name, threads=1).contract
    assert contract.gate is not None
    assert contract.map_reference is not None
    card = (files.card or b"").decode()
    for check in contract.gate.checks:
        assert f"| {check.name} |" in card
    for row in contract.gate.metrics["rates"]:
        assert f"| {row['pictures_of']} | {row['copies']} | {row['expected']} |" in card
    assert "JAX" in contract.gate.provenance["backend"]


def test_the_rates_hold_what_is_asked_of_a_gate(gate):
    rows = gate.contract.metrics["rates"]
    of = {(row["pictures_of"], row["copies"]): row for row in rows}
    assert {name for name, _ in of} >= {
        "open-cxr/val",
        "open-cxr/test",
        "covid-xray/test/COVID",
        "covid-xray/test/NORMAL",
        "lesions",
        "not-chest/bones",
        "not-chest/lateral",
    }
    for row in rows:
        kept = row["kept"] / row["pictures"]
        if row["expected"] == "refused":
            assert kept <= 0.02, row
        elif row["pictures"] >= 50:
            assert kept >= 0.98, row


def test_a_chest_radiograph_is_kept_in_every_exposure_and_mirrored(gate, chest):
    for picture in (chest, chest**0.7, chest**1.4, 0.2 + 0.5 * chest, chest[:, ::-1]):
        assert verdict(gate, picture).reason is None


@pytest.mark.parametrize("tilt", [-10, 5, 10])
def test_a_patient_who_leans_is_kept(gate, chest, tilt):
    rows, columns = chest.shape
    matrix = cv2.getRotationMatrix2D((columns / 2, rows / 2), tilt, 1)
    assert verdict(gate, cv2.warpAffine(chest, matrix, (columns, rows))).reason is None


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_chest_is_refused_as_rotated(gate, chest, quarters):
    found = verdict(gate, np.rot90(chest, quarters))
    assert (found.check, found.reason) == ("upright", Reason.ROTATED)
    assert found.score < 0.1


def test_inverted_grey_values_are_refused_as_such(gate, chest):
    found = verdict(gate, 1 - chest)
    assert (found.check, found.reason) == ("polarity", Reason.INVERTED)
    assert found.score < 0.1


@pytest.mark.parametrize(
    "name", ["RG3_UNCR.dcm", "693_UNCR.dcm", "CT_small.dcm", "MR_small.dcm", "MR2_UNCR.dcm"]
)
def test_a_leg_ct_and_mr_are_no_frontal_chest(gate, find_testdata, name):
    shown = as_shown(find_testdata(name))
    for picture in (shown, np.rot90(shown)):
        assert verdict(gate, picture).reason is Reason.NOT_FRONTAL_CHEST


@pytest.mark.parametrize(
    "picture",
    [
        RNG.random((400, 400)),
        np.kron(RNG.random((25, 20)), np.ones((16, 16))),
        np.tile(np.linspace(0, 1, 512), (512, 1)),
        np.hypot(*np.mgrid[-1:1:300j, -1:1:300j]),
        text_page(RNG),
        1 - text_page(RNG),
    ],
    ids=["noise", "blocks", "ramp", "rings", "text", "white text"],
)
def test_noise_ramps_and_text_are_no_frontal_chest(gate, picture):
    assert verdict(gate, picture).reason is Reason.NOT_FRONTAL_CHEST


def test_half_a_chest_is_no_frontal_chest(gate, chest):
    columns = chest.shape[1]
    for half in (chest[:, : columns // 2], chest[:, columns // 2 :]):
        assert verdict(gate, half).reason is Reason.NOT_FRONTAL_CHEST


def test_the_caricature_of_the_self_test_is_refused_and_its_scores_are_recorded(gate):
    """The golden picture shows that the file is whole, not that it is a chest."""
    contract = gate.contract
    (answer,) = gate.run(golden_input(contract.preprocess)[np.newaxis])
    assert answer.verdict.reason is Reason.NOT_FRONTAL_CHEST
    assert contract.golden_scores[0] < 0.1
    assert answer.verdict.score == pytest.approx(contract.golden_scores[0], abs=0.02)

"""The real chest radiograph in its encodings is scored alike; all else is refused by name."""

from io import BytesIO

import cv2
import numpy as np
import pydicom
import pytest

LEG = ("RG3_UNCR.dcm", "RG3_J2KR.dcm", "RG3_J2KI.dcm")
CHEST = ("RG1_UNCR.dcm", "RG1_J2KR.dcm", "RG1_J2KI.dcm")
# What is left, in bytes or as a share: of the head, the attributes, the pixels, nearly all.
CUTS = (200, 1000, 0.3, 0.9, 0.999)


def light_box(content):
    """Render a MONOCHROME1 file without lungwatch: uint8, air dark."""
    stored = pydicom.dcmread(BytesIO(content)).pixel_array.astype(np.float64)
    low, high = np.percentile(stored, (1, 99))
    return (255 - np.clip((stored - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def cut(content, length):
    return content[: length if isinstance(length, int) else int(len(content) * length)]


@pytest.fixture(scope="module")
def contents(sample):
    files = {name: sample(name) for name in (*CHEST, *LEG, "CT_small.dcm", "MR_small.dcm")}
    is_encoded, png = cv2.imencode(".png", light_box(files["RG1_UNCR.dcm"]))
    assert is_encoded
    files["chest.png"] = png.tobytes()
    for name in ("RG1_UNCR.dcm", "RG1_J2KR.dcm", "chest.png"):
        files |= {f"cut {length} {name}": cut(files[name], length) for length in CUTS}
    files["note.txt"] = b"The X-ray follows by post.\n"
    return files


@pytest.fixture(scope="module")
def home(make_home, contents):
    home = make_home()
    with home.daemon() as daemon:
        for name, content in contents.items():
            home.drop(name, content)
        home.wait_until_ended(contents.values())
        assert daemon.stop() == 0
    return home


@pytest.fixture(scope="module")
def results(home):
    return {result["source_name"]: result for result in home.results()}


def test_lossless_twins_get_the_same_probability(results):
    uncompressed, lossless = (results[name] for name in CHEST[:2])
    assert uncompressed["status"] == lossless["status"] == "done"
    assert abs(uncompressed["probability"] - lossless["probability"]) <= 1e-6
    assert uncompressed["label"] == lossless["label"]


@pytest.mark.parametrize("name", ["RG1_J2KI.dcm", "chest.png"])
def test_a_lossy_or_8_bit_copy_gets_nearly_the_same_probability(results, name):
    assert results[name]["status"] == "done"
    assert abs(results[name]["probability"] - results["RG1_UNCR.dcm"]["probability"]) <= 0.03


@pytest.mark.parametrize("name", [*CHEST, "chest.png"])
def test_the_overlay_shows_the_xray_neither_mirrored_nor_inverted(results, contents, name):
    """Wherever in the overlay the X-ray lies: as rendered here, lungs dark, it fits best."""
    overlay = cv2.imread(results[name]["overlay"])
    assert overlay is not None
    # The colours of the map come with their own brightness: compare what lies under them.
    grey = cv2.cvtColor(overlay, cv2.COLOR_BGR2GRAY)
    expected = light_box(contents["RG1_UNCR.dcm"])

    def fit(picture):
        # The longest side of the X-ray in the overlay is a setting, 1024 pixels by default.
        scale = 1024 / max(picture.shape)
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        shown = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        return float(cv2.matchTemplate(grey, shown, cv2.TM_CCOEFF_NORMED).max())

    right = fit(expected)
    assert right > 0.85
    assert fit(np.ascontiguousarray(expected[:, ::-1])) < right - 0.05
    assert fit(np.ascontiguousarray(expected[::-1])) < right - 0.2
    assert fit(255 - expected) < 0.3


@pytest.mark.parametrize("name", LEG)
def test_a_leg_is_rejected_and_the_message_names_the_body_part(results, name):
    result = results[name]
    assert (result["status"], result["reason"]) == ("rejected", "wrong_body_part")
    assert "EXTREMITY" in result["message"]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_another_modality_is_rejected_and_the_message_names_it(results, modality):
    result = results[f"{modality}_small.dcm"]
    assert (result["status"], result["reason"]) == ("rejected", "not_a_radiograph")
    assert f"modality {modality} " in result["message"]


@pytest.mark.parametrize("length", CUTS)
@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG1_J2KR.dcm", "chest.png"])
def test_a_file_that_was_cut_off_is_rejected_as_truncated(results, name, length):
    result = results[f"cut {length} {name}"]
    assert (result["status"], result["reason"]) == ("rejected", "truncated")
    assert "ends" in result["message"]


def test_a_text_is_rejected_as_no_image(results):
    assert results["note.txt"]["reason"] == "not_an_image"


def test_what_is_rejected_has_no_score_and_no_overlay(results):
    rejected = [result for result in results.values() if result["status"] == "rejected"]
    assert rejected
    for result in rejected:
        assert {result[key] for key in ("probability", "label", "overlay")} == {None}


def test_every_file_is_kept_byte_for_byte_and_the_record_agrees(home, contents):
    home.assert_settled(contents.values())
    assert home.files("incoming", "work") == []

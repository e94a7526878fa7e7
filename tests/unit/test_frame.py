"""Frames around an X-ray are cut; air, bodies and what is missing stay."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging.geometry import frame_box
from lungwatch.imaging.radiograph import Radiograph, ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, golden_pixels, preprocess
from lungwatch.training.data.pixels import read_lung_masks, read_pixels
from tests.support.radiographs import radiograph, read

LEVELS = {"black": 0, "white": 255, "grey": 128, "dark grey": 40}


@pytest.fixture(scope="module")
def chest(rg1: Path) -> np.ndarray:
    """A real chest radiograph, 8 bits, 488 x 460."""
    pixels = read_radiograph(rg1).pixels
    small = cv2.resize(pixels, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    return np.round(small * 255).astype(np.uint8)


def _read(image: np.ndarray, tmp_path: Path, suffix: str = ".png", *options: int) -> Radiograph:
    path = tmp_path / f"image{suffix}"
    path.write_bytes(cv2.imencode(suffix, image, list(options))[1].tobytes())
    return read_radiograph(path)


def _framed(image: np.ndarray, rows: int, columns: int, level: int) -> np.ndarray:
    canvas = np.full((image.shape[0] + 2 * rows, image.shape[1] + 2 * columns), level, np.uint8)
    canvas[rows : rows + image.shape[0], columns : columns + image.shape[1]] = image
    return canvas


def _assert_is(found: Radiograph, image: np.ndarray, lines: int = 5) -> None:
    """Compare with the X-ray alone; a few lines of its own black edge may be gone as well."""
    assert Flag.FRAME_REMOVED in found.flags
    for side, whole in zip(found.pixels.shape, image.shape, strict=True):
        assert whole - lines <= side <= whole + 2
    spec = PreprocessSpec(size_px=64)
    alone = preprocess(image.astype(np.float32) / 255, spec)
    assert np.abs(preprocess(found.pixels, spec) - alone).mean() < 0.03


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_frame_of_any_grey_value_is_cut(
    chest: np.ndarray, tmp_path: Path, level: int, share: float
) -> None:
    rows, columns = (round(side * share) for side in chest.shape)
    _assert_is(_read(_framed(chest, rows, columns, level), tmp_path), chest)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 200), (180, 0)], ids=["letterbox", "upright"])
def test_bars_are_cut(
    chest: np.ndarray, tmp_path: Path, level: int, rows: int, columns: int
) -> None:
    _assert_is(_read(_framed(chest, rows, columns, level), tmp_path), chest)


@pytest.mark.parametrize("quality", [60, 75, 90])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_what_jpeg_leaves_of_a_frame_is_cut(
    chest: np.ndarray, tmp_path: Path, level: int, quality: int
) -> None:
    image = _framed(chest, 61, 43, level)
    _assert_is(_read(image, tmp_path, ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality), chest, lines=9)


def test_frames_in_frames_are_cut(chest: np.ndarray, tmp_path: Path) -> None:
    film = _framed(chest, 0, 90, 0)
    _assert_is(_read(_framed(film, 40, 40, 255), tmp_path), chest)
    lined = _framed(_framed(chest, 2, 2, 255), 60, 60, 0)
    _assert_is(_read(lined, tmp_path), chest)


def test_the_panels_of_a_viewer_are_cut(chest: np.ndarray, tmp_path: Path) -> None:
    canvas = np.full((560, 960), 40, np.uint8)
    canvas[30 : 30 + chest.shape[0], 200 : 200 + chest.shape[1]] = chest
    for line in range(9):
        cv2.putText(canvas, f"Study {line}", (12, 50 + line * 50), 0, 0.6, 230, 1)
    _assert_is(_read(canvas, tmp_path), chest)


def test_a_title_and_a_name_beside_the_picture_are_cut(chest: np.ndarray, tmp_path: Path) -> None:
    slide = np.full((620, 960), 255, np.uint8)
    slide[100 : 100 + chest.shape[0], 260 : 260 + chest.shape[1]] = chest
    cv2.putText(slide, "Case 12: cough and fever", (200, 60), 0, 1.0, 0, 2)
    _assert_is(_read(slide, tmp_path), chest)
    film = _framed(chest, 60, 160, 0)
    cv2.putText(film, "R", (100, 120), 0, 1.4, 255, 2)
    cv2.putText(film, "NAME 1950", (6, 40), 0, 0.5, 255, 1)
    _assert_is(_read(film, tmp_path), chest)


def test_a_frame_in_dicom_is_cut_and_the_file_described_as_it_is(
    chest: np.ndarray, tmp_path: Path
) -> None:
    framed = _framed(chest, 50, 70, 255).astype(np.uint16) * 16
    found = read(radiograph(framed), tmp_path)
    _assert_is(found, chest)
    assert (found.meta.rows, found.meta.columns) == framed.shape
    assert found.kept is not None
    assert found.kept.top == pytest.approx(50, abs=2)


def _gradient(side: int = 300) -> np.ndarray:
    """Neither bright nor dark along any of its sides."""
    return np.asarray(50 + np.indices((side, side)).sum(axis=0) * 3 % 150, np.uint8)


def _slope() -> np.ndarray:
    """Ever brighter downwards, each line of one grey value."""
    return np.linspace(20, 235, 90_000).reshape(300, 300).astype(np.uint8)


def _body() -> np.ndarray:
    """A round body in front of black air, its edge as sharp as can be."""
    canvas = np.zeros((400, 400), np.uint8)
    cv2.ellipse(canvas, (200, 260), (150, 240), 0, 0, 360, 180, -1)
    return canvas


def _half() -> np.ndarray:
    """An image whose second half never came."""
    image = _gradient()
    image[150:] = 0
    return image


def _thin() -> np.ndarray:
    return _framed(_gradient(), 4, 4, 0)


def _noise() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (256, 256)).astype(np.uint8)


def _slit() -> np.ndarray:
    return _framed(_gradient()[:30], 200, 0, 0)


@pytest.mark.parametrize("make", [_gradient, _slope, _body, _half, _thin, _noise, _slit])
def test_what_is_no_frame_stays(make: Callable[[], np.ndarray]) -> None:
    assert frame_box(make().astype(np.float32) / 255) is None


def test_the_radiographs_at_hand_stay_whole(rg1: Path) -> None:
    assert frame_box(read_radiograph(rg1).pixels) is None
    assert frame_box(golden_pixels()) is None
    assert read_radiograph(rg1).flags == ()


def test_air_beside_a_patient_stays(chest: np.ndarray) -> None:
    """Shoulders slope: the air above them is no frame, however black it is."""
    pixels = chest.astype(np.float32) / 255
    rows, columns = np.mgrid[0 : chest.shape[0], 0 : chest.shape[1]]
    half = chest.shape[1] / 2
    is_air = rows < 120 * np.abs(columns - half) / half
    pixels[is_air] = 0
    assert frame_box(pixels) is None


def test_a_picture_too_small_for_its_frame_is_refused_for_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = _framed(_gradient(100), 60, 60, 0)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    assert read_radiograph(path, ReadPolicy(min_side_px=90)).pixels.shape == (100, 100)
    with pytest.raises(FileRejected) as caught:
        read_radiograph(path, ReadPolicy(min_side_px=128))
    assert caught.value.reason is Reason.TOO_SMALL


def test_large_images_are_cut_to_the_line(tmp_path: Path) -> None:
    """Looked for on a thinned image, and nothing of the frame is left."""
    canvas = np.full((2300, 3100), 255, np.uint8)
    canvas[101:2203, 217:2917] = cv2.resize(_gradient(), (2700, 2102))
    box = frame_box(canvas.astype(np.float32) / 255)
    assert box is not None
    assert 101 <= box.top <= 107
    assert 2197 <= box.bottom <= 2203
    assert 217 <= box.left <= 223
    assert 2911 <= box.right <= 2917


def test_training_sees_what_the_daemon_sees(chest: np.ndarray, tmp_path: Path) -> None:
    class Sample:
        path = tmp_path / "image.png"

    spec = PreprocessSpec(size_px=64)
    found = _read(_framed(chest, 60, 60, 255), tmp_path)
    (pixels,) = read_pixels([Sample()], spec, workers=1)
    assert (pixels == preprocess(found.pixels, spec)).all()


def test_a_lung_mask_is_cut_with_its_image(chest: np.ndarray, tmp_path: Path) -> None:
    mask = np.zeros_like(chest)
    mask[100:300, 60:200] = 255
    spec = PreprocessSpec(size_px=64)
    masks = []
    for name, image, drawn in (
        ("alone", chest, mask),
        ("framed", _framed(chest, 90, 50, 255), _framed(mask, 90, 50, 0)),
    ):
        folder = tmp_path / name
        for part, picture in (("images", image), ("masks", drawn)):
            (folder / part).mkdir(parents=True)
            (folder / part / "x.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        masks.append(read_lung_masks(folder, spec).masks[0])
    assert np.abs(masks[0] - masks[1]).mean() < 0.01

"""Colour channels in every format: grey and tinted pictures are read, coloured ones refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging.radiograph import Radiograph
from lungwatch.imaging.reader import read_radiograph

Rgb = NDArray[np.uint8]


@pytest.fixture(scope="module")
def grey(rg1: Path) -> NDArray[np.float64]:
    stored = pydicom.dcmread(rg1).pixel_array.astype(np.float32)
    shown = np.clip(1 - stored / 30000, 0, 1)
    size = shown.shape[1] // 4, shown.shape[0] // 4
    return cv2.resize(shown, size, interpolation=cv2.INTER_AREA).astype(np.float64)


def png(picture: Rgb) -> bytes:
    done, data = cv2.imencode(".png", picture[:, :, ::-1])
    assert done
    return data.tobytes()


def jpeg(picture: Rgb) -> bytes:
    done, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert done
    return data.tobytes()


def dicom(picture: Rgb) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.13"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = picture.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = picture.tobytes()
    dataset["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def rgb(red: Any, green: Any, blue: Any) -> Rgb:
    return np.dstack([np.clip(255 * np.asarray(c), 0, 255) for c in (red, green, blue)]).astype(
        np.uint8
    )


FORMATS = pytest.mark.parametrize("encode", [png, jpeg, dicom])


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Radiograph]:
    def read_one(data: bytes) -> Radiograph:
        path = tmp_path / "picture"
        path.write_bytes(data)
        return read_radiograph(path)

    return read_one


def assert_read(radiograph: Radiograph, grey: NDArray[np.float64]) -> None:
    assert radiograph.pixels.shape == grey.shape
    assert np.corrcoef(radiograph.pixels.ravel(), grey.ravel())[0, 1] > 0.99


def assert_refused(read: Any, data: bytes) -> None:
    with pytest.raises(FileRejected, match="in colours") as caught:
        read(data)
    assert caught.value.reason is Reason.UNSUPPORTED_PIXEL_FORMAT


@FORMATS
class TestTints:
    """Films are blue or clear, light boxes and telephones warm or cold."""

    @pytest.mark.parametrize(
        ("black", "white"),
        [
            ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
            ((0.0, 0.08, 0.24), (0.8, 0.86, 1.0)),
            ((0.1, 0.2, 0.35), (0.75, 0.9, 1.0)),
            ((0.15, 0.08, 0.0), (1.0, 0.9, 0.65)),
            ((0.05, 0.15, 0.08), (0.75, 0.95, 0.8)),
            ((0.0, 0.0, 0.0), (1.0, 0.85, 0.6)),
        ],
    )
    def test_one_tint_is_read(
        self,
        read: Any,
        grey: NDArray[np.float64],
        encode: Callable[[Rgb], bytes],
        black: tuple[float, ...],
        white: tuple[float, ...],
    ) -> None:
        picture = rgb(*(low + (high - low) * grey for low, high in zip(black, white, strict=True)))
        assert_read(read(encode(picture)), grey)

    def test_a_tinted_film_on_a_white_light_box_is_read(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes]
    ) -> None:
        film = rgb(0.05 + 0.7 * grey, 0.12 + 0.75 * grey, 0.25 + 0.75 * grey)
        box = np.full((grey.shape[0] + 60, grey.shape[1] + 60, 3), 250, dtype=np.uint8)
        box[30:-30, 30:-30] = film
        # The reader may cut the box off, a frame.
        assert min(read(encode(box)).pixels.shape) >= min(grey.shape) - 8

    def test_warm_light_that_falls_off_to_the_sides_is_read(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes]
    ) -> None:
        rows, columns = np.indices(grey.shape)
        light = 1 - 0.25 * np.hypot(rows - 244, columns - 230) / 335
        lit = grey * light
        assert_read(read(encode(rgb(lit, 0.9 * lit, 0.75 * lit))), lit)

    def test_a_logo_and_a_side_mark_in_colours_are_read(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes]
    ) -> None:
        picture = rgb(grey, grey, grey)
        picture[10:50, 10:70] = (220, 30, 30)
        picture[20:50, 400:430] = (20, 60, 220)
        assert_read(read(encode(picture)), grey)


@FORMATS
class TestColours:
    @pytest.mark.parametrize(
        "name", ["JET", "HOT", "VIRIDIS", "TURBO", "RAINBOW", "COOL", "INFERNO", "PARULA"]
    )
    def test_a_colour_scale_is_refused(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes], name: str
    ) -> None:
        scale = getattr(cv2, f"COLORMAP_{name}")
        picture = cv2.applyColorMap((grey * 255).astype(np.uint8), scale)[:, :, ::-1]
        assert_refused(read, encode(np.ascontiguousarray(picture).astype(np.uint8)))

    def test_an_x_ray_under_a_heat_map_is_refused(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes]
    ) -> None:
        rows, columns = np.indices(grey.shape)
        heat = np.exp(-(((rows - 250) / 90) ** 2 + ((columns - 150) / 70) ** 2))
        scale = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
        picture = 0.6 * rgb(grey, grey, grey) + 0.4 * scale
        assert_refused(read, encode(picture.astype(np.uint8)))

    def test_a_photograph_is_refused(self, read: Any, encode: Callable[[Rgb], bytes]) -> None:
        rows, columns = np.indices((300, 400))
        picture = rgb(
            0.78 - rows / 2500, 0.55 + 0.16 * np.sin(columns / 30), 0.24 + 0.15 * rows / 255
        )
        rng = np.random.default_rng(3)
        for _ in range(40):
            center = int(rng.integers(400)), int(rng.integers(300))
            colour = tuple(int(v) for v in rng.integers(0, 255, 3))
            cv2.circle(picture, center, int(rng.integers(8, 40)), colour, -1)
        assert_refused(read, encode(picture))

    def test_two_tints_are_refused(
        self, read: Any, grey: NDArray[np.float64], encode: Callable[[Rgb], bytes]
    ) -> None:
        picture = rgb(grey, 0.8 * grey, 0.6 * grey)
        picture[:, 230:] = picture[:, 230:, ::-1]
        assert_refused(read, encode(picture))


class TestPngKinds:
    @pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
    def test_colours_in_any_kind_are_refused(
        self, read: Any, grey: NDArray[np.float64], mode: str
    ) -> None:
        scale = cv2.applyColorMap((grey * 255).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(scale)).convert(mode).save(buffer, "PNG")
        assert_refused(read, buffer.getvalue())

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "RGB"])
    def test_grey_in_any_kind_is_read(
        self, read: Any, grey: NDArray[np.float64], mode: str
    ) -> None:
        buffer = io.BytesIO()
        Image.fromarray((grey * 255).astype(np.uint8)).convert(mode).save(buffer, "PNG")
        assert_read(read(buffer.getvalue()), grey)

    @pytest.mark.parametrize("bits", [8, 10, 12, 14, 15])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_fewer_bits_than_sixteen_are_as_bright_as_sixteen(
        self, read: Any, grey: NDArray[np.float64], bits: int, channels: int
    ) -> None:
        stored = np.rint(grey * (2**bits - 1)).astype(np.uint16)
        image = stored if channels == 1 else np.dstack([stored] * 3)
        done, data = cv2.imencode(".png", image)
        assert done
        shown = read(data.tobytes())
        assert np.abs(shown.pixels - grey).max() < 1 / 255
        assert shown.flags == (Flag.DEPTH_CORRECTED,)
        assert shown.meta.bits_stored == bits

    @pytest.mark.parametrize("brightness", [0.06, 0.125, 0.25])
    def test_a_nearly_black_picture_is_shown_in_its_own_range(
        self, read: Any, grey: NDArray[np.float64], brightness: float
    ) -> None:
        for white, kind in ((255, np.uint8), (65535, np.uint16)):
            done, data = cv2.imencode(".png", np.rint(grey * brightness * white).astype(kind))
            assert done
            shown = read(data.tobytes())
            assert_read(shown, grey)
            assert abs(float(shown.pixels.mean()) - float(grey.mean())) < 0.06
            assert shown.flags == (Flag.DEPTH_CORRECTED,)

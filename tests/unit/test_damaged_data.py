"""Entropy-coded data with foreign bytes in them are refused, sound data of many encoders are read.

Damage that keeps to every rule of its stream cannot be found; how much that is, is held here.
"""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.codestream import has_seam
from lungwatch.imaging.reader import read_radiograph

Samples = NDArray[Any]
SOS, EOI = b"\xff\xda", b"\xff\xd9"


@pytest.fixture(scope="module")
def chest(rg1: Path) -> Samples:
    """The real chest radiograph, air dark, 12 bits, (488, 460)."""
    stored = pydicom.dcmread(rg1).pixel_array.astype(np.float32)
    shown = np.clip(1 - stored / 30000, 0, 1)
    size = shown.shape[1] // 4, shown.shape[0] // 4
    small = cv2.resize(shown, size, interpolation=cv2.INTER_AREA)
    return np.rint(small * 4095).astype(np.uint16)


@pytest.fixture(scope="module")
def chest8(chest: Samples) -> Samples:
    return (chest >> 4).astype(np.uint8)


@pytest.fixture
def verdict(tmp_path: Path) -> Callable[[bytes], Reason | None]:
    """The reason of a refusal, None for what is read."""

    def verdict_on(data: bytes) -> Reason | None:
        path = tmp_path / "image"
        path.write_bytes(data)
        try:
            read_radiograph(path)
        except FileRejected as refusal:
            return refusal.reason
        return None

    return verdict_on


def pillow(image: Samples, mode: str | None = None, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def opencv(image: Samples, *settings: int) -> bytes:
    done, data = cv2.imencode(".jpg", image, settings)
    assert done
    return data.tobytes()


def overwritten(data: bytes, size: int, seed: int, start: int, end: int) -> bytes:
    rng = np.random.default_rng(seed)
    place = int(rng.integers(start, end - size))
    return data[:place] + rng.bytes(size) + data[place + size :]


def dicom(stored: Samples, bits: int, frame: bytes, syntax: UID) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.12"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def run_length_encoded(stored: Samples, bits: int) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(stored, bits, bytes(2), ExplicitVRLittleEndian)))
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset["PixelData"].is_undefined_length = False
    dataset.compress(RLELossless, generate_instance_uid=False)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    return bytes(frame)


def lossless(stored: Samples, bits: int, predictor: int = 1) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(stored, lossless=True, predictor=predictor, bitspersample=bits)
    )


class TestUndamagedFiles:
    @pytest.mark.parametrize("quality", [20, 75, 95, 100])
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("optimize", [False, True])
    def test_of_pillow_are_read(
        self, verdict: Any, chest8: Samples, quality: int, progressive: bool, optimize: bool
    ) -> None:
        settings = {"quality": quality, "progressive": progressive, "optimize": optimize}
        assert verdict(pillow(chest8, **settings)) is None
        for subsampling in (0, 1, 2):
            data = pillow(chest8, "RGB", subsampling=subsampling, **settings)
            assert verdict(data) is None
        assert verdict(pillow(chest8, "CMYK", **settings)) is None

    @pytest.mark.parametrize("restart", [0, 1, 7, 64])
    @pytest.mark.parametrize("progressive", [0, 1])
    @pytest.mark.parametrize("sampling", [0x111111, 0x211111, 0x221111, 0x411111, 0x121111])
    def test_of_opencv_are_read(
        self, verdict: Any, chest8: Samples, restart: int, progressive: int, sampling: int
    ) -> None:
        settings = (
            *(cv2.IMWRITE_JPEG_RST_INTERVAL, restart),
            *(cv2.IMWRITE_JPEG_PROGRESSIVE, progressive),
        )
        assert verdict(opencv(chest8, *settings)) is None
        colour = cv2.cvtColor(chest8, cv2.COLOR_GRAY2BGR)
        settings = (*settings, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling)
        assert verdict(opencv(colour, *settings)) is None

    def test_of_imagecodecs_are_read(self, verdict: Any, chest8: Samples) -> None:
        for level in (50, 90, 100):
            assert verdict(bytes(imagecodecs.jpeg8_encode(chest8, level=level))) is None
        colour = cv2.cvtColor(chest8, cv2.COLOR_GRAY2RGB)
        for outcolorspace in ("YCBCR", "RGB"):
            data = imagecodecs.jpeg8_encode(colour, level=90, outcolorspace=outcolorspace)
            assert verdict(bytes(data)) is None

    def test_with_a_thumbnail_or_with_bytes_behind_their_end_are_read(
        self, verdict: Any, chest8: Samples
    ) -> None:
        data = pillow(chest8, quality=90)
        thumbnail = b"Exif\0\0" + pillow(chest8[::4, ::4])
        segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
        assert verdict(data[:2] + segment + data[2:]) is None
        for rest in (b"\0", bytes(1000), b"junk" * 100, data):
            assert verdict(data + rest) is None

    @pytest.mark.parametrize("height", [64, 65, 71, 72, 200])
    def test_of_any_size_are_read(self, verdict: Any, chest8: Samples, height: int) -> None:
        for width in (64, 67, 100, 331):
            assert verdict(opencv(np.ascontiguousarray(chest8[:height, :width]))) is None

    def test_with_a_frame_or_a_rectangle_have_no_seam(self, verdict: Any, chest8: Samples) -> None:
        for top, left in ((64, 0), (64, 64), (61, 3), (0, 80)):
            framed = np.pad(chest8, ((top, top), (left, left)))
            assert verdict(opencv(framed)) is None
        boxed = chest8.copy()
        boxed[80:160, 96:304] = 0
        assert verdict(opencv(boxed)) is None


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("settings", "size", "share"),
        [
            ((), 512, 1.0),
            ((), 64, 0.97),
            ((), 16, 0.88),
            ((cv2.IMWRITE_JPEG_PROGRESSIVE, 1), 512, 0.95),
            ((cv2.IMWRITE_JPEG_PROGRESSIVE, 1), 64, 0.7),
            ((cv2.IMWRITE_JPEG_RST_INTERVAL, 8), 512, 1.0),
            ((cv2.IMWRITE_JPEG_RST_INTERVAL, 8), 64, 0.95),
        ],
    )
    def test_are_refused_as_damaged(
        self, verdict: Any, chest8: Samples, settings: tuple[int, ...], size: int, share: float
    ) -> None:
        data = opencv(chest8, cv2.IMWRITE_JPEG_QUALITY, 95, *settings)
        start = data.index(SOS) + 10
        verdicts = [
            verdict(overwritten(data, size, seed, start, len(data) - 2)) for seed in range(100)
        ]
        assert verdicts.count(Reason.DAMAGED) >= share * len(verdicts)
        assert set(verdicts) <= {Reason.DAMAGED, None}

    @pytest.mark.parametrize("settings", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)])
    def test_whose_data_end_early_or_late_are_refused(
        self, verdict: Any, chest8: Samples, settings: tuple[int, ...]
    ) -> None:
        data = opencv(chest8, *settings)
        for missing in (8, 100, 5000):
            assert verdict(data[: -2 - missing] + EOI) is Reason.DAMAGED
        assert verdict(data[:-2] + b"\x12\x34" * 20 + EOI) is Reason.DAMAGED

    def test_with_a_restart_interval_missing_or_twice_are_refused(
        self, verdict: Any, chest8: Samples
    ) -> None:
        data = opencv(chest8, cv2.IMWRITE_JPEG_RST_INTERVAL, 16)
        first, second, third = (data.index(bytes((0xFF, 0xD0 + n))) for n in range(3))
        assert verdict(data[:first] + data[second:]) is Reason.DAMAGED
        assert verdict(data[:third] + data[second:]) is Reason.DAMAGED

    def test_whose_greys_shift_from_one_block_on_are_refused(self, chest8: Samples) -> None:
        """What is left of damage where the codes are right again behind it."""
        units = chest8.astype(np.int16)
        assert not has_seam(chest8, block=(8, 8), white=255)
        for row, column, step in ((20, 17, 12), (40, 40, -9), (5, 30, 30)):
            shifted = units.copy()
            shifted[8 * row + 8 :] += step
            shifted[8 * row : 8 * row + 8, 8 * column :] += step
            assert has_seam(np.clip(shifted, 0, 255).astype(np.uint8), block=(8, 8), white=255)

    def test_of_12_bits_are_called_unsupported(self, verdict: Any, chest: Samples) -> None:
        data = bytes(imagecodecs.jpeg8_encode(chest, level=95, bitspersample=12))
        assert verdict(data) is Reason.UNSUPPORTED_PIXEL_FORMAT


STREAMS: list[tuple[str, UID, int, Callable[[Samples], bytes], float]] = [
    (
        "baseline",
        JPEGBaseline8Bit,
        8,
        lambda p: bytes(imagecodecs.jpeg8_encode(p, level=95)),
        0.97,
    ),
    (
        "extended",
        JPEGExtended12Bit,
        12,
        lambda p: bytes(imagecodecs.jpeg8_encode(p, level=95, bitspersample=12)),
        0.95,
    ),
    ("lossless SV1", JPEGLosslessSV1, 12, lambda p: lossless(p, 12), 0.97),
    ("lossless SV1, 16 bits", JPEGLosslessSV1, 16, lambda p: lossless(p * 16, 16), 0.95),
    ("lossless, predictor 7", JPEGLossless, 12, lambda p: lossless(p, 12, 7), 0.97),
    ("lossless of 8 bits", JPEGLosslessSV1, 8, lambda p: lossless(p, 8), 0.95),
    ("JPEG-LS", JPEGLSLossless, 12, lambda p: bytes(imagecodecs.jpegls_encode(p)), 1.0),
    (
        "JPEG-LS, near",
        JPEGLSNearLossless,
        12,
        lambda p: bytes(imagecodecs.jpegls_encode(p, level=4)),
        1.0,
    ),
    ("RLE", RLELossless, 12, lambda p: run_length_encoded(p, 12), 0.6),
]
_NAMES = [name for name, *_ in STREAMS]


class TestDicom:
    @pytest.mark.parametrize(("name", "syntax", "bits", "encode", "share"), STREAMS, ids=_NAMES)
    def test_damaged_streams_are_refused_and_sound_ones_read(
        self,
        verdict: Any,
        chest: Samples,
        chest8: Samples,
        name: str,
        syntax: UID,
        bits: int,
        encode: Callable[[Samples], bytes],
        share: float,
    ) -> None:
        stored = chest8 if bits == 8 else chest
        frame = encode(stored)
        assert verdict(dicom(stored, bits, frame, syntax)) is None
        verdicts = [
            verdict(dicom(stored, bits, overwritten(frame, 128, seed, 800, len(frame) - 2), syntax))
            for seed in range(40)
        ]
        assert verdicts.count(Reason.DAMAGED) >= share * len(verdicts)
        assert set(verdicts) <= {Reason.DAMAGED, None}

    @pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless])
    def test_jpeg_2000_with_a_marker_among_its_data_is_refused(
        self, verdict: Any, chest: Samples, syntax: UID
    ) -> None:
        if syntax == HTJ2KLossless:
            frame = bytes(imagecodecs.htj2k_encode(chest, reversible=True))
        else:
            frame = bytes(
                imagecodecs.jpeg2k_encode(
                    chest, level=0, reversible=True, codecformat="j2k", bitspersample=12
                )
            )
        assert verdict(dicom(chest, 12, frame, syntax)) is None
        verdicts = [
            verdict(dicom(chest, 12, overwritten(frame, 512, seed, 300, len(frame) - 2), syntax))
            for seed in range(40)
        ]
        # A block coder takes any bytes but these for an image.
        assert verdicts.count(Reason.DAMAGED) >= 0.4 * len(verdicts)
        assert set(verdicts) <= {Reason.DAMAGED, None}
        middle = len(frame) // 2
        with_marker = frame[:middle] + b"\xff\xf0" + frame[middle + 2 :]
        assert verdict(dicom(chest, 12, with_marker, syntax)) is Reason.DAMAGED

    @pytest.mark.parametrize("kept", [0.3, 0.9])
    @pytest.mark.parametrize(("name", "syntax", "bits", "encode", "share"), STREAMS, ids=_NAMES)
    def test_a_stream_that_ends_early_within_a_whole_file_is_refused(
        self,
        verdict: Any,
        chest: Samples,
        chest8: Samples,
        name: str,
        syntax: UID,
        bits: int,
        encode: Callable[[Samples], bytes],
        share: float,
        kept: float,
    ) -> None:
        stored = chest8 if bits == 8 else chest
        frame = encode(stored)
        cut = frame[: round(len(frame) * kept)] + (b"" if name == "RLE" else EOI)
        assert verdict(dicom(stored, bits, cut, syntax)) is Reason.DAMAGED

    @pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
    @pytest.mark.parametrize("predictor", range(1, 8))
    def test_sound_lossless_streams_of_any_kind_are_read(
        self, verdict: Any, chest: Samples, bits: int, predictor: int
    ) -> None:
        stored = np.rint(chest / 4095 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
        syntax = JPEGLosslessSV1 if predictor == 1 else JPEGLossless
        assert verdict(dicom(stored, bits, lossless(stored, bits, predictor), syntax)) is None

    def test_a_data_set_that_is_not_deflated_as_it_says_is_damaged(
        self, verdict: Any, chest8: Samples
    ) -> None:
        frame = bytes(imagecodecs.jpeg8_encode(chest8, level=95))
        data = dicom(chest8, 8, frame, JPEGBaseline8Bit)
        old, new = JPEGBaseline8Bit.encode(), DeflatedExplicitVRLittleEndian.encode()
        assert data.count(old) == 1
        assert len(old) == len(new)
        assert verdict(data.replace(old, new)) is Reason.DAMAGED

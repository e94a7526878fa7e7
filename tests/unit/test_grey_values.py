"""Grey values of files that state depth, sign, range or padding twice and differently.

A real chest radiograph at a quarter of its size, with its grey values worked out here by plain
arithmetic, is put into files that contradict themselves. What is read must be that radiograph,
as bright as it is, and say what was mended; what nothing can tell must be refused by name.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from lungwatch.daemon.overlay.render import make_preview
from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging import reader
from lungwatch.imaging.radiograph import Radiograph, ReadPolicy
from lungwatch.imaging.reader import read_radiograph

Samples = NDArray[Any]
DEPTH, TABLE, WINDOW = Flag.DEPTH_CORRECTED, Flag.TABLE_IGNORED, Flag.WINDOW_IGNORED


@pytest.fixture(scope="module")
def grey(rg1: Path) -> NDArray[np.float64]:
    """As a screen shows it: air dark, 0..1, (488, 460)."""
    stored = pydicom.dcmread(rg1).pixel_array.astype(np.float32)
    shown = np.clip(1 - stored / 30000, 0, 1)
    size = shown.shape[1] // 4, shown.shape[0] // 4
    return cv2.resize(shown, size, interpolation=cv2.INTER_AREA).astype(np.float64)


def stored_of(grey: NDArray[np.float64], bits: int = 12) -> Samples:
    return np.rint(grey * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def radiograph(stored: Samples, bits: int = 12, **attributes: object) -> Dataset:
    """A plain radiograph whose attributes agree, but for those that are given; None removes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.11"
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize == 2 else "OB"
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def compressed(dataset: Dataset, frame: bytes, syntax: UID) -> Dataset:
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def content(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Dataset | bytes], Radiograph]:
    def read_one(source: Dataset | bytes) -> Radiograph:
        path = tmp_path / "image"
        path.write_bytes(source if isinstance(source, bytes) else content(source))
        return read_radiograph(path, ReadPolicy())

    return read_one


@pytest.fixture
def read_framed(tmp_path: Path) -> Callable[[Dataset], Radiograph]:
    """Read all of an image, with the even border that the reader cuts off."""

    def read_one(dataset: Dataset) -> Radiograph:
        path = tmp_path / "image"
        path.write_bytes(content(dataset))
        with path.open("rb") as file:
            return reader._read_dicom(file, ReadPolicy())

    return read_one


@pytest.fixture
def refusal(read: Callable[[Dataset | bytes], Radiograph]) -> Callable[..., FileRejected]:
    def refusal_of(source: Dataset | bytes) -> FileRejected:
        with pytest.raises(FileRejected) as caught:
            read(source)
        assert "\n" not in str(caught.value)
        return caught.value

    return refusal_of


def assert_shows(radiograph: Radiograph, grey: NDArray[np.float64], *flags: Flag) -> None:
    """Hold what was read, and the picture of its overlay, to the undisturbed radiograph."""
    assert radiograph.pixels.shape == grey.shape
    assert np.corrcoef(radiograph.pixels.ravel(), grey.ravel())[0, 1] > 0.99
    assert abs(float(radiograph.pixels.mean()) - float(grey.mean())) < 0.06
    assert abs(float(make_preview(radiograph.pixels).mean()) / 255 - float(grey.mean())) < 0.06
    assert set(radiograph.flags) == set(flags)


def letters(shape: tuple[int, ...]) -> Samples:
    """Lines of text, 1 on 0."""
    drawn = np.zeros(shape, dtype=np.uint8)
    for line in range(shape[0] // 20):
        cv2.putText(drawn, "PORTABLE ERECT AP", (5, 18 + 20 * line), 0, 0.6, 1, 1)
    return drawn.astype(np.uint16)


def j2k(stored: Samples, bits: int, *, lossy: bool = False) -> bytes:
    return bytes(
        imagecodecs.jpeg2k_encode(
            stored,
            level=60 if lossy else 0,
            reversible=not lossy,
            codecformat="j2k",
            bitspersample=bits,
        )
    )


def lut(entries: object, bits: int, *, first: int = 0, count: int | None = None) -> Dataset:
    item = Dataset()
    data = np.asarray(entries)
    item.add_new("LUTDescriptor", "US", [len(data) if count is None else count, first, bits])
    item.add_new("LUTData", "OW", data.astype("u1" if data.dtype == np.uint8 else "<u2").tobytes())
    return item


NO_DATA = lut(np.arange(4096), 12)
del NO_DATA.LUTData
BROKEN_TABLES = {
    "one entry short": lut(np.arange(4095), 12, count=4096),
    "one entry long": lut(np.arange(4097), 12, count=4096),
    "half as long": lut(np.arange(2048), 12, count=4096),
    "no data": NO_DATA,
    "empty item": Dataset(),
    "for other values": lut(np.arange(4096), 12, first=20_000),
    "for other values by half": lut(np.arange(4096), 12, first=2048),
    "for other values by a quarter": lut(np.arange(4096), 12, first=1024),
    "flat": lut(np.full(4096, 4095), 12),
    "of no bits": lut(np.arange(4096), 0),
    "of 99 bits": lut(np.arange(4096), 99),
    "one entry": lut(np.arange(1), 12),
}


class TestTables:
    @pytest.mark.parametrize(
        ("entries", "bits"),
        [
            (np.arange(4096), 16),
            (np.arange(4096) * 16, 12),
            (np.arange(4096), 8),
            (np.arange(4096) * 4, 16),
            (np.arange(4096) // 4, 16),
            (np.arange(4096) // 16, 16),
            ((np.arange(4096) // 16).astype(np.uint8), 16),
            (np.arange(4096) * 4, 10),
        ],
    )
    def test_one_of_another_depth_than_it_states_is_scaled_by_its_entries(
        self, read: Any, grey: NDArray[np.float64], entries: NDArray[Any], bits: int
    ) -> None:
        dataset = radiograph(stored_of(grey), VOILUTSequence=[lut(entries, bits)])
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("name", BROKEN_TABLES)
    def test_a_broken_one_beside_a_good_window_costs_the_table_alone(
        self, read: Any, grey: NDArray[np.float64], name: str
    ) -> None:
        dataset = radiograph(
            stored_of(grey),
            VOILUTSequence=[BROKEN_TABLES[name]],
            WindowCenter="2048",
            WindowWidth="4096",
        )
        shown = read(dataset)
        assert_shows(shown, grey, TABLE)
        assert np.abs(shown.pixels - grey).max() < 1e-3

    @pytest.mark.parametrize("name", BROKEN_TABLES)
    def test_a_broken_one_alone_leaves_the_images_own_range(
        self, read: Any, grey: NDArray[np.float64], name: str
    ) -> None:
        dataset = radiograph(stored_of(grey), VOILUTSequence=[BROKEN_TABLES[name]])
        assert_shows(read(dataset), grey, TABLE)

    def test_the_second_one_is_used_where_the_first_is_broken(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        table = lut(4095 - np.arange(4096), 12)
        dataset = radiograph(4095 - stored_of(grey), VOILUTSequence=[NO_DATA, table])
        assert_shows(read(dataset), grey, TABLE)

    def test_a_table_for_a_deeper_image_that_leaves_it_black_is_left_out(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        dataset = radiograph(stored_of(grey), VOILUTSequence=[lut(np.arange(2**16), 16, count=0)])
        assert_shows(read(dataset), grey, TABLE)

    @pytest.mark.parametrize(
        "name", ["one entry short", "no data", "empty item", "for other values", "of 99 bits"]
    )
    def test_a_broken_modality_table_is_refused_by_name(
        self, refusal: Any, grey: NDArray[np.float64], name: str
    ) -> None:
        dataset = radiograph(
            stored_of(grey),
            ModalityLUTSequence=[BROKEN_TABLES[name]],
            WindowCenter="2048",
            WindowWidth="4096",
        )
        refused = refusal(dataset)
        assert refused.reason is Reason.UNREADABLE
        assert "Modality LUT" in str(refused)

    def test_a_broken_modality_table_beside_a_slope_leaves_the_slope(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        dataset = radiograph(
            4095 - stored_of(grey),
            ModalityLUTSequence=[Dataset()],
            RescaleSlope="-1",
            RescaleIntercept="4095",
            WindowCenter="2048",
            WindowWidth="4096",
        )
        assert_shows(read(dataset), grey, TABLE)

    def test_a_modality_table_of_bytes_is_read_whatever_depth_it_states(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        table = (255 - np.arange(4096) // 16).astype(np.uint8)
        dataset = radiograph(4095 - stored_of(grey), ModalityLUTSequence=[lut(table, 16)])
        assert_shows(read(dataset), grey)


class TestWindows:
    @pytest.mark.parametrize(
        ("bits", "center", "width"),
        [
            (8, "2048", "4096"),
            (8, "32768", "65536"),
            (10, "2048", "4096"),
            (10, "128", "256"),
            (12, "128", "256"),
            (12, "512", "1024"),
            (12, "40", "400"),
            (12, "32768", "65536"),
            (12, "8191.5", "16383"),
            (12, "127", "255"),
            (12, "100000", "10"),
            (12, "2048", "0"),
            (12, "-600", "1600"),
            (14, "2048", "4096"),
            (14, "128", "256"),
            (16, "2048", "4096"),
            (16, "512", "1024"),
        ],
    )
    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_one_of_another_depth_is_left_out(
        self,
        read: Any,
        grey: NDArray[np.float64],
        bits: int,
        center: str,
        width: str,
        photometric: str,
    ) -> None:
        stored = stored_of(grey if photometric == "MONOCHROME2" else 1 - grey, bits)
        dataset = radiograph(stored, bits, PhotometricInterpretation=photometric)
        dataset.WindowCenter, dataset.WindowWidth = center, width
        assert_shows(read(dataset), grey, WINDOW)

    def test_the_second_is_used_where_the_first_belongs_to_another_image(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        dataset = radiograph(
            stored_of(grey), WindowCenter=["40", "2048"], WindowWidth=["400", "4096"]
        )
        shown = read(dataset)
        assert_shows(shown, grey, WINDOW)
        assert np.abs(shown.pixels - grey).max() < 1e-3

    @pytest.mark.parametrize(
        ("center", "width"),
        [("2048", "4096"), ("2600", "3000"), ("3200", "1600"), ("2000", "2500")],
    )
    def test_an_ordinary_one_is_used_to_the_letter(
        self, read: Any, grey: NDArray[np.float64], center: str, width: str
    ) -> None:
        dataset = radiograph(stored_of(grey), WindowCenter=center, WindowWidth=width)
        shown = read(dataset)
        values = stored_of(grey).astype(np.float64)
        wide = float(width) - 1
        expected = np.clip((values - (float(center) - 0.5)) / wide + 0.5, 0, 1)
        assert np.abs(shown.pixels - expected).max() < 1e-4
        assert shown.flags == ()

    def test_a_window_of_values_after_a_slope_that_the_file_lost(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        dataset = radiograph(stored_of(grey), WindowCenter="0.5", WindowWidth="1")
        assert_shows(read(dataset), grey, WINDOW)


def _jls(stored: Samples) -> bytes:
    return bytes(imagecodecs.jpegls_encode(stored))


def _lossless(stored: Samples, bits: int) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=bits))


class TestStreamsDepth:
    @pytest.mark.parametrize("stated", [8, 10, 12, 13])
    @pytest.mark.parametrize(
        ("bits", "syntax", "encode"),
        [
            (14, JPEG2000Lossless, lambda p: j2k(p, 14)),
            (16, JPEG2000Lossless, lambda p: j2k(p, 16)),
            (16, HTJ2KLossless, lambda p: bytes(imagecodecs.htj2k_encode(p, reversible=True))),
            (14, JPEGLosslessSV1, lambda p: _lossless(p, 14)),
            (16, JPEGLosslessSV1, lambda p: _lossless(p, 16)),
            (16, JPEGLSLossless, _jls),
            (14, JPEGLSLossless, _jls),
            (14, JPEG2000, lambda p: j2k(p, 14, lossy=True)),
            (16, JPEG2000, lambda p: j2k(p, 16, lossy=True)),
            (16, HTJ2K, lambda p: bytes(imagecodecs.htj2k_encode(p, level=0.0005))),
            (16, JPEGLSNearLossless, lambda p: bytes(imagecodecs.jpegls_encode(p, level=8))),
        ],
    )
    def test_of_more_bits_than_the_file_states_is_the_right_one(
        self,
        read: Any,
        grey: NDArray[np.float64],
        stated: int,
        bits: int,
        syntax: UID,
        encode: Callable[[Samples], bytes],
    ) -> None:
        stored = stored_of(grey, bits)
        dataset = compressed(radiograph(stored, stated), encode(stored), syntax)
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("allocated", [8, 16])
    def test_of_12_bits_in_an_8_bit_file_is_the_right_one(
        self, read: Any, grey: NDArray[np.float64], allocated: int
    ) -> None:
        stored = stored_of(grey)
        frame = bytes(imagecodecs.jpeg8_encode(stored, level=97, bitspersample=12))
        dataset = radiograph(stored, 8, BitsAllocated=allocated)
        assert_shows(read(compressed(dataset, frame, JPEGExtended12Bit)), grey, DEPTH)
        dataset = radiograph(stored, 8, BitsAllocated=allocated)
        assert_shows(read(compressed(dataset, j2k(stored, 12), JPEG2000Lossless)), grey, DEPTH)

    @pytest.mark.parametrize("stated", [12, 14, 16])
    @pytest.mark.parametrize(
        ("bits", "syntax", "encode"),
        [
            (8, JPEGBaseline8Bit, lambda p: bytes(imagecodecs.jpeg8_encode(p, level=97))),
            (8, JPEG2000Lossless, lambda p: j2k(p, 8)),
            (8, JPEGLSLossless, _jls),
            (8, JPEGLosslessSV1, lambda p: _lossless(p, 8)),
            (10, JPEG2000Lossless, lambda p: j2k(p, 10)),
            (
                12,
                JPEGExtended12Bit,
                lambda p: bytes(imagecodecs.jpeg8_encode(p, level=97, bitspersample=12)),
            ),
        ],
    )
    def test_of_fewer_bits_than_the_file_states_is_the_right_one(
        self,
        read: Any,
        grey: NDArray[np.float64],
        stated: int,
        bits: int,
        syntax: UID,
        encode: Callable[[Samples], bytes],
    ) -> None:
        stored = stored_of(grey, bits)
        dataset = radiograph(stored, stated, BitsAllocated=16)
        assert_shows(read(compressed(dataset, encode(stored), syntax)), grey)

    @pytest.mark.parametrize(("allocated", "stated"), [(16, 8), (16, 12), (8, 8)])
    def test_run_length_encoded_segments_tell_how_many_bytes_a_sample_has(
        self, read: Any, grey: NDArray[np.float64], allocated: int, stated: int
    ) -> None:
        stored = stored_of(grey, 8 if allocated == 16 else 12)
        dataset = radiograph(stored, 8 if allocated == 16 else 12)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stated, stated - 1
        assert_shows(read(dataset), grey, *((DEPTH,) if allocated == 8 else ()))

    def test_an_overlay_within_a_stream_of_words_is_left_out(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = stored_of(grey)
        words = stored | (letters(grey.shape) << 15)
        for syntax, frame in (
            (JPEG2000Lossless, j2k(words, 16)),
            (JPEGLosslessSV1, _lossless(words, 16)),
            (JPEGLSLossless, _jls(words)),
        ):
            shown = read(compressed(radiograph(stored), frame, syntax))
            assert_shows(shown, grey)


class TestSigns:
    def test_a_signed_stream_in_an_unsigned_file_is_signed(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        signed = (stored_of(grey).astype(np.int32) - 2048).astype(np.int16)
        for lossy in (False, True):
            dataset = radiograph(signed, PixelRepresentation=0)
            frame = j2k(signed, 12, lossy=lossy)
            syntax = JPEG2000 if lossy else JPEG2000Lossless
            assert_shows(read(compressed(dataset, frame, syntax)), grey, DEPTH)

    @pytest.mark.parametrize("bits", [12, 14, 16])
    @pytest.mark.parametrize("stated", [12, 16])
    def test_a_signed_stream_deeper_or_shallower_than_the_file_keeps_its_depth(
        self, read: Any, grey: NDArray[np.float64], bits: int, stated: int
    ) -> None:
        signed = (stored_of(grey, bits).astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
        dataset = compressed(radiograph(signed, stated), j2k(signed, bits), JPEG2000Lossless)
        assert_shows(read(dataset), grey, *((DEPTH,) if bits > stated else ()))
        frame = bytes(imagecodecs.htj2k_encode(signed, reversible=True))
        shown = read(compressed(radiograph(signed, stated), frame, HTJ2KLossless))
        assert_shows(shown, grey, *((DEPTH,) if bits > stated else ()))

    @pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
    def test_unsigned_values_in_a_file_that_calls_them_signed_do_not_wrap(
        self, read: Any, grey: NDArray[np.float64], bits: int
    ) -> None:
        stored = stored_of(grey, bits)
        dataset = radiograph(stored, bits, PixelRepresentation=1)
        assert_shows(read(dataset), grey, DEPTH)
        frame = _jls(stored)
        dataset = radiograph(stored, bits, PixelRepresentation=1)
        assert_shows(read(compressed(dataset, frame, JPEGLSLossless)), grey, DEPTH)

    @pytest.mark.parametrize("bits", [10, 12, 14, 16])
    def test_signed_values_in_a_file_that_calls_them_unsigned_do_not_wrap(
        self, read: Any, grey: NDArray[np.float64], bits: int
    ) -> None:
        signed = (stored_of(grey, bits).astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
        dataset = radiograph(signed, bits, PixelRepresentation=0)
        assert_shows(read(dataset), grey, DEPTH)
        masked = signed.view(np.uint16) & np.uint16(2**bits - 1)
        dataset = radiograph(masked, bits, PixelRepresentation=0)
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("bits", [10, 12, 16])
    @pytest.mark.parametrize("form", ["native", "masked", "rle", "jls", "j2k", "lossless"])
    def test_signed_values_called_so_are_themselves(
        self, read: Any, grey: NDArray[np.float64], bits: int, form: str
    ) -> None:
        signed = (stored_of(grey, bits).astype(np.int32) - 2 ** (bits - 1)).astype(np.int16)
        masked = signed.view(np.uint16) & np.uint16(2**bits - 1)
        dataset = radiograph(signed, bits)
        match form:
            case "masked":
                dataset.PixelData = masked.tobytes()
            case "rle":
                dataset.compress(RLELossless, generate_instance_uid=False)
            case "jls":
                compressed(dataset, _jls(masked), JPEGLSLossless)
            case "j2k":
                compressed(dataset, j2k(signed, bits), JPEG2000Lossless)
            case "lossless":
                compressed(dataset, _lossless(masked, bits), JPEGLosslessSV1)
        assert_shows(read(dataset), grey)

    def test_white_letters_on_black_are_no_sign(
        self, read_framed: Any, grey: NDArray[np.float64]
    ) -> None:
        """From 0 to 65535 is one step to a signed reader."""
        stored = stored_of(grey * 0.4, 16)
        stored[:60] = 0
        stored[letters((60, stored.shape[1])).nonzero()] = 65535
        shown = read_framed(radiograph(stored, 16))
        assert shown.flags == ()
        expected = stored[60:] / (0.4 * 65535)
        assert np.corrcoef(shown.pixels[60:].ravel(), expected.ravel())[0, 1] > 0.99


class TestWords:
    @pytest.mark.parametrize("bits", [13, 14, 16])
    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_more_bits_than_stored_are_all_used_where_they_are_the_image(
        self, read: Any, grey: NDArray[np.float64], bits: int, photometric: str
    ) -> None:
        stored = stored_of(grey if photometric == "MONOCHROME2" else 1 - grey, bits)
        dataset = radiograph(stored, 12, PhotometricInterpretation=photometric)
        assert_shows(read(dataset), grey, DEPTH)

    def test_big_endian_words_are_weighed_alike(self, read: Any, grey: NDArray[np.float64]) -> None:
        stored = stored_of(grey, 14)
        dataset = radiograph(stored, 12)
        dataset.PixelData = stored.astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("above", ["constant", "noise", "overlay", "left over"])
    @pytest.mark.parametrize("signed", [False, True])
    def test_what_lies_in_unused_bits_and_is_no_image_is_left_out(
        self, read: Any, grey: NDArray[np.float64], above: str, signed: bool
    ) -> None:
        stored = stored_of(grey)
        foreign = np.zeros_like(stored)
        match above:
            case "constant":
                foreign[:] = 0xC
            case "noise":
                foreign[:] = np.random.default_rng(1).integers(0, 16, stored.shape)
            case "overlay":
                foreign = letters(grey.shape) << 2
            case "left over":
                foreign[: len(foreign) // 2] = 0xF
        codes = (stored.astype(np.int32) - 2048 * signed).astype(np.int16).view(np.uint16)
        words = (codes & np.uint16(0xFFF)) | (foreign << 12)
        dataset = radiograph(words, 12, PixelRepresentation=int(signed))
        assert_shows(read(dataset), grey)

    @pytest.mark.parametrize("high_bit", [12, 13, 15])
    def test_a_wrong_high_bit_does_not_cut_right_aligned_samples(
        self, read: Any, grey: NDArray[np.float64], high_bit: int
    ) -> None:
        dataset = radiograph(stored_of(grey), WindowCenter="2048", WindowWidth="4096")
        dataset.HighBit = high_bit
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("high_bit", [0, 7, 10, 16, 99])
    def test_a_high_bit_that_cannot_be_is_not_believed(
        self, read: Any, grey: NDArray[np.float64], high_bit: int
    ) -> None:
        dataset = radiograph(stored_of(grey))
        dataset.HighBit = high_bit
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("low_bits", [0, 5])
    def test_left_aligned_samples_are_read_where_high_bit_says_so(
        self, read: Any, grey: NDArray[np.float64], low_bits: int
    ) -> None:
        dataset = radiograph((stored_of(grey) << 4) | np.uint16(low_bits), 12)
        dataset.HighBit = 15
        assert_shows(read(dataset), grey)

    def test_left_aligned_samples_are_read_where_high_bit_denies_it(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        assert_shows(read(radiograph(stored_of(grey) << 4, 12)), grey, DEPTH)

    def test_what_the_pixels_do_not_tell_is_refused(
        self, refusal: Any, grey: NDArray[np.float64]
    ) -> None:
        rng = np.random.default_rng(2)
        words = rng.integers(0, 2**16, grey.shape).astype(np.uint16)
        words[::2] = stored_of(grey, 16)[::2]
        words[1::2] = stored_of(grey)[1::2] | (rng.integers(0, 2, grey.shape)[1::2] << 15).astype(
            np.uint16
        )
        refused = refusal(radiograph(words, 12))
        assert refused.reason is Reason.UNSUPPORTED_PIXEL_FORMAT
        assert "Bits Stored" in str(refused)


class TestOrderAndShape:
    @pytest.mark.parametrize("bits", [12, 14, 16])
    def test_words_in_the_other_byte_order_are_turned_round(
        self, read: Any, grey: NDArray[np.float64], bits: int
    ) -> None:
        dataset = radiograph(stored_of(grey, bits).byteswap(), bits)
        assert_shows(read(dataset), grey, DEPTH)

    @pytest.mark.parametrize("bits", [8, 12])
    def test_exchanged_rows_and_columns_are_refused(
        self, refusal: Any, grey: NDArray[np.float64], bits: int
    ) -> None:
        stored = stored_of(grey, bits)
        dataset = radiograph(stored, bits, Rows=stored.shape[1], Columns=stored.shape[0])
        refused = refusal(dataset)
        assert refused.reason is Reason.UNREADABLE
        assert "exchanged" in str(refused)
        frame = j2k(stored, bits)
        refused = refusal(compressed(dataset, frame, JPEG2000Lossless))
        assert refused.reason is Reason.UNREADABLE
        assert "size" in str(refused)

    def test_bytes_that_are_said_to_be_words_are_read_by_their_size(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        dataset = radiograph(stored_of(grey, 8), 8, BitsAllocated=16)
        assert_shows(read(dataset), grey, DEPTH)


class TestPadding:
    @pytest.mark.parametrize("window", [True, False])
    @pytest.mark.parametrize(
        ("representation", "padding", "vr", "stated", "limit"),
        [
            (0, 63536, "SS", -2000, None),
            (0, 63536, "US", 63536, None),
            (1, 63536, "US", 63536, None),
            (1, 63536, "SS", -2000, None),
            (0, 63536, "SS", -2000, -1990),
            (1, 63536, "US", 63536, 63546),
            (0, 65535, "SS", -1, None),
        ],
    )
    def test_is_found_in_either_representation(
        self,
        read_framed: Any,
        grey: NDArray[np.float64],
        representation: int,
        padding: int,
        vr: str,
        stated: int,
        limit: int | None,
        window: bool,
    ) -> None:
        stored = stored_of(grey)
        stored[:60], stored[:, :60] = padding, padding
        dataset = radiograph(stored, 16, PixelRepresentation=representation)
        dataset.add_new("PixelPaddingValue", vr, stated)
        if limit is not None:
            stored[:30] = padding + 5
            dataset.PixelData = stored.tobytes()
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)
        if window:
            dataset.WindowCenter, dataset.WindowWidth = "2048", "4096"
        shown = read_framed(dataset)
        assert (shown.pixels[:60] == 0).all()
        assert (shown.pixels[:, :60] == 0).all()
        assert np.corrcoef(shown.pixels[60:, 60:].ravel(), grey[60:, 60:].ravel())[0, 1] > 0.99
        assert abs(float(shown.pixels[60:, 60:].mean()) - float(grey[60:, 60:].mean())) < 0.06
        assert shown.flags == ()

    def test_is_found_where_only_its_lowest_bits_are_stored(
        self, read_framed: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = np.minimum(stored_of(grey), 4000)
        stored[:60] = 0xFFFF
        dataset = radiograph(stored, 12, WindowCenter="2048", WindowWidth="4096")
        dataset.add_new("PixelPaddingValue", "SS", -1)
        shown = read_framed(dataset)
        assert (shown.pixels[:60] == 0).all()
        assert np.corrcoef(shown.pixels[60:].ravel(), grey[60:].ravel())[0, 1] > 0.99

    def test_a_range_of_all_values_is_none(self, read: Any, grey: NDArray[np.float64]) -> None:
        dataset = radiograph(stored_of(grey), PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
        assert_shows(read(dataset), grey)


class TestMissing:
    @pytest.mark.parametrize(
        "keyword",
        [
            "PixelRepresentation",
            "BitsStored",
            "BitsAllocated",
            "HighBit",
            "SamplesPerPixel",
            "PhotometricInterpretation",
        ],
    )
    @pytest.mark.parametrize("is_compressed", [False, True])
    def test_an_attribute_that_is_missing_is_named(
        self, refusal: Any, grey: NDArray[np.float64], keyword: str, is_compressed: bool
    ) -> None:
        stored = stored_of(grey)
        dataset = radiograph(stored)
        if is_compressed:
            compressed(dataset, j2k(stored, 12), JPEG2000Lossless)
        delattr(dataset, keyword)
        refused = refusal(dataset)
        assert refused.reason is Reason.UNSUPPORTED_PIXEL_FORMAT
        assert keyword in str(refused)

    def test_a_missing_order_of_colours_is_named(
        self, refusal: Any, read: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = stored_of(grey, 8)
        dataset = radiograph(np.dstack([stored] * 3), 8, PhotometricInterpretation="RGB")
        dataset.SamplesPerPixel = 3
        assert "PlanarConfiguration" in str(refusal(dataset))
        frame = bytes(imagecodecs.jpeg8_encode(np.dstack([stored] * 3), level=95))
        dataset.PhotometricInterpretation = "YBR_FULL_422"
        assert_shows(read(compressed(dataset, frame, JPEGBaseline8Bit)), grey)

    def test_a_representation_that_cannot_be_is_named(
        self, refusal: Any, grey: NDArray[np.float64]
    ) -> None:
        refused = refusal(radiograph(stored_of(grey), PixelRepresentation=2))
        assert refused.reason is Reason.UNSUPPORTED_PIXEL_FORMAT
        assert "PixelRepresentation is 2" in str(refused)


class TestTails:
    @pytest.mark.parametrize("share", [0.36, 0.5, 0.9])
    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_rows_that_were_never_written_are_refused(
        self, refusal: Any, grey: NDArray[np.float64], share: float, photometric: str
    ) -> None:
        stored = stored_of(grey if photometric == "MONOCHROME2" else 1 - grey)
        stored[round(len(stored) * (1 - share)) :] = 0
        refused = refusal(radiograph(stored, PhotometricInterpretation=photometric))
        assert refused.reason is Reason.TRUNCATED
        assert "%" in str(refused)

    @pytest.mark.parametrize("kept", [0.3, 0.7, 0.93])
    @pytest.mark.parametrize("fill", [b"\0", b"\xff"])
    def test_a_file_that_ends_in_one_byte_is_refused(
        self, refusal: Any, grey: NDArray[np.float64], kept: float, fill: bytes
    ) -> None:
        data = content(radiograph(stored_of(grey, 16), 16))
        start = round(len(data) * kept) // 2 * 2
        refused = refusal(data[:start] + fill * (len(data) - start))
        assert refused.reason is Reason.TRUNCATED

    @pytest.mark.parametrize("rows", [(0, 0.5), (0.3, 0.7)])
    def test_rows_that_are_missing_before_the_end_are_refused(
        self, refusal: Any, grey: NDArray[np.float64], rows: tuple[float, float]
    ) -> None:
        stored = stored_of(grey)
        first, last = (round(len(stored) * part) for part in rows)
        stored[first:last] = 0
        assert refusal(radiograph(stored)).reason is Reason.DAMAGED

    @pytest.mark.parametrize("start", [0.0, 0.2, 0.6])
    def test_a_block_that_is_missing_is_refused(
        self, refusal: Any, grey: NDArray[np.float64], start: float
    ) -> None:
        data = bytearray(stored_of(grey).tobytes())
        first = round(len(data) * start) // 2 * 2
        data[first : first + 32768] = bytes(32768)
        refused = refusal(radiograph(stored_of(grey), PixelData=bytes(data)))
        assert refused.reason is Reason.DAMAGED
        assert "block" in str(refused)

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.25])
    def test_a_black_lower_border_stays(
        self, read_framed: Any, grey: NDArray[np.float64], share: float
    ) -> None:
        stored = stored_of(grey)
        stored[round(len(stored) * (1 - share)) :] = 0
        assert_shows(read_framed(radiograph(stored)), stored / 4095)

    def test_a_slanting_and_a_round_collimation_stay(
        self, read_framed: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = stored_of(grey)
        rows, columns = np.indices(stored.shape)
        slanting = np.where(rows + columns * 0.05 > 0.85 * len(stored), 0, stored)
        assert_shows(read_framed(radiograph(slanting.astype(np.uint16))), slanting / 4095)
        round_ = np.where(np.hypot(rows - 244, columns - 230) > 225, 0, stored)
        assert_shows(read_framed(radiograph(round_.astype(np.uint16))), round_ / 4095)

    def test_a_frame_on_all_sides_stays(self, read_framed: Any, grey: NDArray[np.float64]) -> None:
        framed = np.pad(stored_of(grey), 400)
        assert read_framed(radiograph(framed)).pixels.shape == framed.shape


def _with_items(dataset: Dataset, *items: bytes, delimited: bool = True) -> bytes:
    """Write encapsulated pixel data item by item."""
    dataset["PixelData"].value = b"".join(
        b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in items
    )
    data = content(dataset)
    return data if delimited else data[:-8]


class TestEncapsulation:
    @pytest.fixture
    def frame(self, grey: NDArray[np.float64]) -> bytes:
        frame = j2k(stored_of(grey), 12)
        return frame + bytes(len(frame) % 2)

    @pytest.fixture
    def dataset(self, grey: NDArray[np.float64], frame: bytes) -> Dataset:
        return compressed(radiograph(stored_of(grey)), frame, JPEG2000Lossless)

    @pytest.mark.parametrize(
        "table",
        [b"", b"\0\0\0\0", b"\x40\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\0\x10\0\0\0", b"junkjunk"],
    )
    @pytest.mark.parametrize("pieces", [1, 3])
    def test_one_frame_is_read_whatever_its_offset_table_says(
        self,
        read: Any,
        grey: NDArray[np.float64],
        dataset: Dataset,
        frame: bytes,
        table: bytes,
        pieces: int,
    ) -> None:
        step = -(-len(frame) // pieces // 2) * 2
        fragments = [frame[i : i + step] for i in range(0, len(frame), step)]
        assert_shows(read(_with_items(dataset, table, *fragments)), grey)

    def test_one_frame_is_read_whatever_its_extended_offset_table_says(
        self, read: Any, grey: NDArray[np.float64], dataset: Dataset, frame: bytes
    ) -> None:
        data, _, _ = encapsulate_extended([frame])
        dataset.PixelData = data
        dataset.ExtendedOffsetTable = (2**33).to_bytes(8, "little")
        dataset.ExtendedOffsetTableLengths = (7).to_bytes(8, "little")
        assert_shows(read(dataset), grey)

    def test_without_the_offset_tables_item_it_is_read(
        self, read: Any, grey: NDArray[np.float64], dataset: Dataset, frame: bytes
    ) -> None:
        assert_shows(read(_with_items(dataset, frame)), grey)

    def test_without_the_sequences_delimiter_a_whole_frame_is_read(
        self, read: Any, refusal: Any, grey: NDArray[np.float64], dataset: Dataset, frame: bytes
    ) -> None:
        whole = _with_items(dataset, b"", frame, delimited=False)
        assert_shows(read(whole), grey)
        assert refusal(whole[:-100]).reason is Reason.TRUNCATED
        half = len(frame) // 4 * 2
        between = _with_items(dataset, b"", frame[:half], frame[half:], delimited=False)
        assert_shows(read(between), grey)
        cut = len(frame) - half + 8
        assert refusal(between[:-cut]).reason is Reason.TRUNCATED

    @pytest.mark.parametrize("has_table", [True, False])
    @pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
    def test_two_frames_are_not_one(
        self, refusal: Any, grey: NDArray[np.float64], syntax: UID, has_table: bool
    ) -> None:
        stored = stored_of(grey)
        frame = {
            JPEG2000Lossless: j2k(stored, 12),
            JPEGLSLossless: _jls(stored),
            JPEGLosslessSV1: _lossless(stored, 12),
        }[syntax]
        dataset = compressed(radiograph(stored), frame, syntax)
        dataset.PixelData = encapsulate([frame, frame], has_bot=has_table)
        refused = refusal(dataset)
        assert refused.reason is Reason.MULTI_FRAME
        assert "2 frames" in str(refused)

    def test_two_native_or_run_length_encoded_frames_are_not_one(
        self, refusal: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = stored_of(grey)
        dataset = radiograph(stored, PixelData=stored.tobytes() * 2)
        assert refusal(dataset).reason is Reason.MULTI_FRAME
        dataset.NumberOfFrames = 2
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.NumberOfFrames = 1
        assert refusal(dataset).reason is Reason.MULTI_FRAME

    def test_a_few_bytes_too_many_are_no_second_frame(
        self, read: Any, grey: NDArray[np.float64]
    ) -> None:
        stored = stored_of(grey)
        assert_shows(read(radiograph(stored, PixelData=stored.tobytes() + bytes(4096))), grey)

    def test_compressed_data_under_a_native_syntax_are_called_so(
        self, refusal: Any, dataset: Dataset
    ) -> None:
        data = content(dataset)
        old = b"1.2.840.10008.1.2.4.90"
        assert data.count(old) == 1
        refused = refusal(data.replace(old, ExplicitVRLittleEndian.encode().ljust(len(old), b"\0")))
        assert refused.reason is Reason.UNREADABLE
        assert "compressed" in str(refused)

    @pytest.mark.parametrize(
        "syntax", [JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless, RLELossless]
    )
    def test_native_data_under_a_compressed_syntax_are_called_so(
        self, refusal: Any, grey: NDArray[np.float64], syntax: UID
    ) -> None:
        dataset = radiograph(stored_of(grey))
        data = content(dataset)
        # The same length, so that nothing else has to be changed.
        old = b"1.2.840.10008.1.2.1\0"
        start = data.index(old)
        new = syntax.encode()
        new += bytes(len(new) % 2)
        group = int.from_bytes(data[140:144], "little") + len(new) - len(old)
        changed = (
            data[:140]
            + group.to_bytes(4, "little")
            + data[144 : start - 2]
            + len(new).to_bytes(2, "little")
            + new
            + data[start + len(old) :]
        )
        refused = refusal(changed)
        assert refused.reason is Reason.UNREADABLE
        assert "not compressed" in str(refused)

    @pytest.mark.parametrize(
        ("syntax", "named"),
        [
            (JPEG2000Lossless, "JPEG-LS"),
            (JPEGLosslessSV1, "JPEG-LS"),
            (JPEGLSLossless, "JPEG 2000"),
            (RLELossless, "JPEG"),
        ],
    )
    def test_a_stream_of_another_kind_than_the_syntax_is_called_so(
        self, refusal: Any, grey: NDArray[np.float64], syntax: UID, named: str
    ) -> None:
        stored = stored_of(grey)
        frame = j2k(stored, 12) if named == "JPEG 2000" else _jls(stored)
        refused = refusal(compressed(radiograph(stored), frame, syntax))
        assert refused.reason is Reason.UNREADABLE
        assert f"is {named}," in str(refused)

    @pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422"])
    def test_a_grey_stream_called_coloured_is_refused(
        self, refusal: Any, grey: NDArray[np.float64], photometric: str
    ) -> None:
        stored = stored_of(grey, 8)
        frame = bytes(imagecodecs.jpeg8_encode(stored, level=95))
        dataset = radiograph(stored, 8, PhotometricInterpretation=photometric)
        refused = refusal(compressed(dataset, frame, JPEGBaseline8Bit))
        assert refused.reason is Reason.UNSUPPORTED_PIXEL_FORMAT
        assert photometric in str(refused)

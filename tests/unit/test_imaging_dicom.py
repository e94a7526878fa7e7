"""DICOM files: read right, or refused with a reason that helps; nothing in between."""

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pydicom.data
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.files import FileKind, kind_of
from lungwatch.imaging.codestream import frame_header
from lungwatch.imaging.radiograph import Radiograph, ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess

STORED = (np.indices((80, 100)).sum(axis=0) * 20).astype(np.uint16)
GREY = STORED / STORED.max()
SECRETS = {
    "PatientName": "Mustermann^Erika",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19640812",
    "AccessionNumber": "ACC-0815",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1",
    "InstitutionName": "St. Elsewhere",
}

# Fuzzing looks for exceptions; which files it tries is the same every time.
FUZZ = settings(
    database=None,
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=list(HealthCheck),
)


def _radiograph(**changes: object) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.2"
    dataset.Modality = "CR"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.Rows, dataset.Columns = STORED.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = STORED.tobytes()
    for keyword, value in {**SECRETS, **changes}.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def _bytes(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def _compressed(syntax: str) -> bytes:
    dataset = _radiograph()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    frames = {
        JPEGLosslessSV1: lambda: imagecodecs.jpeg8_encode(
            STORED, lossless=True, predictor=1, bitspersample=12
        ),
        HTJ2KLossless: lambda: imagecodecs.htj2k_encode(STORED, reversible=True),
    }
    if syntax in frames:
        dataset.PixelData = encapsulate([bytes(frames[syntax]())])
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.compress(syntax)
    return _bytes(dataset, syntax)


def _read(data: bytes, policy: ReadPolicy | None = None) -> Radiograph:
    with tempfile.TemporaryDirectory() as folder:
        # No extension: the content decides.
        path = Path(folder) / "image"
        path.write_bytes(data)
        return read_radiograph(path, policy)


def _refusal(data: bytes, policy: ReadPolicy | None = None) -> FileRejected:
    with pytest.raises(FileRejected) as caught:
        _read(data, policy)
    return caught.value


def _read_or_refuse(data: bytes) -> Radiograph | Reason:
    try:
        radiograph = _read(data)
    except FileRejected as refusal:
        return refusal.reason
    assert radiograph.pixels.dtype == np.float32
    assert np.isfinite(radiograph.pixels).all()
    assert 0.0 <= radiograph.pixels.min() < radiograph.pixels.max() <= 1.0
    return radiograph


class TestRealRadiograph:
    def test_lossless_twins_have_identical_pixels(self, rg1: Path, rg1_lossless: Path) -> None:
        assert (read_radiograph(rg1).pixels == read_radiograph(rg1_lossless).pixels).all()

    def test_the_lossy_twin_looks_the_same_to_a_network(self, rg1: Path, rg1_lossy: Path) -> None:
        spec = PreprocessSpec(size_px=128)
        exact, lossy = (preprocess(read_radiograph(path).pixels, spec) for path in (rg1, rg1_lossy))
        assert np.abs(exact - lossy).max() < 0.01

    def test_lungs_are_dark_and_neither_mirrored_nor_turned(self, rg1: Path) -> None:
        pixels = read_radiograph(rg1).pixels
        assert pixels.shape == (1955, 1841)
        rows, columns = pixels.shape
        upper = slice(int(0.2 * rows), int(0.35 * rows))
        spine = pixels[upper, int(0.45 * columns) : int(0.52 * columns)].mean()
        for lung in (slice(0.2, 0.35), slice(0.65, 0.8)):
            columns_of = slice(int(lung.start * columns), int(lung.stop * columns))
            assert pixels[upper, columns_of].mean() < spine - 0.2
        # The liver's dome makes the patient's right, on the left of the picture, brighter.
        lower = slice(int(0.75 * rows), int(0.8 * rows))
        right_side = pixels[lower, int(0.2 * columns) : int(0.35 * columns)].mean()
        left_side = pixels[lower, int(0.78 * columns) : int(0.88 * columns)].mean()
        assert right_side > left_side
        # Air above the shoulders, below which the abdomen is bright.
        assert pixels[-100:].mean() > pixels[20:120, :200].mean()

    def test_what_the_file_says_is_handed_on(self, rg1: Path) -> None:
        meta, dataset = read_radiograph(rg1).meta, pydicom.dcmread(rg1)
        assert (meta.format, meta.rows, meta.columns) == ("DICOM", 1955, 1841)
        assert meta.bits_stored == dataset.BitsStored
        assert meta.photometric == "MONOCHROME1"
        assert meta.transfer_syntax == ExplicitVRLittleEndian
        assert meta.sop_uid == dataset.SOPInstanceUID
        assert meta.study_uid == dataset.StudyInstanceUID

    @pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG1_J2KR.dcm", "RG1_J2KI.dcm"])
    def test_cut_anywhere_it_is_refused_or_still_the_whole_image(
        self, find_testdata: Callable[[str], Path], name: str
    ) -> None:
        data = find_testdata(name).read_bytes()
        elements = pydicom.dcmread(find_testdata(name))
        pixel_data = elements.get_item("PixelData")
        assert pixel_data is not None
        start = pixel_data.value_tell
        size = len(elements.PixelData)
        lengths = [
            *range(140),
            *range(140, start, 41),
            *range(start, start + 40),
            *np.linspace(start, start + size - 1, 12, dtype=int),
            start + size - 2,
            start + size - 1,
            *range(start + size, len(data)),
        ]
        whole = None
        for length in lengths:
            result = _read_or_refuse(data[:length])
            where = f"{length} of {len(data)} bytes"
            if not isinstance(result, Radiograph):
                assert result in (
                    Reason.NOT_AN_IMAGE,
                    Reason.TRUNCATED,
                    Reason.NO_PIXEL_DATA,
                    Reason.NOT_A_RADIOGRAPH,
                ), f"{where}: {result}"
                continue
            # Only what follows the image may be missing: padding, or a sequence's end.
            assert length >= start + size - 1, where
            whole = read_radiograph(find_testdata(name)).pixels if whole is None else whole
            assert (result.pixels == whole).all(), where
            break


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "reason", "named"),
        [
            ({"Modality": "CT", "SOPClassUID": CTImageStorage}, Reason.NOT_A_RADIOGRAPH, "CT"),
            ({"Modality": "MR"}, Reason.NOT_A_RADIOGRAPH, "MR"),
            ({"Modality": "US"}, Reason.NOT_A_RADIOGRAPH, "US"),
            ({"Modality": "MG"}, Reason.NOT_A_RADIOGRAPH, "MG"),
            (
                {"Modality": None, "SOPClassUID": CTImageStorage},
                Reason.NOT_A_RADIOGRAPH,
                "neither a modality",
            ),
            ({"BodyPartExamined": "EXTREMITY"}, Reason.WRONG_BODY_PART, "EXTREMITY"),
            ({"BodyPartExamined": "HAND"}, Reason.WRONG_BODY_PART, "HAND"),
            ({"BodyPartExamined": "abdomen"}, Reason.WRONG_BODY_PART, "ABDOMEN"),
            ({"ViewPosition": "LL"}, Reason.NOT_FRONTAL, "LL"),
            ({"ViewPosition": "LATERAL"}, Reason.NOT_FRONTAL, "LATERAL"),
            ({"PatientSpeciesDescription": "Canine"}, Reason.NOT_HUMAN, "species"),
            ({"PixelData": None}, Reason.NO_PIXEL_DATA, "no pixel data"),
            ({"Rows": 0}, Reason.UNREADABLE, "size"),
            (
                {"PhotometricInterpretation": "HSV"},
                Reason.UNSUPPORTED_PIXEL_FORMAT,
                "HSV",
            ),
            (
                {"PhotometricInterpretation": "RGB"},
                Reason.UNSUPPORTED_PIXEL_FORMAT,
                "1 samples",
            ),
            ({"BitsAllocated": 32}, Reason.TRUNCATED, "ends before"),
            (
                {"BitsAllocated": 32, "PixelData": STORED.tobytes() * 2},
                Reason.UNSUPPORTED_PIXEL_FORMAT,
                "in 32",
            ),
            ({"BitsStored": 17}, Reason.UNSUPPORTED_PIXEL_FORMAT, "17 bits"),
            (
                {"PresentationIntentType": "FOR PROCESSING"},
                Reason.FOR_PROCESSING,
                "FOR PRESENTATION",
            ),
            (
                {"SOPClassUID": DigitalXRayImageStorageForProcessing, "Modality": "DX"},
                Reason.FOR_PROCESSING,
                "raw detector values",
            ),
            (
                {"PixelAspectRatio": [9, 1]},
                Reason.UNSUPPORTED_PIXEL_FORMAT,
                "9 times its width",
            ),
            ({"PhotometricInterpretation": None}, Reason.UNSUPPORTED_PIXEL_FORMAT, "missing"),
            (
                {"NumberOfFrames": 2, "PixelData": STORED.tobytes() * 2},
                Reason.MULTI_FRAME,
                "2 frames",
            ),
            ({"PixelData": STORED.tobytes()[:-2]}, Reason.TRUNCATED, "ends before"),
            ({"PixelData": b"\0" * STORED.nbytes}, Reason.NO_CONTRAST, "same value"),
        ],
    )
    def test_names_what_it_refuses_in_one_line_without_patient_data(
        self, changes: dict[str, object], reason: Reason, named: str
    ) -> None:
        refusal = _refusal(_bytes(_radiograph(**changes)))
        assert refusal.reason is reason
        assert named in str(refusal)
        assert "\n" not in str(refusal)
        for secret in SECRETS.values():
            assert secret not in str(refusal)

    def test_the_lower_leg_and_the_ct_slice_are_refused(self, rg3: Path, ct: Path) -> None:
        for path, reason, named in [
            (rg3, Reason.WRONG_BODY_PART, "EXTREMITY"),
            (ct, Reason.NOT_A_RADIOGRAPH, "CT"),
        ]:
            with pytest.raises(FileRejected, match=named) as caught:
                read_radiograph(path)
            assert caught.value.reason is reason

    def test_a_value_that_is_no_code_cannot_break_the_line(self) -> None:
        refusal = _refusal(_bytes(_radiograph(BodyPartExamined="HAND\r\nINFO forged")))
        assert "\n" not in str(refusal)
        assert "\r" not in str(refusal)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"Modality": "DX"},
            {"Modality": "cr"},
            {"Modality": None},
            {"BodyPartExamined": None},
            {"BodyPartExamined": ""},
            {"BodyPartExamined": "Chest"},
            {"ViewPosition": "AP"},
            {"ViewPosition": None},
            {"PatientSpeciesDescription": "homo sapiens"},
            {"NumberOfFrames": 1},
        ],
    )
    def test_a_chest_radiograph_is_accepted(self, changes: dict[str, object]) -> None:
        pixels = _read(_bytes(_radiograph(**changes))).pixels
        assert np.abs(pixels - GREY).max() < 1e-6

    def test_the_policy_decides(self) -> None:
        lateral = _bytes(_radiograph(ViewPosition="LL"))
        assert _read(lateral, ReadPolicy(reject_lateral=False)).meta.view_position == "LL"
        other = _bytes(_radiograph(Modality="OT", BodyPartExamined="RIBS"))
        policy = ReadPolicy(modalities=frozenset({"OT"}), body_parts=frozenset({"RIBS"}))
        assert _read(other, policy).meta.modality == "OT"

    def test_one_too_small_is_refused(self) -> None:
        refusal = _refusal(_bytes(_radiograph()), ReadPolicy(min_side_px=81))
        assert refusal.reason is Reason.TOO_SMALL

    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
    def test_one_too_large_is_refused_by_its_header_before_decoding(self, syntax: str) -> None:
        data = _bytes(_radiograph()) if syntax == ExplicitVRLittleEndian else _compressed(syntax)
        # Not one byte of the pixel data is decodable: it must not come to that.
        is_compressed = syntax == JPEG2000Lossless
        start = data.index(b"\xff\x4f" if is_compressed else b"\xe0\x7f\x10\x00OW") + 12
        end = len(data) - 8 if is_compressed else len(data)
        damaged = data[:start] + bytes(end - start) + data[end:]
        refusal = _refusal(damaged, ReadPolicy(max_pixels=7999))
        assert refusal.reason is Reason.TOO_LARGE
        assert "100x80" in str(refusal)

    def test_an_unknown_transfer_syntax_is_named(self) -> None:
        data = _bytes(_radiograph()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        refusal = _refusal(data)
        assert refusal.reason is Reason.UNSUPPORTED_TRANSFER_SYNTAX
        assert "1.2.840.10008.1.2.9" in str(refusal)


class TestEncodings:
    @pytest.mark.parametrize(
        "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
    )
    def test_every_byte_order_gives_the_same_image(self, syntax: str) -> None:
        order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
        dataset = _radiograph(PixelData=STORED.astype(order).tobytes())
        dataset["PixelData"].VR = "OW"
        assert np.abs(_read(_bytes(dataset, syntax)).pixels - GREY).max() < 1e-6

    @pytest.mark.parametrize("has_preamble", [True, False])
    @pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
    def test_files_without_a_header_are_read_too(
        self, implicit: bool, little: bool, has_preamble: bool
    ) -> None:
        dataset = _radiograph(PixelData=STORED.astype("<u2" if little else ">u2").tobytes())
        dataset["PixelData"].VR = "OW"
        buffer = io.BytesIO()
        dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=little)
        data = (bytes(128) + b"DICM" if has_preamble else b"") + buffer.getvalue()
        assert kind_of(data[:132]) is FileKind.DICOM
        assert np.abs(_read(data).pixels - GREY).max() < 1e-6

    @pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
    def test_lossless_compression_changes_nothing(self, syntax: str) -> None:
        radiograph = _read(_compressed(syntax))
        assert radiograph.meta.transfer_syntax == syntax
        assert np.abs(radiograph.pixels - GREY).max() < 1e-6

    @pytest.mark.parametrize(
        "head",
        [
            b"",
            b"DICM",
            b"\x08\0",
            b"\0" * 132,
            b"\x89PNG\r\n\x1a\n" + b"\0" * 124,
            b"%PDF-1.4" + b" " * 124,
            b"\x10\0\x10\0PN" + b"\0" * 126,
            b"\x08\0\0\0\xff\xff\xff\xff" + b"\0" * 124,
        ],
    )
    def test_what_is_no_dicom_is_not_taken_for_it(self, head: bytes) -> None:
        assert kind_of(head) is not FileKind.DICOM

    def test_monochrome1_is_shown_as_its_monochrome2_twin(self) -> None:
        inverse = (4095 - STORED).astype(np.uint16)
        dataset = _radiograph(PhotometricInterpretation="MONOCHROME1", PixelData=inverse.tobytes())
        assert np.abs(_read(_bytes(dataset)).pixels - GREY).max() < 1e-6


class TestRectangularPixels:
    @pytest.mark.parametrize(
        ("attributes", "shape"),
        [
            ({}, (80, 100)),
            ({"ImagerPixelSpacing": [0.1, 0.1]}, (80, 100)),
            ({"ImagerPixelSpacing": [1.2, 1.2012]}, (80, 100)),
            ({"ImagerPixelSpacing": [0.2, 0.1]}, (80, 50)),
            ({"PixelSpacing": [0.1, 0.2]}, (40, 100)),
            ({"PixelAspectRatio": [1, 2]}, (40, 100)),
            ({"NominalScannedPixelSpacing": [0.3, 0.2]}, (80, 67)),
            ({"PixelSpacing": [0, 0], "PixelAspectRatio": [2, 1]}, (80, 50)),
        ],
    )
    def test_become_square(self, attributes: dict[str, object], shape: tuple[int, int]) -> None:
        radiograph = _read(_bytes(_radiograph(**attributes)), ReadPolicy(min_side_px=32))
        assert radiograph.pixels.shape == shape
        assert (radiograph.meta.rows, radiograph.meta.columns) == STORED.shape
        # Corners stay where they are: nothing is turned or cut.
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert radiograph.pixels[corner] == pytest.approx(GREY[corner], abs=0.02)


class TestBounds:
    """A few bytes can stand for gigabytes: what they inflate to is bounded beforehand."""

    @staticmethod
    def _deflated(length: int) -> bytes:
        data = bytearray(_bytes(_radiograph(), DeflatedExplicitVRLittleEndian))
        meta_length = int.from_bytes(data[140:144], "little")
        head = bytes(data[: 144 + meta_length])
        body = zlib.decompress(data[144 + meta_length :], -zlib.MAX_WBITS)
        # Another element behind the image, of nothing but zeroes.
        body += struct.pack("<HH2sHL", 0x7FE1, 0x1010, b"OB", 0, length)
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return head + deflater.compress(body + bytes(length)) + deflater.flush()

    def test_a_deflated_file_is_read(self) -> None:
        radiograph = _read(self._deflated(1000))
        assert radiograph.meta.transfer_syntax == DeflatedExplicitVRLittleEndian
        assert np.abs(radiograph.pixels - GREY).max() < 1e-6

    def test_one_that_inflates_beyond_any_radiograph_is_refused(self) -> None:
        bomb = self._deflated(70 * 1024 * 1024)
        assert len(bomb) < 100_000
        refusal = _refusal(bomb, ReadPolicy(max_pixels=10_000))
        assert refusal.reason is Reason.TOO_LARGE
        assert "inflates" in str(refusal)

    def test_a_deflated_file_that_was_cut_off_is_refused(self) -> None:
        assert _refusal(self._deflated(1000)[:-10]).reason is Reason.TRUNCATED

    def test_a_file_larger_than_any_radiograph_is_not_even_parsed(self, tmp_path: Path) -> None:
        path = tmp_path / "large"
        path.write_bytes(_bytes(_radiograph()))
        os.truncate(path, 65 * 1024 * 1024)  # sparse: it takes no space
        with pytest.raises(FileRejected, match="65 MiB") as caught:
            read_radiograph(path, ReadPolicy(max_pixels=10_000))
        assert caught.value.reason is Reason.TOO_LARGE

    def test_run_lengths_that_stand_for_more_than_the_image_are_not_expanded(self) -> None:
        dataset = _radiograph(PixelData=encapsulate([b"\x81\0" * STORED.nbytes]))
        dataset["PixelData"].is_undefined_length = True
        assert _refusal(_bytes(dataset, RLELossless)).reason is Reason.UNREADABLE


class TestContainers:
    def test_a_dicomdir_is_set_aside_as_an_index(
        self, find_testdata: Callable[[str], Path]
    ) -> None:
        refusal = _refusal(find_testdata("DICOMDIR").read_bytes())
        assert refusal.reason is Reason.MEDIA_DIRECTORY
        assert "images beside it" in str(refusal)

    def test_a_zip_archive_is_refused_with_what_to_do(self) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("image.dcm", _bytes(_radiograph()))
        refusal = _refusal(buffer.getvalue())
        assert refusal.reason is Reason.NOT_AN_IMAGE
        assert "drop the files" in str(refusal)


def test_what_queries_ask_for_is_handed_on() -> None:
    meta = _read(
        _bytes(
            _radiograph(
                StudyDate="20240102",
                SeriesDate="20240103",
                AcquisitionDateTime="20240104101112.5",
                Manufacturer="Maker",
                ManufacturerModelName="Model 5",
                StationName="ROOM1",
            )
        )
    ).meta
    assert (meta.study_date, meta.series_date, meta.acquisition_date) == (
        "20240102",
        "20240103",
        "20240104",
    )
    assert (meta.manufacturer, meta.manufacturer_model) == ("Maker", "Model 5")
    assert (meta.station, meta.institution) == ("ROOM1", "St. Elsewhere")
    assert meta.sop_class == ComputedRadiographyImageStorage
    assert (meta.patient_id, meta.accession) == ("MRN-4711", "ACC-0815")
    assert (meta.patient_sex, meta.patient_age, meta.study_time) == (None, None, None)


class TestDamagedTables:
    @pytest.mark.parametrize("keyword", ["VOILUTSequence", "ModalityLUTSequence"])
    @pytest.mark.parametrize(
        ("descriptor", "values"),
        [
            (None, [1]),
            ([1, 0], [1]),
            ([4096, 0, 16], None),
            ([4096, 0, 16], [1, 2, 3]),
            ([3, 0, 99], [1, 2, 3]),
        ],
    )
    def test_one_that_makes_no_sense_is_refused_or_harmless(
        self, keyword: str, descriptor: list[int] | None, values: list[int] | None
    ) -> None:
        table = Dataset()
        if descriptor:
            table.add_new("LUTDescriptor", "US", descriptor)
        if values:
            table.add_new("LUTData", "US", values)
        result = _read_or_refuse(_bytes(_radiograph(**{keyword: [table]})))
        assert isinstance(result, Radiograph) or result in (
            Reason.UNREADABLE,
            Reason.NO_CONTRAST,
        )

    @pytest.mark.parametrize(
        "element",
        [b"\x28\0\x50\x10DS", b"\x28\0\x51\x10DS", b"\x28\0\x53\x10DS", b"\x28\0\x56\x10CS"],
    )
    def test_an_element_of_no_known_type_is_refused_or_ignored(self, element: bytes) -> None:
        data = _bytes(
            _radiograph(
                WindowCenter="600",
                WindowWidth="1000",
                VOILUTFunction="LINEAR",
                RescaleSlope="1",
                RescaleIntercept="0",
            )
        )
        damaged = data.replace(element, element[:4] + b"D\x01")
        assert damaged != data
        assert isinstance(_read_or_refuse(damaged), Radiograph | Reason)


class TestCodestream:
    @pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
    def test_a_frame_that_asks_for_more_than_the_header_is_not_decoded(self, syntax: str) -> None:
        """One wrong byte can ask for more memory than there is, and the kernel then kills."""
        data = bytearray(_compressed(syntax))
        if syntax == JPEG2000Lossless:
            struct.pack_into(">I", data, data.index(b"\xff\x4f\xff\x51") + 8, 6_000_000)
        else:
            struct.pack_into(">HH", data, data.index(b"\xff\xd8\xff\xf7") + 7, 65_535, 65_535)
        refusal = _refusal(bytes(data))
        assert refusal.reason is Reason.UNREADABLE
        assert "size" in str(refusal)

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("RG1_J2KR.dcm", (1955, 1841, 1)),
            ("examples_jpeg2k.dcm", (480, 640, 3)),
            ("JPEG-lossy.dcm", (1024, 256, 1)),
            ("JPEG-LL.dcm", (1024, 256, 1)),
            ("MR_small_jpeg_ls_lossless.dcm", (64, 64, 1)),
            ("SC_rgb_jpeg.dcm", (256, 256, 3)),
        ],
    )
    def test_a_frames_own_size_is_found(
        self, find_testdata: Callable[[str], Path], name: str, size: tuple[int, int, int]
    ) -> None:
        dataset = pydicom.dcmread(find_testdata(name))
        (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        header = frame_header(frame)
        assert header is not None
        assert (header.rows, header.columns, header.components) == size

    @pytest.mark.parametrize(
        "frame",
        [b"", b"\xff\xd8", b"\xff\x4f\xff\x51\0\x29", b"\0" * 100, b"\xff\xd8" + b"\xff" * 99],
    )
    def test_a_frame_without_a_header_has_none(self, frame: bytes) -> None:
        assert frame_header(frame) is None

    def test_empty_pixel_data_is_refused(self) -> None:
        dataset = _radiograph(PixelData=encapsulate([b"\0\0"]))
        dataset["PixelData"].is_undefined_length = True
        assert _refusal(_bytes(dataset, JPEG2000Lossless)).reason is Reason.UNREADABLE


class _Everything(frozenset[str]):
    """The set that holds everything."""

    def __contains__(self, value: object) -> bool:
        return True


@pytest.mark.slow
class TestEveryFile:
    def test_of_pydicom_is_either_read_or_refused(self) -> None:
        """Hundreds of real and deliberately broken files; none may raise anything else."""
        data_store = pytest.importorskip("data_store", reason="pydicom-data is not installed")
        folders = [Path(module.__file__).parent for module in (pydicom.data, data_store)]
        paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        read, messages = [], []
        for path in paths:
            try:
                assert np.isfinite(read_radiograph(path).pixels).all(), path
                read.append(path.name)
            except FileRejected as refusal:
                messages.append(str(refusal))
        assert set(read) == {f"RG1_{kind}.dcm" for kind in ("UNCI", "UNCR", "J2KI", "J2KR")}
        assert len(messages) > 200
        assert not [message for message in messages if "\n" in message]

    def test_of_any_modality_is_decoded_or_refused_for_what_it_is(self) -> None:
        """Taken for radiographs, hundreds of files of all kinds go through the decoders."""
        data_store = pytest.importorskip("data_store", reason="pydicom-data is not installed")
        policy = ReadPolicy(
            modalities=frozenset({"CT", "MR", "US", "OT", "NM", "CR", "DX", "RTDOSE", "XA", "SC"}),
            body_parts=_Everything(),
            reject_lateral=False,
            min_side_px=1,
        )
        folders = [Path(module.__file__).parent for module in (pydicom.data, data_store)]
        read, reasons = 0, []
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            try:
                pixels = read_radiograph(path, policy).pixels
                assert np.isfinite(pixels).all(), path
                assert 0.0 <= pixels.min() < pixels.max() <= 1.0, path
                read += 1
            except FileRejected as refusal:
                reasons.append(refusal.reason)
        assert read > 80
        assert Reason.UNSUPPORTED_TRANSFER_SYNTAX not in reasons

    def test_of_the_real_samples_is_either_read_or_refused_by_its_reason(
        self, shared_data: Path
    ) -> None:
        folder = shared_data / "dicom"
        if not folder.is_dir():
            pytest.skip("the real data hold no folder of DICOM samples")
        verdicts: dict[str, object] = {}
        for path in folder.rglob("*.dcm"):
            try:
                pixels = read_radiograph(path).pixels
                assert np.isfinite(pixels).all(), path
                verdicts[path.name] = "read"
            except FileRejected as refusal:
                verdicts[path.name] = refusal.reason
        assert verdicts["966.dcm"] is Reason.DAMAGED
        assert verdicts["test16signed.dcm"] is Reason.NOT_A_RADIOGRAPH
        # Nothing in these two says what is wrong: that is for looking at the image.
        assert verdicts["dx_image.dcm"] == verdicts["Fake_MONOHR1.dcm"] == "read"
        for path in (folder / "chest").glob("*.dcm"):
            assert verdicts[path.name] == "read"


@pytest.mark.slow
class TestFuzz:
    """Nothing in a file raises anything but `FileRejected`."""

    @FUZZ
    @given(data=st.binary(max_size=600))
    def test_random_bytes(self, data: bytes) -> None:
        assert isinstance(_read_or_refuse(data), Radiograph | Reason)

    @FUZZ
    @given(data=st.binary(max_size=600))
    def test_random_bytes_behind_a_signature(self, data: bytes) -> None:
        for head in (
            bytes(128) + b"DICM",
            b"\x08\0\x05\0CS",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
        ):
            assert isinstance(_read_or_refuse(head + data), Radiograph | Reason)

    @FUZZ
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=20
        )
    )
    @pytest.mark.parametrize(
        "syntax",
        [
            ExplicitVRLittleEndian,
            JPEG2000Lossless,
            JPEGLSLossless,
            JPEGLosslessSV1,
            HTJ2KLossless,
            RLELossless,
        ],
    )
    def test_a_small_radiograph_with_wrong_bytes(
        self, syntax: str, changes: list[tuple[int, int]]
    ) -> None:
        data = bytearray(
            _bytes(_radiograph()) if syntax == ExplicitVRLittleEndian else _compressed(syntax)
        )
        for position, value in changes:
            data[128 + position % (len(data) - 128)] = value
        assert isinstance(_read_or_refuse(bytes(data)), Radiograph | Reason)

    @settings(FUZZ, max_examples=40)
    @given(
        changes=st.lists(
            st.tuples(st.integers(128, 1620), st.integers(0, 255)), min_size=1, max_size=8
        )
    )
    def test_the_real_radiographs_header_with_wrong_bytes(
        self, rg1: Path, changes: list[tuple[int, int]]
    ) -> None:
        data = bytearray(rg1.read_bytes())
        for position, value in changes:
            data[position] = value
        assert isinstance(_read_or_refuse(bytes(data)), Radiograph | Reason)

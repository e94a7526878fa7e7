"""One radiograph in every encoding: lossless ones are identical, lossy ones within a tolerance.

The reference is a real chest radiograph made small. Its grey values are worked out here by
plain arithmetic from the stored values; nothing of lungwatch takes part in that.
"""

import shutil
import subprocess
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
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
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
from lungwatch.imaging.reader import read_radiograph

NATIVE = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
LOSSLESS = (
    RLELossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
)
# Largest and mean difference of grey, 0..1, that a lossy encoding of good quality may make.
LOSSY = {
    JPEGBaseline8Bit: (0.06, 0.01),
    JPEGExtended12Bit: (0.06, 0.01),
    JPEGLSNearLossless: (0.02, 0.01),
    JPEG2000: (0.06, 0.01),
    HTJ2K: (0.06, 0.01),
}
DEPTHS = (8, 10, 12, 15, 16)
EXACT = 1e-6

Samples = NDArray[Any]


@pytest.fixture(scope="module")
def reference(rg1: Path) -> NDArray[np.float64]:
    """Grey 0..1, which does reach both; an odd number of columns."""
    small = cv2.resize(pydicom.dcmread(rg1).pixel_array, (101, 90), interpolation=cv2.INTER_AREA)
    return (small - small.min()) / float(np.ptp(small))


def stored_values(reference: NDArray[np.float64], bits: int, *, signed: bool = False) -> Samples:
    values = np.rint(reference * (2**bits - 1)).astype(np.int64) - signed * 2 ** (bits - 1)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def expected_grey(stored: Samples, photometric: str) -> NDArray[np.float64]:
    values = stored.astype(np.float64)
    grey = (values - values.min()) / np.ptp(values)
    return 1 - grey if photometric == "MONOCHROME1" else grey


def radiograph(stored: Samples, bits: int, photometric: str) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.826.0.1.3680043.8.498.7"
    dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def frame_of(stored: Samples, bits: int, syntax: UID) -> bytes | None:
    """Encode a frame where pydicom cannot."""
    mask = 2**bits - 1
    unsigned = stored.view(f"u{stored.dtype.itemsize}") & mask
    match syntax:
        case _ if syntax in (JPEGLossless, JPEGLosslessSV1):
            predictor = 1 if syntax == JPEGLosslessSV1 else 4
            return bytes(
                imagecodecs.jpeg8_encode(
                    unsigned, lossless=True, predictor=predictor, bitspersample=bits
                )
            )
        case _ if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
            return bytes(imagecodecs.jpeg8_encode(unsigned, level=97, bitspersample=bits))
        case _ if syntax in (HTJ2KLossless, HTJ2KLosslessRPCL):
            return bytes(imagecodecs.htj2k_encode(stored, reversible=True))
        case _ if syntax == HTJ2K:
            return bytes(imagecodecs.htj2k_encode(stored, level=0.0005, reversible=False))
    return None


def encode(dataset: Dataset, stored: Samples, syntax: UID) -> Dataset:
    bits = dataset.BitsStored
    if syntax in NATIVE:
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = stored.astype(stored.dtype.newbyteorder(">")).tobytes()
    elif (frame := frame_of(stored, bits, syntax)) is not None:
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
    else:
        options: dict[str, Any] = {}
        if syntax == JPEGLSNearLossless:
            options = {"jls_error": min(255, 2**bits // 128)}
        if syntax == JPEG2000:
            options = {"j2k_cr": [3]}
        dataset.compress(syntax, generate_instance_uid=False, **options)
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def save(dataset: Dataset, folder: Path) -> Path:
    path = folder / "image"
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def shown(dataset: Dataset, folder: Path) -> NDArray[np.float32]:
    return read_radiograph(save(dataset, folder)).pixels


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("syntax", [*NATIVE, *LOSSLESS], ids=lambda syntax: syntax.keyword)
def test_a_lossless_encoding_is_identical(
    reference: NDArray[np.float64],
    tmp_path: Path,
    syntax: UID,
    bits: int,
    signed: bool,
    photometric: str,
) -> None:
    stored = stored_values(reference, bits, signed=signed)
    dataset = encode(radiograph(stored, bits, photometric), stored, syntax)
    pixels = shown(dataset, tmp_path)
    assert np.abs(pixels - expected_grey(stored, photometric)).max() < EXACT


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("syntax", "bits"),
    [
        pytest.param(syntax, bits, id=f"{syntax.keyword}-{bits}")
        for syntax in LOSSY
        # ISO 10918 knows no other depths for these two.
        for bits in {JPEGBaseline8Bit: (8,), JPEGExtended12Bit: (8, 12)}.get(syntax, DEPTHS)
    ],
)
def test_a_lossy_encoding_is_within_its_tolerance(
    reference: NDArray[np.float64], tmp_path: Path, syntax: UID, bits: int, photometric: str
) -> None:
    stored = stored_values(reference, bits)
    dataset = encode(radiograph(stored, bits, photometric), stored, syntax)
    difference = np.abs(shown(dataset, tmp_path) - expected_grey(stored, photometric))
    largest, mean = LOSSY[syntax]
    assert difference.max() < largest
    assert difference.mean() < mean


class TestColour:
    """A grey image that went through RGB, as screen copies do."""

    @pytest.mark.parametrize("planar", [0, 1])
    @pytest.mark.parametrize(
        "syntax", [*NATIVE[:2], RLELossless, JPEG2000Lossless], ids=lambda syntax: syntax.keyword
    )
    def test_equal_channels_are_the_grey_image(
        self, reference: NDArray[np.float64], tmp_path: Path, syntax: UID, planar: int
    ) -> None:
        grey = stored_values(reference, 8)
        stored = np.repeat(grey[:, :, np.newaxis], 3, axis=2)
        dataset = radiograph(stored, 8, "RGB")
        if planar and syntax in NATIVE:
            dataset.PlanarConfiguration = 1
            dataset.PixelData = np.ascontiguousarray(np.moveaxis(stored, 2, 0)).tobytes()
        pixels = shown(encode(dataset, stored, syntax), tmp_path)
        assert np.abs(pixels - grey / 255).max() < EXACT

    @pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422"])
    def test_luminance_without_colour_is_the_grey_image(
        self, reference: NDArray[np.float64], tmp_path: Path, photometric: str
    ) -> None:
        grey = stored_values(reference, 8)[:, :100]
        stored = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], axis=2)
        dataset = radiograph(stored, 8, photometric)
        if photometric == "YBR_FULL_422":
            pairs = grey.reshape(-1, 2)
            neutral = np.full_like(pairs, 128)
            dataset.PixelData = np.hstack([pairs, neutral]).tobytes()
        assert np.abs(shown(dataset, tmp_path) - grey / 255).max() < 0.005

    def test_a_jpeg_in_colour_space_is_the_grey_image(
        self, reference: NDArray[np.float64], tmp_path: Path
    ) -> None:
        grey = stored_values(reference, 8)
        stored = np.repeat(grey[:, :, np.newaxis], 3, axis=2)
        dataset = radiograph(stored, 8, "YBR_FULL_422")
        dataset.PixelData = encapsulate([bytes(imagecodecs.jpeg8_encode(stored, level=97))])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        assert np.abs(shown(dataset, tmp_path) - grey / 255).max() < 0.06

    @pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
    def test_a_lossless_jpeg_in_rgb_is_the_grey_image(
        self, reference: NDArray[np.float64], tmp_path: Path, syntax: UID
    ) -> None:
        grey = stored_values(reference, 8)
        stored = np.repeat(grey[:, :, np.newaxis], 3, axis=2)
        dataset = radiograph(stored, 8, "RGB")
        frame = imagecodecs.jpeg8_encode(
            stored, lossless=True, predictor=1, colorspace="RGB", outcolorspace="RGB"
        )
        dataset.PixelData = encapsulate([bytes(frame)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        assert np.abs(shown(dataset, tmp_path) - grey / 255).max() < EXACT

    @pytest.mark.parametrize("depth", [8, 16])
    def test_a_grey_palette_is_applied(
        self, reference: NDArray[np.float64], tmp_path: Path, depth: int
    ) -> None:
        stored = stored_values(reference, 8)
        dataset = radiograph(stored, 8, "PALETTE COLOR")
        ramp = np.linspace(2**depth - 1, 0, 256).round().astype(np.uint16)
        for colour in ("Red", "Green", "Blue"):
            setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, depth])
            table = ramp.astype(np.uint8 if depth == 8 else np.uint16).tobytes()
            setattr(dataset, f"{colour}PaletteColorLookupTableData", table)
        assert np.abs(shown(dataset, tmp_path) - (1 - stored / 255)).max() < 1e-4

    def test_a_coloured_picture_is_refused(
        self, find_testdata: Callable[[str], Path], tmp_path: Path
    ) -> None:
        dataset = pydicom.dcmread(find_testdata("examples_rgb_color.dcm"))
        dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
        dataset.SOPClassUID = ComputedRadiographyImageStorage
        with pytest.raises(FileRejected, match="in colours") as caught:
            shown(dataset, tmp_path)
        assert caught.value.reason is Reason.UNSUPPORTED_PIXEL_FORMAT


class TestBits:
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
    @pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
    def test_samples_may_lie_at_the_top_of_their_words(
        self, reference: NDArray[np.float64], tmp_path: Path, signed: bool, syntax: UID
    ) -> None:
        stored = stored_values(reference, 12, signed=signed)
        # Below them a graphic of four bits, as PS3.5 8.1.2 allowed.
        words = ((stored.astype(np.int32) << 4) | 0b0101).astype(stored.dtype)
        dataset = radiograph(words, 12, "MONOCHROME2")
        dataset.HighBit = 15
        pixels = shown(encode(dataset, words, syntax), tmp_path)
        assert np.abs(pixels - expected_grey(stored, "MONOCHROME2")).max() < EXACT

    @pytest.mark.parametrize(
        "syntax", [*NATIVE, RLELossless, JPEGLosslessSV1], ids=lambda syntax: syntax.keyword
    )
    def test_an_overlay_in_the_unused_high_bits_is_left_out(
        self, reference: NDArray[np.float64], tmp_path: Path, syntax: UID
    ) -> None:
        stored = stored_values(reference, 10)
        words = stored | (np.indices(stored.shape).sum(axis=0) % 7 == 0).astype(np.uint16) << 12
        dataset = radiograph(words, 10, "MONOCHROME2")
        dataset.add_new(0x60000100, "US", 1)
        dataset.add_new(0x60000102, "US", 12)
        if syntax == JPEGLosslessSV1:  # whole words were compressed
            dataset.BitsStored = 16
            encode(dataset, words, syntax)
            dataset.BitsStored = 10
        else:
            encode(dataset, words, syntax)
        pixels = shown(dataset, tmp_path)
        assert np.abs(pixels - expected_grey(stored, "MONOCHROME2")).max() < EXACT

    def test_an_overlay_of_its_own_is_left_out(
        self, reference: NDArray[np.float64], tmp_path: Path
    ) -> None:
        stored = stored_values(reference, 12)
        dataset = radiograph(stored, 12, "MONOCHROME2")
        dataset.add_new(0x60000010, "US", stored.shape[0])
        dataset.add_new(0x60000011, "US", stored.shape[1])
        dataset.add_new(0x60000100, "US", 1)
        dataset.add_new(0x60000102, "US", 0)
        dataset.add_new(0x60003000, "OW", b"\xff" * (stored.size // 8 // 2 * 2 + 2))
        pixels = shown(dataset, tmp_path)
        assert np.abs(pixels - expected_grey(stored, "MONOCHROME2")).max() < EXACT


class TestMissing:
    @pytest.mark.parametrize(
        ("syntax", "package"),
        [
            (JPEGLosslessSV1, "imagecodecs"),
            (JPEGLSLossless, "pyjpegls"),
            (JPEG2000Lossless, "imagecodecs"),
            (HTJ2KLossless, "imagecodecs"),
        ],
    )
    def test_a_missing_decoder_is_named_with_what_to_install(
        self,
        reference: NDArray[np.float64],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        syntax: UID,
        package: str,
    ) -> None:
        stored = stored_values(reference, 12)
        dataset = encode(radiograph(stored, 12, "MONOCHROME2"), stored, syntax)
        monkeypatch.setattr(get_decoder(syntax), "_available", {})
        with pytest.raises(FileRejected) as caught:
            shown(dataset, tmp_path)
        assert caught.value.reason is Reason.UNSUPPORTED_TRANSFER_SYNTAX
        assert syntax in str(caught.value)
        assert syntax.name in str(caught.value)
        assert f"pip install {package}" in str(caught.value)

    def test_a_film_codec_is_refused_by_name(
        self, reference: NDArray[np.float64], tmp_path: Path
    ) -> None:
        stored = stored_values(reference, 8)
        dataset = radiograph(stored, 8, "MONOCHROME2")
        dataset.PixelData = encapsulate([b"\0\0\0\1 no film"])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.102")
        with pytest.raises(FileRejected, match=r"MPEG-4.*is not supported") as caught:
            shown(dataset, tmp_path)
        assert caught.value.reason is Reason.UNSUPPORTED_TRANSFER_SYNTAX


DCMTK = {
    "dcmcjpeg +e1": JPEGLosslessSV1,
    "dcmcjpeg +el +sv 7": JPEGLossless,
    "dcmcjpls": JPEGLSLossless,
    "dcmcrle": RLELossless,
    "dcmconv +td": DeflatedExplicitVRLittleEndian,
    "dcmconv +tb": ExplicitVRBigEndian,
    "dcmconv +ti": ImplicitVRLittleEndian,
    "dcmconv -F +ti": ImplicitVRLittleEndian,
}


class TestDcmtk:
    """What DCMTK's tools write, who share no code with the decoders here."""

    @pytest.mark.parametrize("bits", [8, 12, 16])
    @pytest.mark.parametrize("tool", DCMTK)
    def test_a_lossless_encoding_is_identical(
        self, reference: NDArray[np.float64], tmp_path: Path, tool: str, bits: int
    ) -> None:
        stored = stored_values(reference, bits)
        encoded = self._run(tool, radiograph(stored, bits, "MONOCHROME2"), tmp_path)
        radiograph_read = read_radiograph(encoded)
        assert radiograph_read.meta.transfer_syntax == DCMTK[tool]
        difference = np.abs(radiograph_read.pixels - expected_grey(stored, "MONOCHROME2"))
        assert difference.max() < EXACT

    @pytest.mark.parametrize(("tool", "bits"), [("dcmcjpeg +eb", 8), ("dcmcjpeg +ee", 12)])
    def test_a_lossy_encoding_is_within_its_tolerance(
        self, reference: NDArray[np.float64], tmp_path: Path, tool: str, bits: int
    ) -> None:
        stored = stored_values(reference, bits)
        encoded = self._run(f"{tool} +q 97", radiograph(stored, bits, "MONOCHROME2"), tmp_path)
        pixels = read_radiograph(encoded).pixels
        assert np.abs(pixels - expected_grey(stored, "MONOCHROME2")).max() < 0.06

    @staticmethod
    def _run(tool: str, dataset: Dataset, folder: Path) -> Path:
        program, *options = tool.split()
        if shutil.which(program) is None:
            pytest.skip(f"{program} of DCMTK is not installed (Debian's package dcmtk)")
        dataset.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.8"
        dataset.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.9"
        source, target = save(dataset, folder), folder / "encoded"
        done = subprocess.run(
            [program, *options, str(source), str(target)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return target

"""Grey-scale transformations of DICOM, compared with pydicom's own arithmetic."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

from lungwatch.errors import FileRejected, Flag, Reason
from lungwatch.imaging import display
from lungwatch.imaging.samples import Samples

RAMP = np.linspace(0, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)


def to_display(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.float32]:
    return display.to_display(Samples(values=stored), dataset).pixels


def _flags(stored: NDArray[Any], dataset: Dataset) -> tuple[Flag, ...]:
    return display.to_display(Samples(values=stored), dataset).flags


def _dataset(**attributes: object) -> Dataset:
    dataset = Dataset()
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def _lut(first: int, bits: int, data: NDArray[np.uint16]) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(data), first, bits])
    item.add_new("LUTData", "US", data.tolist())
    return item


class TestWindow:
    @pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
    @pytest.mark.parametrize(
        ("center", "width"), [(2048, 4096), (1500, 800), (3000.5, 1234.5), (100, 2000), (2000, 200)]
    )
    def test_is_pydicoms(self, function: str | None, center: float, width: float) -> None:
        dataset = _dataset(WindowCenter=center, WindowWidth=width)
        if function:
            dataset.VOILUTFunction = function
        expected = apply_windowing(RAMP, dataset) / 4095
        assert np.abs(to_display(RAMP, dataset) - expected).max() < 1e-5

    def test_follows_the_rescaling(self) -> None:
        dataset = _dataset(
            RescaleSlope=0.5, RescaleIntercept=-100, WindowCenter=900, WindowWidth=1000
        )
        values = RAMP * 0.5 - 100
        expected = np.clip((values - 899.5) / 999 + 0.5, 0, 1)
        assert np.abs(to_display(RAMP, dataset) - expected).max() < 1e-5

    def test_the_first_of_several_is_used(self) -> None:
        one = _dataset(WindowCenter=1500, WindowWidth=800)
        several = _dataset(WindowCenter=[1500, 2000], WindowWidth=[800, 4000])
        assert (to_display(RAMP, one) == to_display(RAMP, several)).all()

    @pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
    def test_functions_other_than_linear_may_be_narrower_than_1(self, function: str) -> None:
        dataset = _dataset(
            RescaleSlope=1 / 4095,
            RescaleIntercept=0,
            WindowCenter=0.5,
            WindowWidth=0.5,
            VOILUTFunction=function,
        )
        grey = to_display(RAMP, dataset)
        assert grey[32, 0] == pytest.approx(0.5, abs=0.01)
        # In the middle a window of half the range is twice as steep as none, or as a sigmoid.
        assert grey[40, 0] - grey[24, 0] > 0.4

    @pytest.mark.parametrize(
        ("center", "width"),
        [
            (40, 1),  # a bone window's remains
            (50_000, 100),
            (-5000, 400),
            (2048, 0),
            (2048, -10),
            (float("nan"), 100),
            (1e30, 1e-30),
        ],
    )
    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_one_that_leaves_no_grey_is_another_images_and_ignored(
        self, center: float, width: float, function: str
    ) -> None:
        with np.errstate(all="raise"):
            grey = to_display(
                RAMP,
                _DatasetWithAnyWindow(center=center, width=width, function=function),
            )
        assert np.abs(grey - RAMP / 4095).max() < 1e-5

    @pytest.mark.parametrize("center", ["", None, "wide", []])
    def test_one_that_is_no_number_is_ignored(self, center: object) -> None:
        dataset = _DatasetWithAnyWindow(center=center, width=100, function="LINEAR")
        assert np.abs(to_display(RAMP, dataset) - RAMP / 4095).max() < 1e-5


class _DatasetWithAnyWindow(Dataset):
    """Holds windows that pydicom itself would not take but files do."""

    def __init__(self, *, center: object, width: object, function: str) -> None:
        super().__init__(_dataset(VOILUTFunction=function))
        self._window = {"WindowCenter": center, "WindowWidth": width}

    def get(self, key: object, default: object = None) -> object:  # type: ignore[override]
        if isinstance(key, str) and key in self._window:
            return self._window[key]
        return super().get(key, default)  # type: ignore[call-overload]


class TestTables:
    def test_a_voi_lut_is_pydicoms_and_wins_over_a_window(self) -> None:
        table = (np.sqrt(np.linspace(0, 1, 4096)) * 65535).astype(np.uint16)
        dataset = _dataset(VOILUTSequence=[_lut(0, 16, table)], WindowCenter=1000, WindowWidth=500)
        expected = apply_voi(RAMP, dataset) / 65535
        assert np.abs(to_display(RAMP, dataset) - expected).max() < 1e-5

    def test_values_outside_a_voi_lut_take_its_ends(self) -> None:
        table = np.linspace(0, 1023, 1000).astype(np.uint16)
        dataset = _dataset(VOILUTSequence=[_lut(1500, 10, table)])
        grey = to_display(RAMP, dataset)
        assert grey[RAMP < 1500] == pytest.approx(0.0)
        assert grey[RAMP > 2600] == pytest.approx(1.0)

    def test_a_table_that_holds_more_than_it_states_stays_within_0_and_1(self) -> None:
        table = np.linspace(0, 65535, 4096).astype(np.uint16)
        grey = to_display(RAMP, _dataset(VOILUTSequence=[_lut(0, 12, table)]))
        assert grey.max() == 1.0

    def test_a_modality_lut_is_pydicoms(self) -> None:
        table = np.linspace(4095, 0, 4096).astype(np.uint16)
        dataset = _dataset(ModalityLUTSequence=[_lut(0, 16, table)])
        values = apply_modality_lut(RAMP, dataset)
        expected = (values - values.min()) / np.ptp(values)
        assert np.abs(to_display(RAMP, dataset) - expected).max() < 1e-5

    def test_a_voi_lut_follows_a_rescaling_to_fractions_and_to_negative_values(self) -> None:
        # First mapped value -1000, as an unsigned attribute holds it.
        table = np.linspace(0, 255, 2048).round().astype(np.uint16)
        dataset = _dataset(
            RescaleSlope=0.5, RescaleIntercept=-1000, VOILUTSequence=[_lut(2**16 - 1000, 8, table)]
        )
        values = np.rint(RAMP * 0.5 - 1000).astype(int)
        expected = table[np.clip(values + 1000, 0, 2047)] / 255
        assert np.abs(to_display(RAMP, dataset) - expected).max() < 1e-6

    def test_a_voi_lut_of_signed_values_may_begin_below_zero(self) -> None:
        stored = RAMP.astype(np.int16) - 2048
        item = Dataset()
        table = np.linspace(0, 1023, 4096).round().astype(np.uint16)
        item.add_new("LUTDescriptor", "SS", [4096, -2048, 10])
        item.add_new("LUTData", "US", table.tolist())
        dataset = _dataset(PixelRepresentation=1, VOILUTSequence=[item])
        assert np.abs(to_display(stored, dataset) - table[RAMP] / 1023).max() < 1e-6

    @pytest.mark.parametrize("packed", ["bytes", "two in a word", "words as bytes"])
    def test_a_table_of_8_bits_is_read_however_it_is_packed(self, packed: str) -> None:
        table = np.linspace(255, 0, 4096).round().astype(np.uint8)
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [4096, 0, 8])
        if packed == "two in a word":
            item.add_new("LUTData", "US", table.view("<u2").tolist())
        else:
            data = table if packed == "bytes" else table.astype("<u2")
            item.add_new("LUTData", "OW", data.tobytes())
        grey = to_display(RAMP, _dataset(VOILUTSequence=[item]))
        assert np.abs(grey - table[RAMP] / 255).max() < 1e-6

    def test_a_table_of_65536_entries_states_0(self) -> None:
        table = np.arange(2**16, dtype=np.uint16)
        lut = _lut(0, 16, table)
        lut.LUTDescriptor = [0, 0, 16]
        deep = RAMP * np.uint16(12)
        grey = to_display(deep, _dataset(VOILUTSequence=[lut], BitsStored=16))
        assert np.abs(grey - deep / 65535).max() < 1e-6

    def test_the_first_of_several_tables_is_used(self) -> None:
        up = _lut(0, 8, np.linspace(0, 255, 4096).astype(np.uint16))
        down = _lut(0, 8, np.linspace(255, 0, 4096).astype(np.uint16))
        several = to_display(RAMP, _dataset(VOILUTSequence=[up, down]))
        assert (several == to_display(RAMP, _dataset(VOILUTSequence=[up]))).all()


class TestFullRange:
    def test_without_a_window_black_and_white_are_the_images_own(self) -> None:
        stored = RAMP // 4 + 500
        expected = (stored - stored.min()) / np.ptp(stored)
        assert np.abs(to_display(stored, _dataset()) - expected).max() < 1e-5

    def test_eight_bits_are_shown_as_they_are(self) -> None:
        stored = (RAMP // 32 + 51).astype(np.uint8)
        grey = to_display(stored, _dataset(BitsAllocated=8, BitsStored=8))
        assert (grey == stored / np.float32(255)).all()

    def test_padding_does_not_take_part(self) -> None:
        stored = RAMP // 4 + 1000
        stored[:4] = 0
        grey = to_display(stored, _dataset(PixelPaddingValue=0))
        assert (grey[:4] == 0).all()
        assert grey[4:].min() == 0.0
        assert grey[4:].max() == 1.0
        assert grey[34, 0] == pytest.approx(0.5, abs=0.03)

    def test_a_letter_far_brighter_than_the_image_does_not_darken_it(self) -> None:
        stored = RAMP.copy() // 4
        stored[0, :8] = 65_000
        grey = to_display(stored, _dataset(BitsStored=16))
        assert np.median(grey) == pytest.approx(0.5, abs=0.02)
        assert (grey[0, :8] == 1).all()

    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    @pytest.mark.parametrize("window", [{}, {"WindowCenter": 1500, "WindowWidth": 1000}])
    def test_padding_is_shown_as_air_whatever_the_polarity(
        self, photometric: str, window: dict[str, object]
    ) -> None:
        stored = RAMP // 4 + 1000
        without = to_display(stored, _dataset(PhotometricInterpretation=photometric, **window))
        stored[:4], stored[:, -3:] = 3000, 3020
        padding = {"PixelPaddingValue": 3000, "PixelPaddingRangeLimit": 3050}
        dataset = _dataset(PhotometricInterpretation=photometric, **window, **padding)
        grey = to_display(stored, dataset)
        assert (grey[:4] == 0).all()
        assert (grey[:, -3:] == 0).all()
        if window:
            assert (grey[4:, :-3] == without[4:, :-3]).all()

    def test_the_padding_value_within_the_image_is_bone_or_air_and_stays(self) -> None:
        stored = RAMP // 4 + 1000
        stored[30:34, 30:34] = 0
        stored[0] = 0
        grey = to_display(
            stored,
            _dataset(
                PixelPaddingValue=0,
                PhotometricInterpretation="MONOCHROME1",
                WindowCenter=1500,
                WindowWidth=1000,
            ),
        )
        assert (grey[30:34, 30:34] == 1).all()
        assert (grey[0] == 0).all()

    def test_signed_values_are_grey_too(self) -> None:
        stored = RAMP.astype(np.int16) - 2048
        assert (
            np.abs(to_display(stored, _dataset(PixelRepresentation=1)) - RAMP / 4095).max() < 1e-5
        )

    def test_nothing_but_padding_does_not_divide_by_zero(self) -> None:
        grey = to_display(np.zeros((8, 8), np.uint16), _dataset(PixelPaddingValue=0))
        assert (grey == 0).all()


class TestPolarity:
    @pytest.mark.parametrize("shape", [None, "IDENTITY", "INVERSE"])
    def test_monochrome1_is_inverted_once(self, shape: str | None) -> None:
        dataset = _dataset(PhotometricInterpretation="MONOCHROME1")
        if shape:
            dataset.PresentationLUTShape = shape
        assert np.abs(to_display(RAMP, dataset) - (1 - RAMP / 4095)).max() < 1e-5

    def test_an_inverse_presentation_of_monochrome2_is_inverted(self) -> None:
        dataset = _dataset(PresentationLUTShape="INVERSE")
        assert np.abs(to_display(RAMP, dataset) - (1 - RAMP / 4095)).max() < 1e-5

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_the_window_comes_before_the_inversion(self, function: str) -> None:
        window = {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": function}
        inverse = to_display(RAMP, _dataset(PhotometricInterpretation="MONOCHROME1", **window))
        assert np.abs(inverse - (1 - to_display(RAMP, _dataset(**window)))).max() < 1e-6


class TestColour:
    def test_is_refused(self) -> None:
        stored = np.zeros((16, 16, 3), dtype=np.uint8)
        stored[:4], stored[4:8], stored[8:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
        with pytest.raises(FileRejected, match="in colours") as caught:
            to_display(stored, _dataset(PhotometricInterpretation="RGB", BitsStored=8))
        assert caught.value.reason is Reason.UNSUPPORTED_PIXEL_FORMAT

    def test_a_few_coloured_letters_on_grey_become_luma(self) -> None:
        stored = np.repeat((RAMP // 16).astype(np.uint8)[:, :, np.newaxis], 3, axis=2)
        stored[0, :8] = (255, 0, 0)
        grey = to_display(stored, _dataset(PhotometricInterpretation="RGB", BitsStored=8))
        assert grey[0, :8] == pytest.approx(0.299, abs=1e-6)
        assert np.abs(grey[1:] - stored[1:, :, 0] / 255).max() < 1e-6

    def test_equal_channels_are_the_grey_itself(self) -> None:
        stored = np.repeat((RAMP // 16).astype(np.uint8)[:, :, np.newaxis], 3, axis=2)
        grey = to_display(stored, _dataset(PhotometricInterpretation="RGB", BitsStored=8))
        assert np.abs(grey - stored[:, :, 0] / 255).max() < 1e-6
        assert grey.max() <= 1.0


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"WindowCenter": 2048, "WindowWidth": 1000},
        {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
        {"RescaleSlope": 2, "RescaleIntercept": -1024},
        {"PhotometricInterpretation": "MONOCHROME1"},
    ],
    ids=["bare", "linear", "sigmoid", "rescale", "inverse"],
)
def test_the_result_is_float32_within_0_and_1_and_the_input_untouched(
    attributes: dict[str, object],
) -> None:
    stored = RAMP.copy()
    grey = to_display(stored, _dataset(**attributes))
    assert grey.dtype == np.float32
    assert grey.shape == stored.shape
    assert 0.0 <= grey.min() < grey.max() <= 1.0
    assert (stored == RAMP).all()

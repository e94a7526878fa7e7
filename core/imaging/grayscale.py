"""The grey-scale transformations of DICOM, from stored values to what a screen shows.

PS3.3 C.11 and PS3.4 N.2: modality LUT, values of interest (VOI) LUT or window, presentation.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from lungwatch.imaging.radiograph import FloatImage

# A window that leaves fewer pixels than this between black and white belongs to another
# image, or to values from before a shift that the file does not mention: such files exist.
_MIN_GREY_SHARE = 0.02
# No physical quantity in a radiograph comes near it, and float32 still holds its square.
_MAX_VALUE = 1e18


def to_display(stored: NDArray[Any], dataset: Dataset) -> FloatImage:
    """Apply modality LUT, VOI and photometric interpretation.

    Parameters
    ----------
    stored
        Stored values, shape (rows, columns), or (rows, columns, 3) for colour.
    dataset
        The attributes that describe them.

    Returns
    -------
    numpy.ndarray
        float32, shape (rows, columns), 0..1, air dark whatever the file's polarity.
    """
    if stored.ndim == 3:
        # Colour radiographs are screen copies: luma as in ITU-R BT.601.
        full = float(np.iinfo(stored.dtype).max)
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
        return np.asarray(stored.astype(np.float32) @ weights / full, dtype=np.float32)

    values = _modality(stored, dataset)
    grey = _voi_lut(values, dataset)
    if grey is None:
        grey = _window(values, dataset)
    if grey is None:
        grey = _full_range(values, stored, dataset)
    return np.subtract(1.0, grey, dtype=np.float32) if _is_inverse(dataset) else grey


def _modality(stored: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    if "ModalityLUTSequence" in dataset:
        return np.asarray(apply_modality_lut(stored, dataset))
    slope, intercept = (
        _float(dataset, "RescaleSlope", 1.0),
        _float(dataset, "RescaleIntercept", 0.0),
    )
    reach = abs(slope) * float(np.iinfo(stored.dtype).max) + abs(intercept)
    # Slopes that flatten the image, or carry it out of all bounds, are typing errors.
    if (slope, intercept) == (1.0, 0.0) or slope == 0.0 or not reach < _MAX_VALUE:
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _voi_lut(values: NDArray[Any], dataset: Dataset) -> FloatImage | None:
    if not dataset.get("VOILUTSequence") or not np.issubdtype(values.dtype, np.integer):
        return None
    bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    if not 1 <= bits <= 16:
        raise ValueError(f"a VOI LUT of {bits} bits")
    looked_up = np.asarray(apply_voi(values, dataset, index=0), dtype=np.float32)
    # A table may hold more than the bits that it states.
    looked_up /= np.float32(2**bits - 1)
    return np.clip(looked_up, 0.0, 1.0, out=looked_up)


def _window(values: NDArray[Any], dataset: Dataset) -> FloatImage | None:
    center = _float(dataset, "WindowCenter", np.nan)
    width = _float(dataset, "WindowWidth", np.nan)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    # Only LINEAR, the default, wants a width of at least 1 (C.11.2.1.3.2).
    narrowest = 1 / _MAX_VALUE if function in ("LINEAR_EXACT", "SIGMOID") else 1.0
    if not abs(center) < _MAX_VALUE or not narrowest <= width < _MAX_VALUE:
        return None
    grey = values.astype(np.float32)
    if function == "SIGMOID":  # C.11.2.1.3.1
        grey -= np.float32(center)
        grey *= np.float32(-4.0 / width)
        # Further out than this float32 rounds to black and white anyway; exp() would overflow.
        np.clip(grey, -80.0, 80.0, out=grey)
        grey = np.asarray(1.0 / (1.0 + np.exp(grey)), dtype=np.float32)
        black, white = 0.01, 0.99
    elif function == "LINEAR_EXACT" or width == 1:  # C.11.2.1.3.2
        grey -= np.float32(center - width / 2)
        grey /= np.float32(width)
        black, white = 0.0, 1.0
    else:  # C.11.2.1.2.1
        grey -= np.float32(center - 0.5 - (width - 1) / 2)
        grey /= np.float32(width - 1)
        black, white = 0.0, 1.0
    # A sample of the pixels tells whether the window is this image's.
    sample = grey[::8, ::8]
    if float(np.mean((sample > black) & (sample < white))) < _MIN_GREY_SHARE:
        return None
    return np.clip(grey, 0.0, 1.0, out=grey)


def _full_range(values: NDArray[Any], stored: NDArray[Any], dataset: Dataset) -> FloatImage:
    if values is stored and stored.dtype == np.uint8:
        # Eight bits without a window are shown as they are, like a PNG.
        return stored.astype(np.float32) / np.float32(255)
    padding = dataset.get("PixelPaddingValue")
    kept = values if padding is None else values[stored != padding]
    if kept.size == 0:
        kept = values
    low, high = float(kept.min()), float(kept.max())
    grey = (values.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return np.clip(grey, 0.0, 1.0, out=grey)


def _is_inverse(dataset: Dataset) -> bool:
    # MONOCHROME1 and Presentation LUT Shape INVERSE state the same thing twice in DX
    # (PS3.3 C.8.11.3.1.2): one inversion, not two.
    photometric = str(dataset.get("PhotometricInterpretation", "")).strip().upper()
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    return photometric == "MONOCHROME1" or (photometric == "MONOCHROME2" and shape == "INVERSE")


def _float(dataset: Dataset, keyword: str, default: float) -> float:
    """Return the first value of a decimal attribute, `default` if absent or malformed."""
    try:
        value = dataset.get(keyword)
        if value is None or value == "":
            return default
        if hasattr(value, "__len__") and not isinstance(value, str):
            value = value[0]
        return float(value)
    except (TypeError, ValueError, IndexError):
        return default

"""Windows: center, width and function of a VOI transformation (PS3.3 C.11.2.1.2)."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import code_of, numbers_of, text_of
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.tone import is_visible

# No physical quantity in a radiograph comes near it, and float32 still holds its square.
_MAX_VALUE = 1e18
# A window that leaves fewer pixels than this between black and white, or more on one side of
# it, belongs to another image, or to values from before a shift that the file does not mention.
_MIN_GREY_SHARE = 0.02
_MAX_ONE_SIDE_SHARE = 0.9
# The whole range of a depth is the window of an image of that depth. Where it leaves so many
# pixels white, the image is deeper.
_MAX_WHITE_SHARE_OF_DEPTH = 0.25
_DEPTHS = range(7, 17)
# A value that takes up so many pixels is a background, not the image.
_BACKGROUND_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Window:
    """One window.

    Attributes
    ----------
    center, width
        In units of what the modality transformation gives.
    function
        LINEAR, LINEAR_EXACT or SIGMOID.
    """

    center: float
    width: float
    function: str

    def apply(self, values: NDArray[Any]) -> FloatImage:
        """Return grey values; what the window leaves black or white may lie outside 0..1."""
        grey = values.astype(np.float32)
        if self.function == "SIGMOID":  # C.11.2.1.3.1
            grey -= np.float32(self.center)
            grey *= np.float32(-4.0 / self.width)
            # Further out than this float32 rounds to black and white anyway; exp() would
            # overflow.
            np.clip(grey, -80.0, 80.0, out=grey)
            return np.asarray(1.0 / (1.0 + np.exp(grey)), dtype=np.float32)
        if self.function == "LINEAR_EXACT" or self.width == 1:  # C.11.2.1.3.2
            grey -= np.float32(self.center - self.width / 2)
            grey /= np.float32(self.width)
        else:  # C.11.2.1.2.1
            grey -= np.float32(self.center - 0.5 - (self.width - 1) / 2)
            grey /= np.float32(self.width - 1)
        return grey

    def belongs_to(self, values: NDArray[Any], shown: NDArray[np.bool_] | None = None) -> bool:
        """Whether the window was made for an image, as far as a sample of its pixels tells.

        Parameters
        ----------
        values
            Shape (rows, columns).
        shown
            True for what is no padding; None for everything.
        """
        sample = values[::8, ::8]
        if shown is not None and shown[::8, ::8].any():
            sample = sample[shown[::8, ::8]]
        sample = sample.ravel()
        grey = self.apply(sample)
        black, white = (0.01, 0.99) if self.function == "SIGMOID" else (0.0, 1.0)
        is_black, is_white = grey <= black, grey >= white
        if float(np.mean(~is_black & ~is_white)) < _MIN_GREY_SHARE:
            return False
        image = _without_background(sample)
        too_dark, too_light = float(np.mean(is_black[image])), float(np.mean(is_white[image]))
        if max(too_dark, too_light) > _MAX_ONE_SIDE_SHARE:
            return False
        if self._is_range_of_a_depth() and too_light > _MAX_WHITE_SHARE_OF_DEPTH:
            return False
        return is_visible(np.clip(grey, 0.0, 1.0))

    def _is_range_of_a_depth(self) -> bool:
        tolerance = max(1.0, self.width / 100)
        return abs(self.center - self.width / 2) <= tolerance and any(
            abs(self.width - 2**bits) <= 1 for bits in _DEPTHS
        )


def windows_of(dataset: Dataset) -> list[Window | None]:
    """Return the windows of an image, in its order; None for one that makes no sense.

    The list is empty where the file states none.
    """
    if text_of(dataset, "WindowCenter") is None and text_of(dataset, "WindowWidth") is None:
        return []
    function = code_of(dataset, "VOILUTFunction") or "LINEAR"
    # Only LINEAR, the default, wants a width of at least 1 (C.11.2.1.3.2).
    narrowest = 1 / _MAX_VALUE if function in ("LINEAR_EXACT", "SIGMOID") else 1.0
    pairs = zip_longest(
        numbers_of(dataset, "WindowCenter"), numbers_of(dataset, "WindowWidth"), fillvalue=np.nan
    )
    windows = [
        Window(center=center, width=width, function=function)
        if abs(center) < _MAX_VALUE and narrowest <= width < _MAX_VALUE
        else None
        for center, width in pairs
    ]
    return windows or [None]


def _without_background(sample: NDArray[Any]) -> NDArray[np.bool_]:
    """Return what is neither the lowest nor the highest value, where those fill an area."""
    kept = np.ones(len(sample), dtype=np.bool_)
    for end in (sample.min(), sample.max()):
        is_end = sample == end
        if float(np.mean(is_end)) > _BACKGROUND_SHARE:
            kept &= ~is_end
    return kept if kept.any() else np.ones(len(sample), dtype=np.bool_)

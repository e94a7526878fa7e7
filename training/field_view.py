"""The network's view of lungs: grey values standardised inside them, mid-grey outside.

One definition for the pictures of training (NumPy) and for the exported graph (Keras): exposure
and window of a picture do not reach the network, and neither does what lies outside the lungs.
Mid-grey is the lungs' mean, so the mask's outline tells less than a black surround would.
"""

import functools
from types import ModuleType

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.pixels import Tensor

# Not that of `pixels`, whose module reads files: these pictures are drawn without a decoder.
FloatArray = NDArray[np.float32]

OUTSIDE = 0.5
"""Grey value of what is no lung, and of the lungs' mean."""

DEVIATIONS = 4.0
"""Standard deviations from black to white."""

_SOFTENING_PX = 1.2  # standard deviation of the Gaussian over the mask, of a view of any size
_LEAST_VARIANCE = 1e-6  # what is uniform becomes mid-grey instead of noise


def soft_lungs(lungs: FloatArray) -> FloatArray:
    """Soften the edge of masks.

    Parameters
    ----------
    lungs
        float32, shape (S, S), 0..1.

    Returns
    -------
    numpy.ndarray
        float32, of the same shape, 0..1: a Gaussian of 1.2 pixels; beyond the border is no lung.
    """
    blur = _gaussian()
    soft = cv2.sepFilter2D(lungs, cv2.CV_32F, blur, blur, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(soft, np.float32)


def standardised(pixels: FloatArray, soft: FloatArray) -> FloatArray:
    """Standardise grey values by their mean and deviation inside the lungs.

    Parameters
    ----------
    pixels
        float32, shape (S, S).
    soft
        float32, of the same shape, 0..1: how much each pixel counts; see `soft_lungs`.

    Returns
    -------
    numpy.ndarray
        float32, of the same shape, clipped to 0..1: 0.5 at the mean, 0 and 1 two deviations
        from it.
    """
    return np.asarray(_standardised(pixels, soft, np), np.float32)


def on_grey(values: FloatArray, soft: FloatArray) -> FloatArray:
    """Fill what is no lung with mid-grey."""
    return np.asarray(_on_grey(values, soft), np.float32)


def view(pixels: FloatArray, lungs: FloatArray) -> FloatArray:
    """Return what the network sees of a picture, float32 (S, S), 0..1; see `view_tensor`."""
    soft = soft_lungs(lungs)
    return on_grey(standardised(pixels, soft), soft)


def view_tensor(pixels: Tensor, lungs: Tensor) -> Tensor:
    """Compute `view` in a graph of Keras.

    Parameters
    ----------
    pixels, lungs
        float32, (N, S, S), grey values and masks, 0..1.

    Returns
    -------
    tensor
        float32, (N, S, S), 0..1.
    """
    from keras import ops

    # Plain arrays: tensors made out here would turn into inputs of an exported graph.
    blur = _gaussian()
    soft = lungs[..., np.newaxis]
    for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
        soft = ops.conv(soft, blur.reshape(shape), padding="same", data_format="channels_last")
    soft = soft[..., 0]
    return _on_grey(_standardised(pixels, soft, ops), soft)


def _standardised(pixels: Tensor, soft: Tensor, ops: ModuleType) -> Tensor:
    def mean(values: Tensor) -> Tensor:
        return ops.sum(values * soft, axis=(-2, -1), keepdims=True) / weight

    weight = ops.maximum(ops.sum(soft, axis=(-2, -1), keepdims=True), 1.0)
    centred = pixels - mean(pixels)
    deviation = ops.sqrt(mean(centred * centred) + _LEAST_VARIANCE)
    return ops.clip(OUTSIDE + centred / (DEVIATIONS * deviation), 0.0, 1.0)


def _on_grey(values: Tensor, soft: Tensor) -> Tensor:
    return OUTSIDE + (values - OUTSIDE) * soft


@functools.cache
def _gaussian() -> FloatArray:
    away = np.arange(-4, 5) / _SOFTENING_PX
    weights = np.exp(-0.5 * away**2)
    return np.asarray(weights / weights.sum(), np.float32)

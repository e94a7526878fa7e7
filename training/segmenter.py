"""Where the lungs are: a small U-Net, used in training and auditing, never in the daemon.

Source: Ronneberger, Fischer, Brox 2015; the loss of Milletari, Navab, Ahmadi 2016 (Dice) with
cross-entropy added.
"""

import cv2
import numpy as np

from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor

SIZE_PX = 128
SEGMENTER_INPUT = PreprocessSpec(size_px=SIZE_PX)

_FILTERS = (12, 24, 48, 96)
_BOTTOM_FILTERS = 128
_BATCH = 64


def build_segmenter() -> KerasModel:
    """Build the network, about 0.8 M parameters.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, 128, 128, 1), 0..1, to each pixel's logit of being lung,
        (N, 128, 128, 1).
    """
    import keras

    def block(x: Tensor, filters: int) -> Tensor:
        for _ in range(2):
            x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = keras.layers.BatchNormalization(momentum=0.9)(x)
            x = keras.layers.ReLU()(x)
        return x

    pixels = keras.Input((SIZE_PX, SIZE_PX, 1), name="pixels")
    x, skips = pixels, []
    for filters in _FILTERS:
        x = block(x, filters)
        skips.append(x)
        x = keras.layers.MaxPooling2D()(x)
    x = block(x, _BOTTOM_FILTERS)
    for filters, skip in zip(reversed(_FILTERS), reversed(skips), strict=True):
        x = keras.layers.UpSampling2D(interpolation="bilinear")(x)
        x = block(keras.layers.Concatenate()([x, skip]), filters)
    return keras.Model(pixels, keras.layers.Conv2D(1, 1, name="lung_logit")(x), name="lungs")


def segmentation_loss(masks: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy plus one minus the soft Dice coefficient, over the whole batch."""
    import tensorflow as tf

    found = tf.sigmoid(logits)
    shared = tf.reduce_sum(found * masks)
    dice = (2.0 * shared + 1.0) / (tf.reduce_sum(found) + tf.reduce_sum(masks) + 1.0)
    crossed = tf.nn.sigmoid_cross_entropy_with_logits(masks, logits)
    return tf.reduce_mean(crossed) + 1.0 - dice


def segment(model: KerasModel, pixels: FloatArray) -> FloatArray:
    """Find the lungs.

    Parameters
    ----------
    model
        What `build_segmenter` built, trained.
    pixels
        float32, shape (N, S, S, 1), 0..1, windowed to the 1st..99th percentile.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, S, S): each pixel's probability of being lung.
    """
    side = pixels.shape[1]
    found = np.empty(pixels.shape[:3], dtype=np.float32)
    for start in range(0, len(pixels), _BATCH):
        small = np.stack([_resized(x[:, :, 0], SIZE_PX) for x in pixels[start : start + _BATCH]])
        logits = np.asarray(model(small[..., np.newaxis], training=False))[..., 0]
        for offset, logit in enumerate(logits):
            found[start + offset] = _resized(1.0 / (1.0 + np.exp(-logit)), side)
    return found


def _resized(image: FloatArray, side: int) -> FloatArray:
    how = cv2.INTER_AREA if side < image.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=how), dtype=np.float32)

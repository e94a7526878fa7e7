"""Grad-CAM by automatic differentiation: the reference that the exported maps are held to.

The export computes the same maps in closed form, since gradient operations do not survive
the conversion to ONNX.
"""

import numpy as np

from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.head import FEATURES
from lungwatch.training.lung_view import BOX, lay_back, looks_at_lungs


def two_logits(logit: Tensor) -> Tensor:
    """Turn binary logits z, shape (N, 1), into one per class, (N, 2): (-z/2, z/2).

    Under softmax they give the sigmoid's probability exactly, so no decision changes, and
    each class has a score of its own to be explained.
    """
    import tensorflow as tf

    return tf.concat([-logit / 2.0, logit / 2.0], axis=1)


def gradcam(model: KerasModel, pixels: FloatArray) -> FloatArray:
    """Explain both classes for each image.

    Parameters
    ----------
    model
        Keras model from pixels to the binary logit, with a layer named "features".
    pixels
        float32, shape (N, S, S, 1), 0..1.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, 2, h, w), each map scaled to 0..1 by its maximum and zero where
        nothing speaks for the class; index 0 NEGATIVE, 1 COVID. Of the whole image, also for a
        network that looks at the lungs alone (`lungwatch.training.lung_view`).

    Source: Selvaraju et al. 2017, with the last convolutional feature map.
    """
    import keras
    import tensorflow as tf

    layers = [FEATURES, BOX] if looks_at_lungs(model) else [FEATURES]
    found = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    logit_of = keras.Model(model.get_layer(FEATURES).output, model.output)
    # As a graph, like the export's: run operation by operation it would round otherwise, and a
    # box that differs by that moves the map.
    forward = tf.function(lambda images: found(images, training=False), autograph=False)
    features, *box = tf.nest.flatten(forward(tf.constant(pixels)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(features)
        scores = two_logits(logit_of(features, training=False))
        # Images do not influence each other at inference: the sum keeps them apart.
        negative, covid = tf.reduce_sum(scores[:, 0]), tf.reduce_sum(scores[:, 1])
    maps = []
    for score in (negative, covid):
        weights = tf.reduce_mean(tape.gradient(score, features), axis=(1, 2), keepdims=True)
        evidence = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        if box:
            evidence = lay_back(evidence, *box)
        raw = evidence.numpy()
        peak = raw.max(axis=(1, 2), keepdims=True)
        maps.append(np.divide(raw, peak, out=np.zeros_like(raw), where=peak > 0))
    return np.stack(maps, axis=1).astype(np.float32)

"""One forward pass for everything: probability, logits, class activation maps, embedding.

The gradient of a GAP -> Dense(relu) -> Dense(1) head has a closed form. With the pooled
features g, h = W1' g + b1 and z = w2' relu(h) + b2, the derivative of z by every cell of
channel c is (W1 (1[h > 0] * w2))_c / (h w), and Grad-CAM's channel weights are that. The
score of COVID is z/2 and that of NEGATIVE -z/2, so their maps are the positive and the negative
part of one weighted sum; constants vanish when the maps are scaled to 0..1. The map of a network
that looks at the lungs' box alone is laid back onto the whole image before that. What a map was
divided by is kept as its peak: images can be compared by it, scaled maps cannot.
"""

from collections.abc import Callable
from typing import Any

from lungwatch.contract import CAM, CAM_PEAK, EMBEDDING, INPUT, LOGITS, PROBABILITY
from lungwatch.errors import ModelError
from lungwatch.training.foreign import KerasModel, Tensor
from lungwatch.training.gradcam import two_logits
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT
from lungwatch.training.lung_view import BOX, lay_back, looks_at_lungs


def build_graph(model: KerasModel) -> tuple[Callable[[Tensor], dict[str, Tensor]], list[Any]]:
    """Make the function that is exported.

    Parameters
    ----------
    model
        Keras model from pixels to the binary logit, with the head of
        `lungwatch.training.head`.

    Returns
    -------
    function, signature
        A `tf.function` from float32 (N, S, S, 1), 0..1, to a dict of float32: `probability`
        (N,), uncalibrated; `logits` (N, 2), NEGATIVE and COVID; `cam` (N, 2, h, w), each map
        0..1; `cam_peak` (N, 2), each map's largest value before it was scaled; `embedding`
        (N, C), the pooled features. And the input signature for tf2onnx.

    Raises
    ------
    ModelError
        If the network does not end in that head.
    """
    import keras
    import tensorflow as tf

    try:
        features_layer = model.get_layer(FEATURES)
        hidden, last = model.get_layer(HIDDEN), model.get_layer(LOGIT)
    except ValueError as error:
        raise ModelError(
            f"the network has no layers named {FEATURES}, {HIDDEN} and {LOGIT}: only networks "
            "with lungwatch's own head can be exported with their maps"
        ) from error
    boxes = [model.get_layer(BOX).output] if looks_at_lungs(model) else []
    inner = keras.Model(model.input, [features_layer.output, *boxes])
    # As arrays: tensors made out here would turn into inputs of the exported graph.
    w1, b1 = hidden.kernel.numpy(), hidden.bias.numpy()
    w2, b2 = last.kernel.numpy(), last.bias.numpy()
    channels = int(features_layer.output.shape[-1])
    size = int(model.input_shape[1])
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32, name=INPUT)]

    def graph(pixels: Tensor) -> dict[str, Tensor]:
        features, *box = tf.nest.flatten(inner(pixels, training=False))
        pooled = tf.reduce_mean(features, axis=(1, 2))
        h = tf.matmul(pooled, w1) + b1
        z = tf.matmul(tf.nn.relu(h), w2) + b2
        active = tf.cast(h > 0.0, tf.float32) * w2.reshape(1, -1)
        weights = tf.matmul(active, w1, transpose_b=True)
        # einsum would leave a transpose of unknown rank that other runtimes refuse.
        evidence = tf.reduce_sum(features * tf.reshape(weights, (-1, 1, 1, channels)), axis=-1)
        maps = [tf.nn.relu(-evidence), tf.nn.relu(evidence)]
        if box:
            maps = [lay_back(one, *box) for one in maps]
        peaks = [tf.reduce_max(one, axis=(1, 2), keepdims=True) for one in maps]
        # A map without anything in it stays zero instead of becoming noise or NaN.
        scaled = [one / tf.maximum(peak, 1e-12) for one, peak in zip(maps, peaks, strict=True)]
        return {
            PROBABILITY: tf.reshape(tf.sigmoid(z), (-1,)),
            LOGITS: two_logits(z),
            CAM: tf.stack(scaled, axis=1),
            CAM_PEAK: tf.reshape(tf.concat(peaks, axis=1), (-1, len(peaks))),
            EMBEDDING: pooled,
        }

    return tf.function(graph, input_signature=signature), signature

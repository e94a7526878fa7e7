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
from dataclasses import dataclass
from typing import Any

from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    EMBEDDING,
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    INPUT,
    LOGITS,
    PROBABILITY,
)
from lungwatch.errors import ModelError
from lungwatch.training.foreign import KerasModel, Tensor
from lungwatch.training.gradcam import two_logits
from lungwatch.training.head import FEATURES, HIDDEN, LOGIT, further_findings, head_layers
from lungwatch.training.lung_view import BOX, lay_back, looks_at_lungs
from lungwatch.training.pixels import FloatArray


def build_graph(model: KerasModel) -> tuple[Callable[[Tensor], dict[str, Tensor]], list[Any]]:
    """Make the function that is exported.

    Parameters
    ----------
    model
        Keras model from pixels to the binary logit, with the head of
        `lungwatch.training.head`, and perhaps one for each further finding.

    Returns
    -------
    function, signature
        A `tf.function` from float32 (N, S, S, 1), 0..1, to a dict of float32: `probability`
        (N,), uncalibrated; `logits` (N, 2), NEGATIVE and COVID; `cam` (N, 2, h, w), each map
        0..1; `cam_peak` (N, 2), each map's largest value before it was scaled; `embedding`
        (N, C), the pooled features. With findings beside COVID: `findings` (N, F), their logits;
        `finding_cams` (N, F, h, w) and `finding_peaks` (N, F), as before, of the map for each.
        And the input signature for tf2onnx.

    Raises
    ------
    ModelError
        If the network does not end in that head.
    """
    import keras
    import tensorflow as tf

    further = further_findings(model)
    try:
        features_layer = model.get_layer(FEATURES)
        # As arrays: tensors made out here would turn into inputs of the exported graph.
        head, *others = (_Head.of(model, name) for name in (None, *further))
    except ValueError as error:
        raise ModelError(
            f"the network has no layers named {FEATURES}, {HIDDEN} and {LOGIT}: only networks "
            "with lungwatch's own head can be exported with their maps"
        ) from error
    boxes = [model.get_layer(BOX).output] if looks_at_lungs(model) else []
    inner = keras.Model(model.input, [features_layer.output, *boxes])
    size = int(model.input_shape[1])
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32, name=INPUT)]

    def graph(pixels: Tensor) -> dict[str, Tensor]:
        features, *box = tf.nest.flatten(inner(pixels, training=False))
        pooled = tf.reduce_mean(features, axis=(1, 2))
        z, evidence = head.explain(features, pooled)
        cam, peaks = _scaled([tf.nn.relu(-evidence), tf.nn.relu(evidence)], box)
        answers = {
            PROBABILITY: tf.reshape(tf.sigmoid(z), (-1,)),
            LOGITS: two_logits(z),
            CAM: cam,
            CAM_PEAK: peaks,
            EMBEDDING: pooled,
        }
        if others:
            pairs = [other.explain(features, pooled) for other in others]
            cams, peaks = _scaled([tf.nn.relu(evidence) for _, evidence in pairs], box)
            logits = tf.concat([logit for logit, _ in pairs], axis=1)
            answers |= {FINDINGS: logits, FINDING_CAMS: cams, FINDING_PEAKS: peaks}
        return answers

    return tf.function(graph, input_signature=signature), signature


@dataclass(frozen=True, kw_only=True, eq=False)
class _Head:
    """Weights of one finding's head, as arrays: kernel and bias of both layers."""

    w1: FloatArray
    b1: FloatArray
    w2: FloatArray
    b2: FloatArray

    @classmethod
    def of(cls, model: KerasModel, finding: str | None) -> "_Head":
        hidden, last = head_layers(model, finding)
        return cls(
            w1=hidden.kernel.numpy(),
            b1=hidden.bias.numpy(),
            w2=last.kernel.numpy(),
            b2=last.bias.numpy(),
        )

    def explain(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit, (N, 1), and what each cell adds to it, (N, h, w)."""
        import tensorflow as tf

        h = tf.matmul(pooled, self.w1) + self.b1
        z = tf.matmul(tf.nn.relu(h), self.w2) + self.b2
        active = tf.cast(h > 0.0, tf.float32) * self.w2.reshape(1, -1)
        weights = tf.matmul(active, self.w1, transpose_b=True)
        shape = (-1, 1, 1, self.w1.shape[0])
        # einsum would leave a transpose of unknown rank that other runtimes refuse.
        return z, tf.reduce_sum(features * tf.reshape(weights, shape), axis=-1)


def _scaled(maps: list[Tensor], box: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return maps as (N, maps, h, w), each 0..1, and what each was divided by, (N, maps)."""
    import tensorflow as tf

    if box:
        maps = [lay_back(one, *box) for one in maps]
    peaks = [tf.reduce_max(one, axis=(1, 2), keepdims=True) for one in maps]
    # A map without anything in it stays zero instead of becoming noise or NaN.
    scaled = [one / tf.maximum(peak, 1e-12) for one, peak in zip(maps, peaks, strict=True)]
    return tf.stack(scaled, axis=1), tf.reshape(tf.concat(peaks, axis=1), (-1, len(peaks)))

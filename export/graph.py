"""ONNX graph of a network with its class activation maps, and its parity with the Keras network.

One forward pass gives everything: probability, logits, class activation maps, embedding.

The gradient of a GAP -> Dense(relu) -> Dense(1) head has a closed form. With the pooled
features g, h = W1' g + b1 and z = w2' relu(h) + b2, the derivative of z by every cell of
channel c is (W1 (1[h > 0] * w2))_c / (h w), and Grad-CAM's channel weights are that. The
score of COVID is z/2 and that of NEGATIVE -z/2, so their maps are the positive and the negative
part of one weighted sum; constants vanish when the maps are scaled to 0..1. The map of a network
that looks at the lungs' box alone is laid back onto the whole image before that. What a map was
divided by is kept as its peak: images can be compared by it, scaled maps cannot.

A foreign network without the hidden layer is brought to this form exactly: u = relu(u) - relu(-u).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    EMBEDDING,
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    INPUT,
    LOGITS,
    METADATA_KEY,
    OUTPUTS,
    PROBABILITY,
    ModelContract,
)
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.preprocess import PreprocessSpec, golden_input
from lungwatch.training.data.pixels import FloatArray, KerasModel, OnnxProto, Tensor
from lungwatch.training.evaluation.metrics import sigmoid
from lungwatch.training.evaluation.scorers import (
    Declaration,
    last_layer,
    onnx_session,
    predict_logits,
)
from lungwatch.training.fitting.augmentation import Augmentation, augment
from lungwatch.training.fitting.run import prepare_tensorflow
from lungwatch.training.networks.heads import (
    BOX,
    FEATURES,
    HIDDEN,
    LOGIT,
    attach_head,
    further_findings,
    gradcam,
    has_lung_view,
    head_layers,
    lay_back,
    output_of,
    two_logits,
)

_FORM = "GlobalAveragePooling2D, at most one Dense layer with relu, and a last Dense layer"
# Old enough for every onnxruntime that the package allows.
OPSET = 17
PROBABILITY_LIMIT = 1e-5
MAP_LIMIT = 1e-3
GRADIENT_LIMIT = 1e-4


def own_form(model: KerasModel, declared: Declaration, name: str) -> KerasModel:
    """Put a foreign network's feature map under lungwatch's head, with its own weights.

    Parameters
    ----------
    model, declared
        The network, and what its numbers mean.
    name
        What messages call it.

    Returns
    -------
    keras.Model
        From pixels, float32 (N, S, S, 1), 0..1, to the binary logit, (N, 1).

    Raises
    ------
    ModelError
        If it does not end in that form, or has more than two classes.
    """
    import keras

    pooling, hidden, last = _tail(model, name)
    weights, bias = (np.asarray(part, np.float64) for part in _weights(last))
    if declared.output == "softmax":
        if weights.shape[1] != 2:
            raise ModelError(
                f"{name} has {weights.shape[1]} classes: only networks of two can be exported"
            )
        other = 1 - declared.index
        weights = weights[:, [declared.index]] - weights[:, [other]]
        bias = bias[[declared.index]] - bias[[other]]
    if hidden is not None:
        head = [*_weights(hidden), weights, bias]
    else:
        head = [
            np.concatenate([weights, -weights], axis=1),
            np.concatenate([bias, -bias]),
            np.array([[1.0], [-1.0]]),
            np.zeros(1),
        ]
    size = int(model.inputs[0].shape[1])
    pixels = keras.Input((size, size, 1))
    wide = keras.layers.Concatenate()([pixels] * 3) if declared.channels == 3 else pixels
    scaled = keras.layers.Rescaling(list(declared.scale), list(declared.offset))(wide)
    inner = keras.Model(model.inputs, pooling.input)
    features = keras.layers.Activation("linear", name=FEATURES)(inner(scaled))
    logit = attach_head(features, dense_units=int(head[0].shape[1]), dropout=0.0)
    built = keras.Model(pixels, logit, name=model.name)
    for layer, parts in ((HIDDEN, head[:2]), (LOGIT, head[2:])):
        built.get_layer(layer).set_weights([np.asarray(part, np.float32) for part in parts])
    return built


def _tail(model: KerasModel, name: str) -> tuple[Any, Any | None, Any]:
    """Return the pooling, the hidden layer or None, and the last layer with weights."""
    layers = [layer for layer in _backwards(model) if type(layer).__name__ != "Dropout"]
    if type(layers[0]).__name__ in ("Activation", "Softmax") and len(layers) > 1:
        layers = layers[1:]  # the last layer's own activation, which the declaration is about
    kinds = [type(layer).__name__ for layer in layers]
    if kinds[:2] == ["Dense", "GlobalAveragePooling2D"]:
        pooling, hidden = layers[1], None
    elif kinds[:3] == ["Dense", "Dense", "GlobalAveragePooling2D"] and (
        layers[1].activation.__name__ == "relu"
    ):
        pooling, hidden = layers[2], layers[1]
    else:
        raise ModelError(
            f"{name} ends in {', '.join(reversed(kinds[:3]))}: only networks that end in {_FORM} "
            "can be exported with their maps"
        )
    if pooling.keepdims or pooling.data_format != "channels_last":
        raise ModelError(f"{name} pools in another form than {_FORM}")
    return pooling, hidden, layers[0]


def _backwards(model: KerasModel) -> list[Any]:
    """List the layers from the output to the first one that has not exactly one input."""
    layer, found = last_layer(model), []
    while True:
        found.append(layer)
        given = layer.input
        if isinstance(given, list | tuple | dict) or type(layer).__name__ == "InputLayer":
            return found
        layer = given._keras_history.operation  # noqa: SLF001 - Keras has no other name


def _weights(dense: Any) -> tuple[Any, Any]:  # noqa: ANN401 - a Keras layer
    kernel = np.asarray(dense.kernel)
    return kernel, np.asarray(dense.bias) if dense.use_bias else np.zeros(kernel.shape[1])


def build_graph(model: KerasModel) -> tuple[Callable[[Tensor], dict[str, Tensor]], list[Any]]:
    """Make the function that is exported.

    Parameters
    ----------
    model
        Keras model from pixels to the binary logit, with the head of
        `lungwatch.training.networks.heads`, and perhaps one for each further finding.

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
    boxes = [model.get_layer(BOX).output] if has_lung_view(model) else []
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


def to_onnx(model: KerasModel) -> OnnxProto:
    """Convert a Keras network, maps and all, with a dynamic batch size.

    Returns
    -------
    onnx.ModelProto
        Input `pixels`, outputs as in `lungwatch.contract`; without a contract yet.

    Raises
    ------
    ModelError
        If the network has another head, or the conversion lost an output.
    MissingExtraError
        If TensorFlow or tf2onnx is not installed.
    """
    prepare_tensorflow()
    try:
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError("exporting", "train") from error

    graph, signature = build_graph(model)
    # `from_keras` does not know Keras 3 (tensorflow-onnx #2329).
    proto, _ = tf2onnx.convert.from_function(graph, input_signature=signature, opset=OPSET)
    names = {output.name for output in proto.graph.output}
    wanted = {*OUTPUTS, CAM_PEAK}
    if further_findings(model):
        wanted |= {FINDINGS, FINDING_CAMS, FINDING_PEAKS}
    if names != wanted:
        raise ModelError(f"the conversion gave the outputs {sorted(names)}, not {sorted(wanted)}")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def with_contract(proto: OnnxProto, contract: ModelContract) -> bytes:
    """Put a contract into a graph's metadata, replacing any other; return the file's bytes."""
    kept = [entry for entry in proto.metadata_props if entry.key != METADATA_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract.to_json()
    data: bytes = proto.SerializeToString()
    return data


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest absolute differences over some images.

    Attributes
    ----------
    images
        How many were compared.
    kind
        Where they came from.
    probability
        ONNX against the Keras network, of every finding; at most 1e-5.
    cam
        ONNX maps, of every finding, against the same graph in TensorFlow; at most 1e-3.
    gradient
        The closed form against Grad-CAM by automatic differentiation; at most 1e-4.
    """

    images: int
    kind: str
    probability: float
    cam: float
    gradient: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def check(self) -> None:
        """Refuse a graph that differs.

        Raises
        ------
        ModelError
            If a difference is above its limit, or no number.
        """
        for what, found, limit in (
            ("probability", self.probability, PROBABILITY_LIMIT),
            ("map", self.cam, MAP_LIMIT),
            ("map against automatic differentiation", self.gradient, GRADIENT_LIMIT),
        ):
            if not found <= limit:  # a NaN must not pass
                raise ModelError(f"the exported graph differs: {what} by {found:.2e} > {limit:.0e}")


def run_onnx(data: bytes, pixels: FloatArray) -> dict[str, FloatArray]:
    """Run an ONNX file's bytes on (N, S, S, 1) and return its outputs by name."""
    session = onnx_session(data, "the exported graph")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT: pixels}), strict=True))


def compare(model: KerasModel, data: bytes, pixels: FloatArray, kind: str) -> Parity:
    """Compare a Keras network with its exported graph.

    Parameters
    ----------
    model
        The network that was exported.
    data
        The ONNX file's bytes.
    pixels
        Preprocessed images, (N, S, S, 1), 0..1.
    kind
        What the images are, for the record.
    """
    graph, _ = build_graph(model)
    found = run_onnx(data, pixels)
    closed = {name: value.numpy() for name, value in graph(pixels).items()}
    main = output_of(model)
    probabilities = [found[PROBABILITY] - sigmoid(predict_logits(main, pixels))]
    maps = [found[CAM] - closed[CAM]]
    gradients = [closed[CAM] - gradcam(main, pixels)]
    for index, name in enumerate(further_findings(model)):
        one = output_of(model, name)
        exported = sigmoid(found[FINDINGS][:, index])
        probabilities.append(exported - sigmoid(predict_logits(one, pixels)))
        maps.append(found[FINDING_CAMS][:, index] - closed[FINDING_CAMS][:, index])
        gradients.append(closed[FINDING_CAMS][:, index] - gradcam(one, pixels)[:, 1])
    return Parity(
        images=len(pixels),
        kind=kind,
        probability=_largest(*probabilities),
        cam=_largest(*maps),
        gradient=_largest(*gradients),
    )


def synthetic_images(spec: PreprocessSpec, count: int = 16) -> FloatArray:
    """Golden pictures, moved about, for parity where no real images are at hand."""
    batch = np.repeat(golden_input(spec)[np.newaxis], count, axis=0)
    return augment(batch, Augmentation(), np.random.default_rng(0))


def _largest(*differences: FloatArray | NDArray[np.float64]) -> float:
    # A NaN must stay one: Python's max would lose it.
    return float(np.max([np.abs(difference).max() for difference in differences]))

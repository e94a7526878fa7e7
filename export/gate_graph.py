"""The content gate as one ONNX graph: network, distance from the training images, scores."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import INPUT
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.export.to_onnx import OPSET
from lungwatch.gate import GATE_LUNGS, GATE_SCORES
from lungwatch.training.foreign import KerasModel, OnnxProto, OnnxSession, Tensor
from lungwatch.training.gate_checks import LEAST_LUNGS, Familiarity, GateLook, GateThresholds
from lungwatch.training.gate_network import CHANCES, EMBEDDING, answering_network
from lungwatch.training.pixels import FloatArray
from lungwatch.training.runtime import prepare_tensorflow

_AT_ONCE = 32


def gate_to_onnx(model: KerasModel) -> OnnxProto:
    """Convert a gate's network, without the scores that need fitting.

    Returns
    -------
    onnx.ModelProto
        From `pixels`, float32 (N, S, S, 1), 0..1, to `chances`, `embedding` and `lungs`, as
        `lungwatch.training.gate_network.answering_network` gives them.

    Raises
    ------
    ModelError
        If the conversion lost an output.
    MissingExtraError
        If TensorFlow or tf2onnx is not installed.
    """
    prepare_tensorflow()
    try:
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError("exporting", "train") from error

    answering = answering_network(model)
    size = int(model.input_shape[1])
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32, name=INPUT)]

    def graph(pixels: Tensor) -> dict[str, Tensor]:
        return dict(answering(pixels, training=False))

    # `from_keras` does not know Keras 3 (tensorflow-onnx #2329).
    proto, _ = tf2onnx.convert.from_function(
        tf.function(graph, input_signature=signature), input_signature=signature, opset=OPSET
    )
    names = {output.name for output in proto.graph.output}
    if names != {CHANCES, EMBEDDING, GATE_LUNGS}:
        raise ModelError(f"the conversion of the gate gave the outputs {sorted(names)}")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def look_with_onnx(session: OnnxSession, pixels: FloatArray) -> GateLook:
    """Ask such a graph about preprocessed pictures, (N, S, S, 1), 0..1."""
    names = [CHANCES, EMBEDDING, GATE_LUNGS]
    parts = np.array_split(pixels, max(1, -(-len(pixels) // _AT_ONCE)))
    found = [session.run(names, {INPUT: part}) for part in parts]
    chances, embedding, lungs = (np.concatenate(column) for column in zip(*found, strict=True))
    return GateLook(chances=chances, embedding=embedding, lungs=lungs)


def with_scores(
    proto: OnnxProto, familiarity: Familiarity, thresholds: GateThresholds
) -> OnnxProto:
    """Add the scores to a converted gate, and leave only what the gate's contract promises.

    Parameters
    ----------
    proto
        Of `gate_to_onnx`, quantised or not; left as it is.
    familiarity, thresholds
        What the distance and its score are made of.

    Returns
    -------
    onnx.ModelProto
        With the outputs `scores` and `lungs`; see `lungwatch.gate`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph

    def constant(name: str, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"gate_{name}"))
        return f"gate_{name}"

    def number(name: str, value: float) -> str:
        return constant(name, np.array(value, np.float32))

    def node(
        kind: str,
        name: str,
        *inputs: str,
        **attributes: Any,  # noqa: ANN401 - onnx's own
    ) -> str:
        output = f"gate_{name}"
        graph.node.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    centred = node("Sub", "centred", EMBEDDING, constant("mean", familiarity.mean))
    along = node("MatMul", "along", centred, constant("axes", familiarity.axes))
    distance = node(
        "ReduceSum",
        "distance",
        node("Mul", "squares", along, along),
        constant("columns", np.array([1], np.int64)),
        keepdims=1,
    )
    ratio = node("Div", "ratio", distance, number("furthest", thresholds.distance))
    square = node("Mul", "ratio_2", ratio, ratio)
    fourth = node("Mul", "ratio_4", square, square)
    familiar = node("Reciprocal", "familiar", node("Add", "ratio_4_1", fourth, number("one", 1.0)))

    is_lung = node("GreaterOrEqual", "is_lung", GATE_LUNGS, number("half", 0.5))
    cells = node("Cast", "cells", is_lung, to=TensorProto.FLOAT)
    area = node("ReduceMean", "area", cells, axes=[1, 2], keepdims=0)
    column = node(
        "Reshape", "area_column", area, constant("as_column", np.array([-1, 1], np.int64))
    )
    enough = node("Mul", "enough", column, number("per_area", 1.0 / (2 * LEAST_LUNGS)))
    lungs = node("Clip", "lungs_score", enough, number("least", 0.0), number("most", 1.0))

    graph.node.append(
        helper.make_node("Concat", [CHANCES, lungs, familiar], [GATE_SCORES], GATE_SCORES, axis=1)
    )
    kept = [output for output in graph.output if output.name == GATE_LUNGS]
    count = len(thresholds.checks())
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(GATE_SCORES, TensorProto.FLOAT, ["batch", count])
    )
    graph.output.extend(kept)
    onnx.checker.check_model(made)
    return made

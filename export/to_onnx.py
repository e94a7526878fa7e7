"""Convert the graph to ONNX and give it its contract."""

from lungwatch.contract import (
    CAM_PEAK,
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    METADATA_KEY,
    OUTPUTS,
    ModelContract,
)
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.export.graph import build_graph
from lungwatch.training.foreign import KerasModel, OnnxProto
from lungwatch.training.head import further_findings
from lungwatch.training.runtime import prepare_tensorflow

# Old enough for every onnxruntime that the package allows.
OPSET = 17


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

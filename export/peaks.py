"""Peaks of the maps: the graph's output `cam_peak`, and the scale that all maps are drawn on."""

from pathlib import Path

import numpy as np

from lungwatch.contract import CAM, CAM_PEAK
from lungwatch.errors import ModelError
from lungwatch.training.dataset import load_dataset
from lungwatch.training.foreign import OnnxProto
from lungwatch.training.label_map import LabelMap
from lungwatch.training.pixels import FloatArray, read_pixels
from lungwatch.training.scorers import OnnxScorer

REFERENCE_PERCENTILE = 95
"""Of the COVID map's peak over the validation images called COVID: drawn with the full colour.

The largest peak of all would make one odd image decide how all others look."""

_COVID = 1
_FLAT = "cam_peak_shape"


def add_peak_output(model: bytes) -> bytes:
    """Give an exported graph the output `cam_peak`, if it has none.

    The graph scales each map by its largest value; that value becomes an output, and nothing
    that was there is changed: no node, no weight, no other output, no metadata.

    Parameters
    ----------
    model
        An ONNX file's bytes, as `lungwatch export` wrote them before there was `cam_peak`.

    Returns
    -------
    bytes
        The file with `cam_peak`, float32 (N, 2): the largest value of each map before it was
        scaled to 0..1, NEGATIVE and COVID; `model` itself where it has that output already.

    Raises
    ------
    ModelError
        If `model` is no ONNX file, or its maps are not scaled as `lungwatch.export.graph` does.
    """
    import onnx
    from onnx import TensorProto, helper

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's own, whose module has no types
        raise ModelError("the model is no ONNX file") from error
    graph = proto.graph
    if CAM_PEAK in {output.name for output in graph.output}:
        return model
    peaks = _peaks(proto)
    shape = helper.make_tensor(_FLAT, TensorProto.INT64, [2], [-1, len(peaks)])
    graph.initializer.append(shape)
    graph.node.extend(
        [
            # (N, 1, 1) each, side by side.
            helper.make_node("Concat", peaks, ["cam_peak_both"], "cam_peak_both", axis=1),
            helper.make_node("Reshape", ["cam_peak_both", _FLAT], [CAM_PEAK], CAM_PEAK),
        ]
    )
    graph.output.append(
        helper.make_tensor_value_info(CAM_PEAK, TensorProto.FLOAT, ["batch", len(peaks)])
    )
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    return data


def _peaks(proto: OnnxProto) -> list[str]:
    """Names of the tensors (N, 1, 1) that hold each map's largest value, in the maps' order."""
    made_by = {name: node for node in proto.graph.node for name in node.output}

    def step(name: str, operation: str, which: int = 0) -> str:
        node = made_by.get(name)
        if node is None or node.op_type != operation or len(node.input) <= which:
            raise ModelError(
                "the graph does not scale its maps as lungwatch's export does: export it again"
            )
        return str(node.input[which])

    stack = made_by.get(CAM)
    if stack is None or stack.op_type != "Concat" or len(stack.input) != 2:
        raise ModelError("the graph's maps are not one for each of two classes: export it again")
    peaks = []
    for one in stack.input:
        quotient = step(one, "Unsqueeze")
        # map = raw / max(peak, tiny), and peak = the largest value of the same raw map.
        peak = step(step(quotient, "Div", 1), "Max")
        if step(peak, "ReduceMax") != step(quotient, "Div", 0):
            raise ModelError("the graph scales a map by another map's peak: export it again")
        peaks.append(peak)
    return peaks


def reference_of_data(
    scorer: OnnxScorer, data: Path, labels: LabelMap | None = None
) -> float | None:
    """Return `map_reference` of a data set's validation split; None if it has none.

    Raises
    ------
    DatasetError
        If an image cannot be read.
    """
    samples = [sample for sample in load_dataset(data, labels) if sample.split == "val"]
    if not samples:
        return None
    return map_reference(scorer, read_pixels(samples, scorer.judgement.preprocess))


def map_reference(scorer: OnnxScorer, pixels: FloatArray) -> float | None:
    """Return the evidence that is drawn with the full colour.

    Parameters
    ----------
    scorer
        A graph with `cam_peak`.
    pixels
        Preprocessed validation images, (N, S, S, 1), 0..1.

    Returns
    -------
    float or None
        The 95th percentile of the COVID map's peak over the images called COVID, in the units of
        `cam_peak`; None if none of them is, or their maps are all empty.
    """
    calibration, decision = scorer.judgement.calibration, scorer.judgement.decision
    labels = [decision.label(calibration.probability(float(z))) for z in scorer.logits(pixels)]
    called = [index for index, label in enumerate(labels) if label == "COVID"]
    if not called:
        return None
    peaks = scorer.peaks(pixels[called])[:, _COVID]
    found = float(np.percentile(peaks, REFERENCE_PERCENTILE))
    return found if found > 0 else None

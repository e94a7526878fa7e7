"""Static int8 quantisation of the convolutions of a float graph."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lungwatch.contract import INPUT
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.training.foreign import OnnxProto
from lungwatch.training.lung_box import FINDER
from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample

CalibrationReader: TypeAlias = Any

IMAGES = 300
# Clip and Relu are absorbed into the convolution before them, so that all 256 steps lie where
# the activation lets something pass. By the extremes, a ReLU6 network loses 0.016 ROC-AUC
# without them and 0.0005 with them. The head and its maps hold no convolution and stay float, as
# does what finds the lungs (see `_in_float`).
_QUANTISED = ("Conv", "Clip", "Relu")
# Chosen by the validation logits' mean difference from the float network's (EfficientNet-Lite0):
# 0.151, against 0.158 at 99.999 %, 0.157 by entropy and 0.163 by the extremes.
_PERCENTILE = 99.99
# Feature maps are kept for a whole stride: 20 images of 160 px take about 500 MB.
_STRIDE = 20


def spread(samples: Sequence[Sample], count: int = IMAGES) -> list[Sample]:
    """Take samples evenly from every source and finding, and evenly within each.

    A group too small for its share gives all it has, and the others share the rest.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.source, sample.finding), []).append(sample)
    chosen: list[Sample] = []
    for index, name in enumerate(sorted(groups, key=lambda name: (len(groups[name]), name))):
        share = (count - len(chosen)) // (len(groups) - index)
        group = groups[name]
        places = np.linspace(0, len(group) - 1, min(share, len(group))).astype(int)
        chosen += [group[place] for place in places]
    return chosen


def quantise(
    proto: OnnxProto,
    pixels: FloatArray,
    *,
    symbolic_shapes: bool = True,
    narrow_weights: bool = False,
) -> OnnxProto:
    """Quantise the convolutions to int8.

    QDQ format; weights int8, symmetric, one scale an output channel (depthwise convolutions
    need that); activations uint8, which x86 has the fastest kernels for.

    Parameters
    ----------
    proto
        The float graph; left as it is.
    pixels
        Preprocessed images, (N, S, S, 1), 0..1, that show the activations' usual range.
    symbolic_shapes
        Whether onnxruntime follows the batch dimension through the graph, which it cannot do
        where feature maps are enlarged.
    narrow_weights
        Weights of 7 bits: processors without VNNI, whose 16-bit sums overflow with 8, then answer
        as the others do.

    Returns
    -------
    onnx.ModelProto
        The same inputs and outputs.

    Raises
    ------
    ModelError
        If onnxruntime cannot quantise this graph.
    MissingExtraError
        If onnx or sympy is not installed.

    Source: Jacob et al. 2018, arXiv:1712.05877.
    """
    try:
        import onnx
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError("quantising", "train") from error

    whole = pixels[: len(pixels) // _STRIDE * _STRIDE or None]
    with tempfile.TemporaryDirectory(prefix="lungwatch-int8-") as place:
        plain, ready, done = (Path(place) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        onnx.save(proto, plain)
        try:
            # onnxruntime reports its progress on stdout, which is kept for results, and what it
            # fails at in files of the working directory.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(place):
                quant_pre_process(plain, ready, skip_symbolic_shape=not symbolic_shapes)
                quantize_static(
                    ready,
                    done,
                    _reader(whole),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(_QUANTISED),
                    nodes_to_exclude=_in_float(onnx.load(ready)),
                    per_channel=True,
                    reduce_range=narrow_weights,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod.Percentile,
                    extra_options={
                        "WeightSymmetric": True,
                        "CalibPercentile": _PERCENTILE,
                        "CalibStridedMinMax": min(_STRIDE, len(whole)),
                    },
                )
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ModelError(f"onnxruntime cannot quantise this graph: {error}") from error
        return onnx.load(done)


def describe_quantisation(
    images: Sequence[Sample], *, narrow_weights: bool = False
) -> dict[str, Any]:
    """Say how `quantise` does it, and on what, for the contract's provenance."""
    import onnxruntime

    counts: dict[str, int] = {}
    for sample in images:
        name = f"{sample.source or 'unknown'}/{sample.finding}"
        counts[name] = counts.get(name, 0) + 1
    return {
        "format": "QDQ",
        "operators": list(_QUANTISED),
        "weights": f"int{7 if narrow_weights else 8}, symmetric, per channel",
        "activations": "uint8",
        "calibration": f"percentile {_PERCENTILE:g}",
        "images": dict(sorted(counts.items())),
        "onnxruntime": onnxruntime.__version__,
    }


def _in_float(proto: OnnxProto) -> list[str]:
    """Name the nodes that find the lungs: cheap, and a box that is off moves all that is seen."""
    return [
        node.name
        for node in proto.graph.node
        if any(f"/{FINDER}" in name for name in (*node.input, *node.output))
    ]


def _reader(pixels: FloatArray) -> CalibrationReader:
    from onnxruntime.quantization import CalibrationDataReader

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """One image at a time, by stretches that the calibrator asks for."""

        def __init__(self) -> None:
            self.set_range(0, len(pixels))

        def __len__(self) -> int:
            return len(pixels)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(range(start_index, end_index))

        def get_next(self) -> dict[str, FloatArray] | None:
            index = next(self._left, None)
            return None if index is None else {INPUT: pixels[index : index + 1]}

    return Images()

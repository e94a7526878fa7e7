"""A model bundle with a content gate small enough to write down: it looks at the mean grey value.

Needs `onnx`, which the tests of the base install lack: import it inside a test or fixture that
has asked for it with `pytest.importorskip`.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from lungwatch.contract import (
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    METADATA_KEY,
    Calibration,
    Decision,
    Finding,
    GateCheck,
    GateContract,
    ModelContract,
)
from lungwatch.errors import Reason
from lungwatch.preprocess import PreprocessSpec, golden_input

SPEC = PreprocessSpec(size_px=64, intensity="as_is", fit="pad")
CELLS = 16


def gate_graph(*, outputs: tuple[str, str] = ("scores", "lungs"), columns: int = 2) -> bytes:
    """Build the gate: `scores` are mean grey value and 1 less that, `lungs` what is dark.

    Parameters
    ----------
    outputs
        Names of the two outputs.
    columns
        Scores a picture, 1 or 2.
    """
    side, cell = SPEC.size_px, SPEC.size_px // CELLS
    constants = {
        "one": np.float32(1),
        "axes": np.array([1, 2, 3], np.int64),
        "column": np.array([-1, 1], np.int64),
        "field": np.array([-1, CELLS, CELLS], np.int64),
    }
    make = helper.make_node
    nodes = [
        make("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        make("Reshape", ["mean", "column"], ["bright"]),
        make("Sub", ["one", "bright"], ["dark"]),
        make("Concat", ["bright", "dark"][:columns], [outputs[0]], axis=1),
        make("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        make("AveragePool", ["planes"], ["cells"], kernel_shape=[cell] * 2, strides=[cell] * 2),
        make("Sub", ["one", "cells"], ["air"]),
        make("Reshape", ["air", "field"], [outputs[1]]),
    ]

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "gate",
        [value("pixels", ["n", side, side, 1])],
        [value(outputs[0], ["n", columns]), value(outputs[1], ["n", CELLS, CELLS])],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def gate_contract(data: bytes) -> GateContract:
    """Describe the gate: what is dark is no chest, what is bright is inverted."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    scores, lungs = session.run(None, {"pixels": golden_input(SPEC)[np.newaxis]})
    return GateContract(
        preprocess=SPEC,
        checks=(
            GateCheck(name="frontal", threshold=0.2, reason=Reason.NOT_FRONTAL_CHEST),
            GateCheck(name="positive", threshold=0.2, reason=Reason.INVERTED),
        ),
        lungs_side_px=CELLS,
        lung_area=(0.1, 0.9),
        golden_scores=tuple(float(score) for score in scores[0]),
        golden_lung_area=float((lungs[0] >= 0.5).mean()),
    )


def gated_bundle(plain: Path, folder: Path) -> Path:
    """Copy a bundle to `folder/gated-1.0.0`, with the gate beside its model."""
    target = Path(shutil.copytree(plain, folder / "gated-1.0.0"))
    model = onnx.load_model_from_string((target / "model.onnx").read_bytes())
    (told,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    gate = gate_graph()
    contract = replace(
        ModelContract.from_json(told.value), name="gated", version="1.0.0", gate=gate_contract(gate)
    )
    told.value = contract.to_json()
    (target / "card.md").unlink()
    write(target, {"model.onnx": model.SerializeToString(), "gate.onnx": gate})
    return target


def gateless_bundle(plain: Path, folder: Path) -> Path:
    """Copy a bundle to `folder/gateless-1.0.0`, without its gate."""
    target = Path(shutil.copytree(plain, folder / "gateless-1.0.0"))
    model = onnx.load_model_from_string((target / "model.onnx").read_bytes())
    (told,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    contract = ModelContract.from_json(told.value)
    told.value = replace(contract, name="gateless", version="1.0.0", gate=None).to_json()
    for name in ("card.md", "gate.onnx"):
        (target / name).unlink(missing_ok=True)
    write(target, {"model.onnx": model.SerializeToString()}, name="gateless")
    return target


def opacity_bundle(plain: Path, folder: Path, *, logit: float, maps: bool = True) -> Path:
    """Copy a bundle to `folder/two-1.0.0`, with an opacity that has one logit for all images.

    COVID is as good as never found, so that the answer is NEGATIVE.

    Parameters
    ----------
    logit
        Of the opacity, before its calibration (slope 2, intercept 1; threshold 0.5).
    maps
        Whether the graph has the opacity's map, which is that for COVID, and its peak.
    """
    target = Path(shutil.copytree(plain, folder / "two-1.0.0"))
    model = onnx.load_model_from_string((target / "model.onnx").read_bytes())
    graph, make = model.graph, helper.make_node
    side = next(o for o in graph.output if o.name == "cam").type.tensor_type.shape.dim[-1].dim_value
    constants = {
        "opacity_none": np.float32([[0, 0]]),
        "opacity_sum": np.float32([[1], [1]]),
        "opacity_logit": np.float32([[logit]]),
        "opacity_second": np.array([1], np.int64),
    }
    nodes = [
        make("Mul", ["logits", "opacity_none"], ["opacity_zeros"]),
        make("MatMul", ["opacity_zeros", "opacity_sum"], ["opacity_zero"]),
        make("Add", ["opacity_zero", "opacity_logit"], [FINDINGS]),
    ]
    shapes = {FINDINGS: ["batch", 1]}
    if maps:
        nodes.append(make("Gather", ["cam", "opacity_second"], [FINDING_CAMS], axis=1))
        nodes.append(make("Gather", ["cam_peak", "opacity_second"], [FINDING_PEAKS], axis=1))
        shapes |= {FINDING_CAMS: ["batch", 1, side, side], FINDING_PEAKS: ["batch", 1]}
    graph.node.extend(nodes)
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for name, shape in shapes.items():
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    (told,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    contract = ModelContract.from_json(told.value)
    opacity = Finding(
        name="opacity",
        calibration=Calibration(slope=2.0, intercept=1.0),
        threshold=0.5,
        map_reference=1e-6 if maps else None,
    )
    told.value = replace(
        contract,
        name="two",
        version="1.0.0",
        decision=Decision(threshold=0.999999, uncertain_low=0.999999, uncertain_high=0.999999),
        findings=(opacity,),
        golden=replace(contract.golden, findings=(Calibration().probability(logit),)),
    ).to_json()
    (target / "card.md").unlink()
    write(target, {"model.onnx": model.SerializeToString()}, name="two")
    return target


def write(bundle: Path, files: dict[str, bytes], *, name: str = "gated") -> None:
    """Put files into a bundle, and their digests into its list."""
    for file, data in files.items():
        (bundle / file).write_bytes(data)
    listed = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*bundle.glob("*.onnx"), *bundle.glob("drift.json"))
    }
    about = {"name": name, "version": "1.0.0", "sha256": listed}
    (bundle / "bundle.json").write_text(json.dumps(about))

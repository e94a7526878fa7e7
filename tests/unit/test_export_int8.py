"""Quantising touches the convolutions alone, and what it costs is measured and limited."""

import cv2
import numpy as np
import pytest

from lungwatch.contract import INPUT, OUTPUTS, Calibration, Decision
from lungwatch.errors import DatasetError, ModelError
from lungwatch.export import quantise
from lungwatch.export.exporter import ExportRequest
from lungwatch.export.quantise import make_int8
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.data.dataset import load_dataset, select
from lungwatch.training.data.pixels import read_pixels, targets
from lungwatch.training.evaluation.calibration import fit_calibration
from lungwatch.training.evaluation.scorers import Judgement, onnx_session

onnx = pytest.importorskip("onnx", reason="needs onnx (extra 'train')")
pytest.importorskip("sympy", reason="needs sympy (extra 'train')")

SIZE = 16
EVEN = Decision(threshold=0.5, uncertain_low=0.5, uncertain_high=0.5)
JUDGEMENT = Judgement(
    name="toy",
    preprocess=PreprocessSpec(size_px=SIZE, intensity="as_is"),
    calibration=Calibration(),
    decision=EVEN,
)


def brightness_graph():
    """A network whose logit grows with brightness: Conv, Clip, depthwise Conv, Relu, head."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def constant(name, values, dtype=np.float32):
        return numpy_helper.from_array(np.asarray(values, dtype), name)

    constants = [
        constant("w1", rng.random((4, 1, 3, 3)) / 9),
        constant("b1", np.zeros(4)),
        constant("w2", rng.random((4, 1, 3, 3)) * np.array([0.01, 0.1, 1, 5]).reshape(4, 1, 1, 1)),
        constant("b2", np.zeros(4)),
        constant("low", 0),
        constant("high", 6),
        constant("w3", rng.random((4, 1)) * 4),
        constant("b3", [-6]),
        constant("half", [[-0.5, 0.5]]),
        constant("first", [1], np.int64),
        constant("flat", [-1], np.int64),
    ]
    make = helper.make_node
    nodes = [
        make("Transpose", [INPUT], ["nchw"], perm=[0, 3, 1, 2]),
        make("Conv", ["nchw", "w1", "b1"], ["c1"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Clip", ["c1", "low", "high"], ["a1"], name="clip"),
        make("Conv", ["a1", "w2", "b2"], ["c2"], name="depthwise", pads=[1, 1, 1, 1], group=4),
        make("Relu", ["c2"], ["a2"], name="relu"),
        make("GlobalAveragePool", ["a2"], ["pooled"], name="pool"),
        make("Flatten", ["pooled"], ["embedding"], name="flatten"),
        make("Gemm", ["embedding", "w3", "b3"], ["z"], name="head"),
        make("Mul", ["z", "half"], ["logits"], name="two"),
        make("Sigmoid", ["z"], ["p"], name="sigmoid"),
        make("Reshape", ["p", "flat"], ["probability"], name="shape"),
        make("ReduceMean", ["a2"], ["map"], name="mean", axes=[1], keepdims=1),
        make("Concat", ["map", "map"], ["cam"], name="both", axis=1),
    ]
    shapes = {"probability": ["n"], "logits": ["n", 2], "embedding": ["n", 4]}
    shapes["cam"] = ["n", 2, SIZE // 2, SIZE // 2]

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "brightness",
        [value(INPUT, ["n", SIZE, SIZE, 1])],
        [value(name, shapes[name]) for name in OUTPUTS],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(3)
    for split, count in (("train", 12), ("val", 8), ("test", 8)):
        for finding, level in (("COVID", 170), ("NORMAL", 80)):
            place = folder / split / finding
            place.mkdir(parents=True)
            for index in range(count):
                image = rng.normal(level + rng.normal(0, 8), 20, (64, 64))
                image = np.clip(image, 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(place / f"{index:03d}.png"), image)
    return folder


@pytest.fixture(scope="module")
def made(data):
    return make_int8(brightness_graph(), JUDGEMENT, data)


def test_all_convolutions_and_nothing_of_the_head_are_quantised(made):
    nodes = made.proto.graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    assert made.about["convolutions"] == 2
    for node in nodes:
        if node.op_type == "Conv":
            assert {made_by[name] for name in node.input[:2]} == {"DequantizeLinear"}
        if node.op_type == "Gemm":
            assert not {"DequantizeLinear"} & {made_by.get(name) for name in node.input}


def test_activations_are_absorbed_into_their_convolutions(made):
    assert not {"Clip", "Relu"} & {node.op_type for node in made.proto.graph.node}


def test_each_channel_of_a_depthwise_convolution_has_its_own_scale(made):
    scales = [
        onnx.numpy_helper.to_array(item)
        for item in made.proto.graph.initializer
        if item.name == "w2_scale"
    ]
    assert len(scales) == 1
    assert scales[0].shape == (4,)
    assert scales[0].max() > 100 * scales[0].min()


def test_what_it_costs_is_measured_on_validation_and_test(made, data):
    assert list(made.fidelity) == [f"{data.name}/val", f"{data.name}/test"]
    for found in made.fidelity.values():
        assert found.images == 16
        assert found.roc_auc_float == 1.0
        assert found.loss == 0.0
        assert found.map_cosine == pytest.approx(1, abs=1e-3)
    assert made.about["images"] == {"unknown/COVID": 12, "unknown/NORMAL": 12}


def test_calibration_is_fitted_to_the_int8_graphs_own_logits(made, data):
    samples = select(load_dataset(data), "val")
    pixels = read_pixels(samples, JUDGEMENT.preprocess)
    session = onnx_session(made.proto.SerializeToString(), "int8")
    logits = session.run(["logits"], {INPUT: pixels})[0]
    fitted = fit_calibration(targets(samples), logits[:, 1] - logits[:, 0])
    assert made.judgement.calibration.slope == pytest.approx(fitted.slope, rel=1e-3)
    assert made.judgement.decision != EVEN


def test_the_answer_does_not_depend_on_the_batch(made):
    session = onnx_session(made.proto.SerializeToString(), "int8")
    images = np.random.default_rng(1).random((7, SIZE, SIZE, 1), dtype=np.float32)
    together = session.run(["logits"], {INPUT: images})[0]
    alone = [session.run(["logits"], {INPUT: image[np.newaxis]})[0][0] for image in images]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-3)


def test_a_loss_at_the_limit_is_refused(data, monkeypatch):
    monkeypatch.setattr(quantise, "LOSS_LIMIT", 0.0)
    with pytest.raises(ModelError, match="ROC-AUC on validation, the limit is"):
        make_int8(brightness_graph(), JUDGEMENT, data)


def test_it_needs_the_training_and_the_validation_split(data, tmp_path):
    with pytest.raises(DatasetError, match="needs the data set of the training"):
        ExportRequest(model=tmp_path, name="a", version="1.0.0", folder=tmp_path, int8=True)
    with pytest.raises(DatasetError, match="'train' is empty"):
        make_int8(brightness_graph(), JUDGEMENT, data / "val")

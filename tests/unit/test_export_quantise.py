"""Calibration images come evenly from every source and finding; graphs are quantised in place."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lungwatch.export.quantise import quantise, spread
from lungwatch.training.data.dataset import Sample


def samples(**groups):
    return [
        Sample(path=Path(f"{name}-{index}.png"), finding="COVID", source=name)
        for name, count in groups.items()
        for index in range(count)
    ]


@pytest.mark.parametrize(
    ("groups", "count", "taken"),
    [
        ({"a": 100, "b": 100}, 30, {"a": 15, "b": 15}),
        ({"large": 500, "tiny": 2, "middle": 40}, 60, {"tiny": 2, "middle": 29, "large": 29}),
        ({"a": 3, "b": 4}, 300, {"a": 3, "b": 4}),
    ],
)
def test_small_groups_give_all_and_the_others_share_the_rest(groups, count, taken):
    chosen = spread(samples(**groups), count)
    assert Counter(s.source for s in chosen) == taken
    assert len({s.path for s in chosen}) == len(chosen)


def test_within_a_group_they_are_spread_and_always_the_same():
    chosen = [s.path.name for s in spread(samples(a=101), 3)]
    assert chosen == ["a-0.png", "a-50.png", "a-100.png"]
    assert chosen == [s.path.name for s in spread(samples(a=101), 3)]


def enlarging_graph():
    """A convolution on a feature map that is enlarged, as tf2onnx writes it."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["pixels", "planes"], ["plane"], "reshape"),
        helper.make_node("Resize", ["plane", "roi", "scales"], ["wide"], "resize", mode="linear"),
        helper.make_node("Conv", ["wide", "weights"], ["answer"], "conv"),
    ]
    constants = {
        "planes": np.array([-1, 1, 16, 16], np.int64),
        "roi": np.zeros(8, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "weights": weights,
    }
    graph = helper.make_graph(
        nodes,
        "enlarging",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 16, 16, 1])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", 2, 30, 30])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("narrow", [False, True])
def test_an_enlarged_feature_map_is_quantised_and_narrow_weights_have_seven_bits(
    narrow, tmp_path, monkeypatch
):
    """Whatever onnxruntime leaves behind stays out of the working directory."""
    from onnx import numpy_helper

    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(1).random((20, 16, 16, 1), dtype=np.float32)
    made = quantise(enlarging_graph(), pixels, symbolic_shapes=False, narrow_weights=narrow)
    assert list(tmp_path.iterdir()) == []
    (weights,) = [
        numpy_helper.to_array(one)
        for one in made.graph.initializer
        if one.name == "weights_quantized"
    ]
    assert weights.dtype == np.int8
    assert np.abs(weights.astype(int)).max() == (64 if narrow else 127)

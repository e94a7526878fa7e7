"""Shuffled weights change what a network answers and shows, and only as deep as was asked for."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from lungwatch.errors import ModelError
from lungwatch.preprocess import golden_input
from lungwatch.training.evaluation.maps import shuffled, shuffled_onnx
from lungwatch.training.evaluation.scorers import OnnxScorer, embed

onnx = pytest.importorskip("onnx")
BASELINE = max(Path(str(resources.files("lungwatch.models"))).glob("baseline-*"))


@pytest.fixture(scope="module")
def scorer():
    return OnnxScorer((BASELINE / "model.onnx").read_bytes())


@pytest.fixture(scope="module")
def pixels(scorer):
    return golden_input(scorer.judgement.preprocess)[np.newaxis]


def test_the_head_alone_leaves_the_embedding_as_it_is_and_changes_the_answer(scorer, pixels):
    other = OnnxScorer(shuffled_onnx(scorer.data, "head", 1))
    assert np.array_equal(embed(scorer, pixels), embed(other, pixels))
    assert embed(scorer, pixels).shape == (1, scorer.contract.embedding_size)
    assert not np.allclose(scorer.logits(pixels), other.logits(pixels), atol=1e-3)


@pytest.mark.parametrize("depth", ["half", "all"])
def test_deeper_ones_change_the_embedding_too(scorer, pixels, depth):
    other = OnnxScorer(shuffled_onnx(scorer.data, depth, 1))
    assert not np.allclose(embed(scorer, pixels), embed(other, pixels), atol=1e-3)


def test_a_seed_gives_the_same_network_and_another_seed_another(scorer):
    first = shuffled_onnx(scorer.data, "head", 1)
    assert first == shuffled_onnx(scorer.data, "head", 1)
    assert first != shuffled_onnx(scorer.data, "head", 2)


def weights_of(data):
    model = onnx.load_model_from_string(data)
    return {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}


def test_arrays_keep_their_values_and_copies_of_one_another_stay_copies(scorer):
    """The head's first layer stands in the graph twice: for the answer, and turned for the map."""
    before, after = (weights_of(d) for d in (scorer.data, shuffled_onnx(scorer.data, "head", 1)))
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed
    for name in changed:
        assert np.array_equal(np.sort(before[name].ravel()), np.sort(after[name].ravel()))
    twice = [
        (one, other)
        for one in changed
        for other in changed
        if one < other and np.array_equal(before[one].T.ravel(), before[other].ravel())
    ]
    assert twice
    for one, other in twice:
        assert np.array_equal(after[one].T.ravel(), after[other].ravel())


def test_a_model_of_another_kind_is_refused(scorer):
    class Other:
        judgement = scorer.judgement

    with pytest.raises(ModelError, match="cannot be shuffled"):
        shuffled(Other(), "head", 1)

"""Maps of a network whose weights were shuffled: a map that does not change explains nothing.

Source: Adebayo et al. 2018, Sanity Checks for Saliency Maps. Weights are shuffled within each
array instead of drawn anew, so that quantised arrays keep their type and their distribution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import EMBEDDING
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.training.bootstrap import Bootstrap, interval
from lungwatch.training.foreign import OnnxProto
from lungwatch.training.head import HIDDEN, LOGIT
from lungwatch.training.map_likeness import correlation, similarity
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import KerasScorer, OnnxScorer, Scorer

DEPTHS = ("head", "half", "all")
"""What is shuffled: the layers after the embedding; half of the layers, from the answer on; all."""
_SEEDS = 3
_BATCH = 64
_FEWEST_WEIGHTS = 8
_LAYERS = ("Conv", "Gemm", "MatMul", "Mul")


def compare_randomised(
    scorer: Scorer, pixels: FloatArray, maps: FloatArray, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Compare a model's maps with those of its network after its weights were shuffled.

    Parameters
    ----------
    scorer
        An exported graph or a run's network.
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.
    maps
        The model's own for COVID, float32, shape (N, h, w).
    bootstrap
        Resamples the images; its seed shuffles the weights, three times.

    Returns
    -------
    dict
        For each of `DEPTHS`, see `compare_maps`.

    Raises
    ------
    ModelError
        If it is another kind of model, or has no weights that can be found.
    MissingExtraError
        If `onnx`, or for a run TensorFlow, is not installed.
    """
    found = {}
    for depth in DEPTHS:
        others = [
            _maps(shuffled(scorer, depth, bootstrap.seed + number), pixels)
            for number in range(_SEEDS)
        ]
        found[depth] = compare_maps(maps, others, bootstrap)
    return found


def compare_maps(
    maps: FloatArray, others: Sequence[FloatArray], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Say how alike a model's maps are to another network's, or several others', image by image.

    Returns
    -------
    dict
        `images` that were compared (a map that is empty in either is left out), mean
        `correlation` and mean `similarity` (SSIM), None without such images, and `intervals`.
    """
    alike = np.full((2, len(others), len(maps)), np.nan)
    for number, other in enumerate(others):
        for index, (mine, its) in enumerate(zip(maps, other, strict=True)):
            if mine.any() and its.any():
                alike[0, number, index] = correlation(mine, its)
                alike[1, number, index] = similarity(mine, its)
    known = ~np.isnan(alike).all(axis=(0, 1))
    result: dict[str, Any] = {"images": int(known.sum()), "intervals": {}}
    draws = np.random.default_rng(bootstrap.seed).integers(
        0, max(1, int(known.sum())), (bootstrap.resamples, int(known.sum()))
    )
    for name, table in zip(("correlation", "similarity"), alike, strict=True):
        result[name] = None
        if known.any():
            each = np.nanmean(table[:, known], axis=0)
            result[name] = round(float(np.nanmean(each)), 6)
            if bootstrap.resamples:
                result["intervals"][name] = interval(np.nanmean(each[draws], axis=1))
    return result


def shuffled(scorer: Scorer, depth: str, seed: int) -> Callable[[FloatArray], FloatArray]:
    """Return what gives the maps, (N, 2, h, w), of the network with its weights shuffled."""
    if isinstance(scorer, OnnxScorer):
        data = shuffled_onnx(scorer.data, depth, seed)
        return OnnxScorer(data, f"{scorer.judgement.name}, shuffled").maps
    if isinstance(scorer, KerasScorer):
        return _shuffled_keras(scorer, depth, seed)
    raise ModelError(f"{scorer.judgement.name}: weights of such a model cannot be shuffled")


def shuffled_onnx(data: bytes, depth: str, seed: int) -> bytes:
    """Shuffle weights of an exported graph.

    Weights that stand in the graph twice (the head's, for the answer and, transposed, for the
    map) are shuffled alike, so that the map still explains the network's own answer.

    Raises
    ------
    ModelError
        If no weights are found at this depth.
    MissingExtraError
        If `onnx` is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("shuffling a graph's weights", "train") from error
    model = onnx.load_model_from_string(data)
    layers = _weights(model)
    if depth == "head":
        embedded = _place(model, EMBEDDING)
        layers = [layer for layer in layers if layer[0] > embedded]
    elif depth == "half":
        layers = layers[len(layers) // 2 :]
    if not layers:
        raise ModelError(f"the graph has no weights to shuffle ({depth})")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    rng = np.random.default_rng(seed)
    done: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for name in dict.fromkeys(name for _, name in layers):
        values = onnx.numpy_helper.to_array(tensors[name])
        new = _copy_of_known(values, done)
        if new is None:
            new = rng.permutation(values.ravel()).reshape(values.shape)
            done.append((values, new))
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(new), name))
    return bytes(model.SerializeToString())


def _weights(model: OnnxProto) -> list[tuple[int, str]]:
    """List the weights of convolutions and products: place of the layer, name; in its order."""
    graph = model.graph
    sizes = {
        tensor.name: (len(tensor.dims), int(np.prod(tensor.dims))) for tensor in graph.initializer
    }
    # A quantised weight reaches its layer through a node of its own.
    behind = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"
    }
    found = []
    for place, node in enumerate(graph.node):
        if node.op_type not in _LAYERS:
            continue
        for given in node.input:
            name = behind.get(given, given)
            dims, size = sizes.get(name, (0, 0))
            if dims >= 2 and size >= _FEWEST_WEIGHTS:
                found.append((place, name))
    return found


def _place(model: OnnxProto, output: str) -> int:
    for place, node in enumerate(model.graph.node):
        if output in node.output:
            return place
    raise ModelError(f"the graph has no output {output!r}")


def _copy_of_known(
    values: NDArray[Any], done: Sequence[tuple[NDArray[Any], NDArray[Any]]]
) -> NDArray[Any] | None:
    for before, after in done:
        if before.size != values.size or before.dtype != values.dtype:
            continue
        if np.array_equal(before.ravel(), values.ravel()):
            return np.asarray(after.reshape(values.shape))
        if np.array_equal(before.T.ravel(), values.ravel()):
            return np.asarray(after.T.reshape(values.shape))
    return None


def _shuffled_keras(
    scorer: KerasScorer, depth: str, seed: int
) -> Callable[[FloatArray], FloatArray]:
    import keras

    from lungwatch.training.gradcam import gradcam

    model = keras.models.clone_model(scorer.model)
    model.set_weights(scorer.model.get_weights())
    layers = [layer for layer in _flat(model) if layer.get_weights()]
    if depth == "head":
        layers = [layer for layer in layers if layer.name in (HIDDEN, LOGIT)]
    elif depth == "half":
        layers = layers[len(layers) // 2 :]
    if not layers:
        raise ModelError(f"{scorer.judgement.name} has no weights to shuffle ({depth})")
    rng = np.random.default_rng(seed)
    for layer in layers:
        layer.set_weights(
            [
                rng.permutation(one.ravel()).reshape(one.shape) if one.ndim > 1 else one
                for one in layer.get_weights()
            ]
        )
    return lambda pixels: gradcam(model, pixels)


def _flat(model: Any) -> list[Any]:  # noqa: ANN401 - Keras carries no types
    found = []
    for layer in model.layers:
        found.extend(_flat(layer) if hasattr(layer, "layers") else [layer])
    return found


def _maps(maps_of: Callable[[FloatArray], FloatArray], pixels: FloatArray) -> FloatArray:
    parts = [
        maps_of(pixels[start : start + _BATCH])[:, 1] for start in range(0, len(pixels), _BATCH)
    ]
    return np.concatenate(parts)

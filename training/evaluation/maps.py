"""Tests of explanation maps: agreement with drawings, likeness, and shuffled weights.

A number alone says little: opacities cover a third of the lungs, so a map that points anywhere
in the lungs hits one in a third of the images. Each figure therefore stands beside the same
figure for a random point of the lungs and for the map of another patient.

A map that does not change when the weights are shuffled explains nothing (Adebayo et al. 2018,
Sanity Checks for Saliency Maps). Weights are shuffled within each array instead of drawn from a
distribution, so that quantised arrays keep their type and their distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch.contract import EMBEDDING
from lungwatch.errors import ConfigError, MissingExtraError, ModelError
from lungwatch.preprocess import PreprocessSpec, content_of, enlarged, share_inside
from lungwatch.training.data.pixels import (
    FloatArray,
    LesionImage,
    OnnxProto,
    in_batches,
    read_lesions,
    read_lung_masks,
)
from lungwatch.training.evaluation.metrics import Bootstrap, interval, mean_interval
from lungwatch.training.evaluation.scorers import KerasScorer, OnnxScorer, Scorer
from lungwatch.training.networks.heads import HIDDEN, LOGIT

_SIDE_PX = 64
# Window and constants of Wang et al. 2004, for values of 0..1.
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
# Each image is compared with so many other patients' maps, for a mean that chance moves little.
_PARTNERS = 5
_Vector = NDArray[np.float64]
DEPTHS = ("head", "half", "all")
"""What is shuffled: the layers after the embedding; half of the layers, from the answer on; all."""
_SEEDS = 3
_FEWEST_WEIGHTS = 8
_LAYERS = ("Conv", "Gemm", "MatMul", "Mul")


def correlations(maps: FloatArray) -> NDArray[np.float64]:
    """Return Pearson's correlation of every map with every other, cell by cell.

    Parameters
    ----------
    maps
        float32, shape (N, h, w).

    Returns
    -------
    numpy.ndarray
        float64, shape (N, N); NaN where a map is the same everywhere.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat - flat.mean(axis=1, keepdims=True)
    size = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = np.divide(flat, size, out=np.full_like(flat, np.nan), where=size > 0)
    return np.asarray(flat @ flat.T)


def mean_likeness(
    table: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the mean correlation over pairs of different images, for each resample.

    Parameters
    ----------
    table
        float64, shape (N, N), without NaN: see `correlations`.
    weights
        How often each image occurs in each resample, float64, shape (B, N); None for once each.

    Returns
    -------
    numpy.ndarray
        float64, shape (B,); NaN where a resample holds one image only. A pair of an image with
        itself, drawn twice, counts for nothing.
    """
    drawn = np.ones((1, len(table))) if weights is None else weights
    between = np.einsum("bi,ij,bj->b", drawn, table, drawn, optimize=True)
    between -= (drawn**2) @ np.diag(table)
    pairs = drawn.sum(axis=1) ** 2 - (drawn**2).sum(axis=1)
    found = np.full(len(drawn), np.nan)
    np.divide(between, pairs, out=found, where=pairs > 0)
    return found


def correlation(first: FloatArray, second: FloatArray) -> float:
    """Return Pearson's correlation of two maps of one shape; NaN if one is even."""
    return float(correlations(np.stack([first, second]))[0, 1])


def similarity(first: FloatArray, second: FloatArray) -> float:
    """Return the mean structural similarity of two maps, 0..1 each, enlarged to 64 x 64.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, with a Gaussian window of sigma 1.5.
    """
    x, y = _enlarged(first), _enlarged(second)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    likeness = ((2 * mean_x * mean_y + _C1) * (2 * both + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    )
    return float(likeness.mean())


def _enlarged(small: FloatArray) -> NDArray[np.float64]:
    side = (_SIDE_PX, _SIDE_PX)
    return np.asarray(cv2.resize(small, side, interpolation=cv2.INTER_LINEAR), np.float64)


def _blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(cv2.GaussianBlur(image, (11, 11), _SIGMA), np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class LungShare:
    """Share of each map that lies inside the lungs.

    Attributes
    ----------
    share
        Of the map's sum, 0..1, float64, shape (N,); NaN where the map is empty.
    hit
        1 where the map's strongest point lies inside, 0 where not, NaN as above.
    area
        Share of the image that is lung, 0..1: what a map without any aim would reach.
    """

    share: NDArray[np.float64]
    hit: NDArray[np.float64]
    area: NDArray[np.float64]


def lung_share(maps: FloatArray, masks: FloatArray) -> LungShare:
    """Measure maps against drawn lungs.

    Parameters
    ----------
    maps
        For COVID, float32, shape (N, h, w), at least 0, over the network's whole input.
    masks
        float32, shape (N, S, S), 0..1: the share of each pixel that is lung.

    Source: the pointing game of Zhang et al. 2018, doi:10.1007/s11263-017-1059-x, without its
    tolerance of 15 pixels.
    """
    share, hit = np.full((2, len(maps)), np.nan)
    for index, (small, mask) in enumerate(zip(maps, masks, strict=True)):
        inside = share_inside(small, mask)
        if inside is not None:
            share[index] = inside
            strongest = int(np.argmax(enlarged(small, (mask.shape[0], mask.shape[1]))))
            hit[index] = float(mask.flat[strongest] >= 0.5)
    return LungShare(share=share, hit=hit, area=masks.mean(axis=(1, 2), dtype=np.float64))


def measure_lungs(scorer: Scorer, folder: Path, bootstrap: Bootstrap) -> dict[str, Any]:
    """Explain all images that have drawn lungs, and sum up where the maps lie.

    Returns
    -------
    dict
        `images`, `without_map` (the map for COVID is empty; left out), the means `map_in_lungs`,
        `strongest_point_in_lungs` and `lung_area` (None without any map), and their 95 %
        `intervals` over resampled images.

    Raises
    ------
    ConfigError
        If the model keeps the aspect ratio: masks are stretched.
    DatasetError
        If there are no pairs, or one cannot be read.
    ModelError
        If the network has no feature map to explain.
    """
    spec = scorer.judgement.preprocess
    if spec.fit != "stretch":
        raise ConfigError(
            f"{scorer.judgement.name} pads its input; lung masks are for models that stretch it"
        )
    pairs = read_lung_masks(folder, spec)
    found = lung_share(covid_maps(scorer.maps, pairs.pixels), pairs.masks)
    seen = ~np.isnan(found.share)
    values = {
        "map_in_lungs": found.share[seen],
        "strongest_point_in_lungs": found.hit[seen],
        "lung_area": found.area[seen],
    }
    return {
        "data": folder.resolve().name,
        "images": len(seen),
        "without_map": int((~seen).sum()),
        **{name: round(float(v.mean()), 6) if len(v) else None for name, v in values.items()},
        "intervals": {
            name: mean_interval(v, np.random.default_rng(bootstrap.seed), bootstrap.resamples)
            for name, v in values.items()
            if bootstrap.resamples and len(v)
        },
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class LesionShare:
    """Position of each map; NaN where a map is empty, or no lungs are drawn.

    Attributes
    ----------
    peak, share
        1 where the strongest point lies on an opacity, else 0; share of the map's sum that lies
        on opacities, 0..1; float64, shape (N,).
    other_peak, other_share
        The same for other patients' maps laid on this image, their mean.
    random_point
        Share of the lungs' area that is opacity: how often a random point of the lungs hits.
    random_pixel
        Share of the whole image that is opacity.
    likeness
        Correlation of every map with every other, float64, shape (M, M); of those that are not
        empty.
    """

    peak: _Vector
    share: _Vector
    other_peak: _Vector
    other_share: _Vector
    random_point: _Vector
    random_pixel: _Vector
    likeness: NDArray[np.float64]


def lesion_share(
    maps: FloatArray, images: Sequence[LesionImage], spec: PreprocessSpec, *, seed: int = 1
) -> LesionShare:
    """Measure maps against drawn opacities.

    Parameters
    ----------
    maps
        For COVID, float32, shape (N, h, w), at least 0, over the network's whole input. They are
        laid over the radiograph as the overlay does, without the padding.
    images
        The X-rays, in the same order.
    spec
        The network's preprocessing.
    seed
        Draws whose map is laid on whose image.

    Source: the pointing game of Zhang et al. 2018, doi:10.1007/s11263-017-1059-x, without its
    tolerance.
    """
    count = len(images)
    laid = [content_of(one, image.shape, spec) for one, image in zip(maps, images, strict=True)]
    peak, share, other_peak, other_share, point, pixel = np.full((6, count), np.nan)
    there = [index for index in range(count) if maps[index].any()]
    partners = _partners(there, seed)
    for index, image in enumerate(images):
        pixel[index] = image.opacity.mean()
        if image.lung is not None and image.lung.any():
            point[index] = (image.opacity & image.lung).sum() / image.lung.sum()
        if index in partners:
            peak[index], share[index] = _on(laid[index], image.opacity)
            others = [_on(laid[other], image.opacity) for other in partners[index]]
            if others:
                other_peak[index], other_share[index] = np.mean(others, axis=0)
    table = correlations(maps[there]) if there else np.zeros((0, 0))
    varied = ~np.isnan(np.diag(table))
    return LesionShare(
        peak=peak,
        share=share,
        other_peak=other_peak,
        other_share=other_share,
        random_point=point,
        random_pixel=pixel,
        likeness=table[np.ix_(varied, varied)],
    )


def measure_lesions(
    scorer: Scorer,
    folder: Path,
    bootstrap: Bootstrap,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], FloatArray, list[LesionImage]]:
    """Explain all images that have drawn opacities, and sum up where the maps lie.

    Returns
    -------
    found
        See `summarise_lesions`, and `data`, the folder's name, and `without_opacity`, images that
        were left out.
    maps
        For COVID, float32, shape (N, h, w).
    images
        The X-rays, in the same order.

    Raises
    ------
    DatasetError
        If there are no such images, or one cannot be read.
    ModelError
        If the network has no feature map to explain.
    """
    spec = scorer.judgement.preprocess
    images, without = read_lesions(folder, spec, progress=progress)
    maps = covid_maps(scorer.maps, np.stack([image.pixels for image in images]))
    found = summarise_lesions(lesion_share(maps, images, spec, seed=bootstrap.seed), bootstrap)
    return {"data": folder.resolve().name, "without_opacity": without, **found}, maps, images


def summarise_lesions(found: LesionShare, bootstrap: Bootstrap) -> dict[str, Any]:
    """Sum up where maps lie.

    Returns
    -------
    dict
        `images`, `without_map` (the map for COVID is empty; left out), the means `peak_on_lesion`,
        `map_on_lesion`, `random_point_of_lungs`, `random_point_of_image`, `other_map_peak`,
        `other_map_share`, the differences `peak_above_random_point`, `peak_above_other_map` and
        `share_above_other_map`, `likeness_of_maps` (mean correlation of different patients'
        maps), each None where it cannot be computed, and their 95 % `intervals` over resampled
        images.
    """
    seen = ~np.isnan(found.peak)
    values = {
        "peak_on_lesion": found.peak,
        "map_on_lesion": found.share,
        "random_point_of_lungs": found.random_point,
        "random_point_of_image": found.random_pixel,
        "other_map_peak": found.other_peak,
        "other_map_share": found.other_share,
        "peak_above_random_point": found.peak - found.random_point,
        "peak_above_other_map": found.peak - found.other_peak,
        "share_above_other_map": found.share - found.other_share,
    }
    result: dict[str, Any] = {
        "images": len(seen),
        "without_map": int((~seen).sum()),
        "intervals": {},
    }
    rng = np.random.default_rng(bootstrap.seed)
    for name, every in values.items():
        known = every[seen & ~np.isnan(every)]
        result[name] = round(float(known.mean()), 6) if len(known) else None
        if len(known) and bootstrap.resamples:
            result["intervals"][name] = mean_interval(known, rng, bootstrap.resamples)
    maps = len(found.likeness)
    result["likeness_of_maps"] = None
    if maps > 1:
        result["likeness_of_maps"] = round(float(mean_likeness(found.likeness)[0]), 6)
        if bootstrap.resamples:
            weights = rng.multinomial(maps, np.full(maps, 1 / maps), bootstrap.resamples)
            likeness = mean_likeness(found.likeness, weights.astype(np.float64))
            result["intervals"]["likeness_of_maps"] = interval(likeness)
    return result


def covid_maps(maps_of: Callable[[FloatArray], FloatArray], pixels: FloatArray) -> FloatArray:
    """Return the map for COVID of each preprocessed image, float32 (N, h, w).

    Parameters
    ----------
    maps_of
        Gives the maps of both classes, (N, 2, h, w); see `Scorer.maps`.
    pixels
        float32, (N, S, S, 1), 0..1.
    """
    return in_batches(lambda batch: maps_of(batch)[:, 1], pixels)


def _on(small: FloatArray, opacity: NDArray[np.bool_]) -> tuple[float, float]:
    share = share_inside(small, opacity.astype(np.float32))
    wide = enlarged(small, (opacity.shape[0], opacity.shape[1]))
    return float(opacity.flat[int(np.argmax(wide))]), float("nan") if share is None else share


def _partners(there: Sequence[int], seed: int) -> dict[int, list[int]]:
    """Draw for each image others, never itself: neighbours in one random circle."""
    circle = np.random.default_rng(seed).permutation(np.asarray(there, dtype=np.intp))
    rounds = range(1, min(_PARTNERS, len(circle) - 1) + 1)
    return {
        int(one): [int(circle[(place + step) % len(circle)]) for step in rounds]
        for place, one in enumerate(circle)
    }


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
            covid_maps(shuffled(scorer, depth, bootstrap.seed + number), pixels)
            for number in range(_SEEDS)
        ]
        found[depth] = compare_maps(maps, others, bootstrap)
    return found


def compare_maps(
    maps: FloatArray, others: Sequence[FloatArray], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Compare a model's maps with those of one or several other networks, image by image.

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

    from lungwatch.training.networks.heads import gradcam

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

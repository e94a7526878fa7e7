"""Backbones out of HDF5 files: whole networks, or weights alone, as CheXNet's are passed on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, LungwatchError, ModelError
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.evaluation.scorers import load_keras


def read_h5(file: Path, build: Callable[[], KerasModel]) -> KerasModel:
    """Read a network, or fill one with a file's weights.

    Parameters
    ----------
    file
        A whole network; or weights as Keras 1 to 3 write them, in which case layers are matched
        by their order and shapes, and what follows the backbone (a classifier) is left away.
    build
        Makes the backbone that the weights belong to.

    Raises
    ------
    ModelError
        If the file is no HDF5 file, or damaged.
    ConfigError
        If the weights belong to another network.
    """
    import h5py

    try:
        with h5py.File(file) as content:
            weights = content.get("model_weights", content)
            layers = _layers(weights) if "layer_names" in weights.attrs else None
            is_whole = "model_config" in content.attrs
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{file} is not an HDF5 file that can be read") from error
    if is_whole:
        try:
            return load_keras(file)
        except LungwatchError:
            # Networks of old versions cannot be built any more; their weights may still fit.
            if layers is None:
                raise
    model = build()
    if layers is None:
        try:
            model.load_weights(file)
        except (ValueError, KeyError, OSError) as error:
            raise _misfit(file, str(error).splitlines()[0]) from error
    else:
        _fill(model, layers, file)
    return model


def _layers(weights: Any) -> list[tuple[str, list[NDArray[Any]]]]:  # noqa: ANN401  # of h5py
    found = []
    for name in _texts(weights.attrs["layer_names"]):
        group = weights[name]
        arrays = [np.asarray(group[one]) for one in _texts(group.attrs["weight_names"])]
        if arrays:
            found.append((name, arrays))
    return found


def _texts(values: Any) -> list[str]:  # noqa: ANN401  # bytes or str, as the version has it
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _fill(model: KerasModel, layers: list[tuple[str, list[NDArray[Any]]]], file: Path) -> None:
    own = [layer for layer in model.layers if layer.weights]
    if len(layers) < len(own):
        raise _misfit(file, f"{len(layers)} layers with weights, not {len(own)}")
    for layer, (name, arrays) in zip(own, layers, strict=False):
        if [w.shape for w in layer.weights] != [a.shape for a in arrays]:
            raise _misfit(file, f"layer {name} does not fit {layer.name}")
        layer.set_weights(arrays)


def _misfit(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file}: weights of another network than the backbone asked for: {why}")

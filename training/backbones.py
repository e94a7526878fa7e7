"""Networks trained elsewhere, up to their last feature map, made ready for X-rays."""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.evaluation.scorers import load_keras
from lungwatch.training.lite0 import build_lite0
from lungwatch.training.run import RunFolder
from lungwatch.training.weights_h5 import read_h5

EFFICIENTNET_LITE0 = "efficientnet-lite0"
# The name under which a trained network carries its backbone, for use as weights again.
BACKBONE = "backbone"

_IMAGENET, _NONE = "imagenet", "none"
_SPATIAL_RANK = 4
_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A feature extractor and what it wants to be fed.

    Attributes
    ----------
    model
        Keras model from (N, S, S, 3) to its last feature map, (N, h, w, C).
    scale, offset
        What turns grey levels of 0..1 into its input, one number for each channel.
    """

    model: KerasModel
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def features(self, pixels: Tensor) -> Tensor:
        """Feed grey pixels, (N, S, S, 1), 0..1; the feature map comes back, (N, h, w, C)."""
        import keras

        x = keras.layers.Concatenate(name="grey_to_rgb")([pixels] * len(self.scale))
        x = keras.layers.Rescaling(list(self.scale), offset=list(self.offset), name="rescale")(x)
        return self.model(x)


def load_backbone(name: str, weights: str, size_px: int) -> Backbone:
    """Build a backbone for a square input.

    Parameters
    ----------
    name
        "efficientnet-lite0", or a network of `keras.applications` in any spelling of its case.
    weights
        "imagenet", "none", the folder of a run, or a file: a Keras model (.keras or .h5; whole,
        a backbone alone, or one that lungwatch trained), cut at its last feature map, or the
        weights of such a network (.h5), whatever classifier follows.
    size_px
        Side of the input.

    Raises
    ------
    ConfigError
        If there is no such backbone, its weights cannot be had or are those of a run with
        another one, or it does not take that size.
    NotFoundError
        If the weights file is missing.
    ModelError
        If it is damaged.
    MissingExtraError
        If a package that carries the weights is not installed.
    """
    scale, offset = input_scaling(name)
    if weights in (_IMAGENET, _NONE):
        model = _build(name, weights, size_px)
    elif Path(weights).is_dir():
        run = RunFolder(root=Path(weights))
        _refuse_other_backbone(run, name)
        model = load_keras(run.model)
    elif weights.endswith(".keras"):
        model = load_keras(Path(weights))
    elif Path(weights).is_file():
        model = read_h5(Path(weights), lambda: _build(name, _NONE, size_px))
    else:
        raise ConfigError(
            f"weights {weights!r}: neither 'imagenet', 'none', a run folder nor a file"
        )
    return Backbone(model=_resized(_cut(model, weights), size_px), scale=scale, offset=offset)


def cut_at_stride(backbone: Backbone, stride: int) -> Backbone:
    """End a backbone at its last feature map of a given fineness.

    Parameters
    ----------
    backbone
        Any.
    stride
        Input pixels a cell of the map, as 16.

    Raises
    ------
    ConfigError
        If it has no such map.
    """
    import keras

    model = backbone.model
    side = model.input_shape[1]
    found = [
        layer.output
        for layer in model.layers[1:]
        if isinstance(layer.output, keras.KerasTensor)
        and len(layer.output.shape) == _SPATIAL_RANK
        and layer.output.shape[1] == -(-side // stride)
    ]
    if not found:
        raise ConfigError(f"the backbone has no map of {stride} input pixels a cell at {side} px")
    return replace(backbone, model=keras.Model(model.input, found[-1], name=BACKBONE))


def input_scaling(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the factor and the offset, for each channel, from grey levels to its input.

    Parameters
    ----------
    name
        As for `load_backbone`.

    Raises
    ------
    ConfigError
        If there is no such backbone.
    """
    if name.lower() == EFFICIENTNET_LITE0:
        # TensorFlow's own recipe for this family: (x - 127) / 128 for 0..255.
        return (255.0 / 128.0,) * 3, (-127.0 / 128.0,) * 3
    # Every one of these functions is affine in each channel, so two colours tell all of it.
    # With grey pictures the order of the channels, which some of them swap, does not matter.
    prepare = sys.modules[_builder(name).__module__].preprocess_input
    black, white = (
        np.asarray(prepare(np.full((1, 1, 3), level, np.float32)), np.float64).ravel()
        for level in (0.0, 255.0)
    )
    return tuple((white - black).tolist()), tuple(black.tolist())


def backbone_names() -> list[str]:
    """Names that `load_backbone` knows."""
    import keras

    there = [n for n in dir(keras.applications) if n[0].isupper()]
    return [EFFICIENTNET_LITE0, *sorted(there)]


def _builder(name: str) -> Any:  # noqa: ANN401  # a function of an untyped library
    import keras

    for known in backbone_names()[1:]:
        if known.lower() == name.lower():
            return getattr(keras.applications, known)
    raise ConfigError(f"no backbone {name!r}; known are {', '.join(backbone_names())}")


def _build(name: str, weights: str, size_px: int) -> KerasModel:
    if name.lower() == EFFICIENTNET_LITE0:
        return build_lite0(size_px, imagenet=weights == _IMAGENET)
    builder = _builder(name)
    chosen = None if weights == _NONE else weights
    try:
        # Keras shows its download on stdout, which belongs to the command's answer.
        with contextlib.redirect_stdout(sys.stderr):
            return builder(include_top=False, weights=chosen, input_shape=(size_px, size_px, 3))
    # A download that fails raises a bare Exception, misfits raise anything.
    except Exception as error:
        reason = str(error).splitlines()[0]
        hint = " (they are fetched from the network)" if weights == _IMAGENET else ""
        raise ConfigError(f"{builder.__name__}, weights {weights}{hint}: {reason}") from error


def _refuse_other_backbone(run: RunFolder, name: str) -> None:
    if not (run.root / "config.json").exists():
        return
    used = run.read("config.json").get("network", {}).get("backbone")
    if used is not None and used.lower() != name.lower():
        raise ConfigError(
            f"{run.root} was trained with the backbone {used}, not {name}: give --backbone {used}, "
            "or other weights"
        )


def _cut(model: KerasModel, weights: str) -> KerasModel:
    import keras

    spatial = [layer for layer in model.layers if _is_spatial(layer)]
    if len(model.inputs) != 1 or len(model.input_shape) != _SPATIAL_RANK or not spatial:
        raise ConfigError(f"{weights}: no network from one image to feature maps")
    if len(model.output_shape) == _SPATIAL_RANK and model.input_shape[-1] == _CHANNELS:
        return model
    # A network inside another is one of its layers, with a graph of its own.
    inner = [
        layer
        for layer in spatial
        if isinstance(layer, keras.Model) and tuple(layer.input_shape)[-1:] == (_CHANNELS,)
    ]
    if inner:
        return _cut(inner[-1], weights)
    if model.input_shape[-1] != _CHANNELS:
        raise ConfigError(f"{weights}: takes {model.input_shape[-1]} channels, not {_CHANNELS}")
    try:
        return keras.Model(model.input, spatial[-1].output)
    except ValueError as error:
        raise ConfigError(f"{weights}: its last feature map cannot be reached") from error


def _is_spatial(layer: KerasModel) -> bool:
    import keras

    output = layer.output
    return isinstance(output, keras.KerasTensor) and len(output.shape) == _SPATIAL_RANK


def _resized(model: KerasModel, size_px: int) -> KerasModel:
    import keras

    try:
        rebuilt = keras.models.clone_model(
            model, input_tensors=keras.Input((size_px, size_px, model.input_shape[-1]))
        )
    except ValueError as error:
        raise ConfigError(f"the backbone cannot be rebuilt for {size_px} px") from error
    rebuilt.set_weights(model.get_weights())
    rebuilt.name = BACKBONE
    return rebuilt

"""Backbones: the baseline CNN and pretrained ones, grey-level normalisation in front.

Blocks to unfreeze, and the head on top.
"""

import contextlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor
from lungwatch.training.fitting.run import RunFolder
from lungwatch.training.networks.heads import FEATURES, attach_head
from lungwatch.training.networks.weights import build_lite0, load_keras, read_h5

NormalisationKind = Literal["train", "all", "fixed", "image"]
NORMALISATION_KINDS: tuple[NormalisationKind, ...] = get_args(NormalisationKind)
STANDARDISE = "standardise"

# An image without contrast is divided by this, not by nothing.
_LEAST_STD = 1e-3
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Standardisation:
    """Mean and standard deviation that normalise grey levels.

    Attributes
    ----------
    mean, std
        Grey level, 0..1; without meaning if `per_image`.
    per_image
        Each image by its own mean and standard deviation instead.
    """

    mean: float = 0.5
    std: float = 0.25
    per_image: bool = False

    def apply(self, pixels: Tensor) -> Tensor:
        """Put the layer onto grey pixels, a Keras tensor (N, S, S, 1), 0..1."""
        import keras

        if self.per_image:
            # Without scale and centre it has no weights, and loads in Keras's safe mode.
            layer = keras.layers.LayerNormalization(
                axis=(1, 2, 3), epsilon=_LEAST_STD**2, center=False, scale=False, name=STANDARDISE
            )
        else:
            layer = keras.layers.Rescaling(
                1.0 / self.std, offset=-self.mean / self.std, name=STANDARDISE
            )
        return layer(pixels)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Source of the mean and the standard deviation.

    Attributes
    ----------
    kind
        "train": the training set; "all": all splits, test included, as some studies do;
        "fixed": `mean` and `std`; "image": each image by its own.
    mean, std
        Grey level, 0..1; only for "fixed", 0.5 and 0.25 if not given.
    """

    kind: NormalisationKind = "train"
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in NORMALISATION_KINDS:
            known = ", ".join(NORMALISATION_KINDS)
            raise ConfigError(f"normalisation is {self.kind!r}, not one of {known}")
        if self.kind != "fixed" and not (self.mean is None and self.std is None):
            raise ConfigError("mean and std are given for the normalisation 'fixed' only")
        if not 0 <= self._mean <= 1 or not 0 < self._std <= 1:
            raise ConfigError("normalisation: mean must lie within 0..1, std above 0 and up to 1")

    @property
    def _mean(self) -> float:
        return 0.5 if self.mean is None else self.mean

    @property
    def _std(self) -> float:
        return 0.25 if self.std is None else self.std

    def settle(self, train: FloatArray, others: Iterable[FloatArray]) -> Standardisation:
        """Fix the values for a data set.

        Parameters
        ----------
        train
            Pixels of the training set, (N, S, S, 1), 0..1.
        others
            Those of the other splits; only looked at for "all".
        """
        if self.kind == "image":
            return Standardisation(per_image=True)
        if self.kind == "fixed":
            return Standardisation(mean=self._mean, std=self._std)
        mean, std = grey_statistics([train, *others] if self.kind == "all" else [train])
        return Standardisation(mean=mean, std=std)


def grey_statistics(parts: Iterable[FloatArray]) -> tuple[float, float]:
    """Mean and standard deviation over all pixels of all images of all parts, 0..1."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        for start in range(0, len(part), _CHUNK):
            # Squares in double precision, but never of a whole data set at once.
            chunk = part[start : start + _CHUNK].astype(np.float64)
            count += chunk.size
            total += float(chunk.sum())
            squares += float(np.square(chunk).sum())
    mean = total / count
    return mean, max(float(np.sqrt(max(squares / count - mean * mean, 0.0))), _LEAST_STD)


# Mean and standard deviation of ImageNet's pictures in grey, 0..1: the usual colour values,
# (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), averaged over the channels.
IMAGENET_MEAN, IMAGENET_STD = 0.449, 0.226


def imagenet_grey(pixels: Tensor, standardisation: Standardisation | None) -> Tensor:
    """Scale grey pixels, by layers, to the mean and the spread of ImageNet's.

    Parameters
    ----------
    pixels
        Keras tensor, (N, S, S, 1), 0..1.
    standardisation
        By what the pixels are standardised first; None leaves them as they are, to the
        backbone's own scaling.
    """
    import keras

    if standardisation is None:
        return pixels
    return keras.layers.Rescaling(IMAGENET_STD, offset=IMAGENET_MEAN, name="imagenet_grey")(
        standardisation.apply(pixels)
    )


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Shape of the baseline CNN.

    Attributes
    ----------
    size_px
        Side of the square input.
    filters
        Channels of the blocks; every block but the last halves the map, so that the maps
        for explanation keep 8x8 cells at 128 px.
    dense_units
        Width of the hidden layer.
    dropout
        Fraction of the hidden layer dropped in training.
    """

    size_px: int = 128
    filters: tuple[int, ...] = (32, 64, 96, 128, 192)
    dense_units: int = 128
    dropout: float = 0.4

    def __post_init__(self) -> None:
        if not self.filters or min(self.dense_units, *self.filters) < 1:
            raise ConfigError("filters and dense units must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout must lie within 0..1")
        if self.size_px >> (len(self.filters) - 1) < 2:
            raise ConfigError(f"{len(self.filters)} blocks are too many for {self.size_px} px")


def build_baseline(
    config: BaselineConfig, mean: float = 0.5, std: float = 0.25, *, per_image: bool = False
) -> KerasModel:
    """Build the baseline CNN.

    Parameters
    ----------
    config
        Its shape.
    mean, std, per_image
        See `backbones.Standardisation`, which is the first layer.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, size, size, 1), 0..1, to the binary logit, (N, 1).
    """
    import keras

    pixels = keras.Input((config.size_px, config.size_px, 1), name="pixels")
    x = Standardisation(mean=mean, std=std, per_image=per_image).apply(pixels)
    last = len(config.filters) - 1
    for index, filters in enumerate(config.filters):
        x = keras.layers.Conv2D(
            filters, 3, padding="same", use_bias=False, name=f"conv{index + 1}"
        )(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"norm{index + 1}")(x)
        x = keras.layers.ReLU(name=FEATURES if index == last else f"relu{index + 1}")(x)
        if index < last:
            x = keras.layers.MaxPooling2D(name=f"pool{index + 1}")(x)
    logit = attach_head(x, dense_units=config.dense_units, dropout=config.dropout)
    return keras.Model(pixels, logit, name="baseline")


EFFICIENTNET_LITE0 = "efficientnet-lite0"

# The name under which a trained network carries its backbone, for use as weights again.
BACKBONE = "backbone"
_IMAGENET, _NONE = "imagenet", "none"
_SPATIAL_RANK = 4
_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A feature extractor and the scaling of its input.

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
        If there is no such backbone, its weights are not available or are those of a run with
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
    """Cut a backbone after its last feature map of a given stride.

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
    """Return the names of backbones that `load_backbone` takes."""
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


# How the families of `keras.applications`, and our own network, name the layers of a block.
_NAMES = re.compile(
    r"(?P<block>"
    r".*stage_\d+_block_\d+"  # ConvNeXt: a residual block
    r"|conv\d+_block\d+"  # ResNet: a residual block; DenseNet: a densely connected layer
    r"|block\d+[a-z]"  # EfficientNet: an inverted residual block
    r"|b\d+(?=_(exp|dw|pw))"  # EfficientNet-Lite0: likewise
    r"|block_\d+|expanded_conv(_\d+)?"  # MobileNetV2 and V3: likewise
    r"|block\d+"  # VGG: what lies between two poolings; Xception: a residual block
    r")_"
)

_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of layers.

    Attributes
    ----------
    name
        What its layers' names have in common.
    first
        Position of its first layer in the backbone's list.
    """

    name: str
    first: int


def blocks_of(backbone: KerasModel) -> list[Block]:
    """Find a backbone's blocks, in order.

    A block begins with the first layer that bears its name and ends before the next block:
    what lies between two (DenseNet's transitions) belongs to the earlier one, what follows the
    last (a closing norm, EfficientNet's widening convolution) to the last, and what comes
    before the first (the stem) is no block. Where names tell nothing (Inception, NASNet, a
    network of one's own), every convolution begins a block.
    """
    import keras

    convolution = keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.SeparableConv2D
    named: dict[str, int] = {}
    for index, layer in enumerate(backbone.layers):
        if found := _NAMES.match(layer.name):
            named.setdefault(found["block"], index)
    if len(named) < _FEWEST:
        named = {
            layer.name: index
            for index, layer in enumerate(backbone.layers)
            if isinstance(layer, convolution)
        }
    return [Block(name=name, first=first) for name, first in named.items()]


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Shape of a transfer network and the weights of its backbone.

    Attributes
    ----------
    backbone
        See `backbones.load_backbone`.
    weights
        "imagenet", "none" or a file; likewise.
    size_px
        Side of the square input.
    dense_units
        Width of the hidden layer.
    dropout
        Fraction of the hidden layer dropped in training.
    unfreeze
        How much of the backbone is fine-tuned: its last so many blocks (see
        `blocks_of`); None for all of it.
    """

    backbone: str = "ResNet50V2"
    weights: str = "imagenet"
    size_px: int = 128
    dense_units: int = 128
    dropout: float = 0.3
    unfreeze: int | None = None

    def __post_init__(self) -> None:
        if self.unfreeze is not None and self.unfreeze < 1:
            raise ConfigError("unfreeze must be 'all' or at least 1 block")


def build_transfer(
    config: TransferConfig,
    standardisation: Standardisation | None = None,
    *,
    backbone: Backbone | None = None,
) -> KerasModel:
    """Build a transfer network, its backbone frozen.

    Parameters
    ----------
    config
        Its shape and origin.
    standardisation
        How its input is normalised; see `Standardisation`.
    backbone
        What `load_backbone` made of the same configuration, if it is there already.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, size, size, 1), 0..1, to the binary logit, (N, 1).

    Raises
    ------
    ConfigError, NotFoundError, ModelError, MissingExtraError
        As `load_backbone` does.
    """
    import keras

    if backbone is None:
        backbone = load_backbone(config.backbone, config.weights, config.size_px)
    freeze(backbone.model)
    pixels = keras.Input((config.size_px, config.size_px, 1), name="pixels")
    maps = backbone.features(imagenet_grey(pixels, standardisation))
    # The backbone is one layer of this network, its maps inside it: this gives them a name
    # out here, where the maps for explanation are looked for.
    features = keras.layers.Activation("linear", name=FEATURES)(maps)
    logit = attach_head(features, dense_units=config.dense_units, dropout=config.dropout)
    return keras.Model(pixels, logit, name="transfer")


def freeze(backbone: KerasModel) -> None:
    """Freeze all layers of a backbone."""
    for layer in backbone.layers:
        layer.trainable = False


def unfreeze(model: KerasModel, last: int | None) -> list[str]:
    """Make a network's backbone trainable: all of it, or its `last` blocks.

    Batch norm stays as it came, scale and statistics alike: small batches of X-rays would
    replace what it knows by noise. A batch norm that is not trainable runs in inference mode,
    which a call with `training=False` would not ensure: Keras overrides that from outside.

    Parameters
    ----------
    model
        What `build_transfer` built; it must be compiled afterwards.
    last
        How many blocks (see `blocks_of`), counted from the feature map; None
        for all, the stem included, and so are as many as there are.

    Returns
    -------
    list of str
        The backbone's layers that will learn.
    """
    import keras

    backbone = model.get_layer(BACKBONE)
    blocks = blocks_of(backbone)
    first = 0 if last is None or last >= len(blocks) else blocks[-last].first
    for index, layer in enumerate(backbone.layers):
        fixed = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= first and not fixed
    return [layer.name for layer in backbone.layers if layer.trainable_weights]

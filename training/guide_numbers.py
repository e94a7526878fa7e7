"""Findings and sources as numbers, for tensors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lungwatch.training.data.dataset import ImageClass, Sample

# How grave each finding is, for ranking: other pneumonias lie between.
_GRAVITY: dict[ImageClass, int] = {"NORMAL": 0, "OTHER_PNEUMONIA": 1, "COVID": 2}


def gravity(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """How grave the findings are, int32 (N,): 0 NORMAL, 1 OTHER_PNEUMONIA, 2 COVID."""
    return np.array([_GRAVITY[s.finding] for s in samples], dtype=np.int32)


def source_numbers(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Number the sources in the order of their names, int32 (N,)."""
    names = sorted({s.source for s in samples})
    return np.array([names.index(s.source) for s in samples], dtype=np.int32)

"""Grey levels brought to zero mean and unit spread, inside the network's own graph.

So no caller can forget it, and a network that is exported takes it along.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import FloatArray, Tensor

NormalisationKind = Literal["train", "all", "fixed", "image"]
NORMALISATION_KINDS: tuple[NormalisationKind, ...] = get_args(NormalisationKind)

STANDARDISE = "standardise"
# An image without contrast is divided by this, not by nothing.
_LEAST_STD = 1e-3
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Standardisation:
    """What is subtracted and what divides.

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
    """Where mean and standard deviation come from.

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

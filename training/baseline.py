"""The baseline: five convolution blocks from scratch, and the head that explains itself."""

from dataclasses import dataclass

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.head import FEATURES, attach_head
from lungwatch.training.normalisation import Standardisation


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The network's shape.

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
    """Build the network.

    Parameters
    ----------
    config
        Its shape.
    mean, std, per_image
        See `lungwatch.training.normalisation.Standardisation`, which is the first layer.

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

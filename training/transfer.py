"""A backbone from elsewhere with lungwatch's head: what transfer learning trains."""

from dataclasses import dataclass

from lungwatch.errors import ConfigError
from lungwatch.training.backbones import BACKBONE, Backbone, load_backbone
from lungwatch.training.blocks import blocks_of
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.grey_input import imagenet_grey
from lungwatch.training.head import FEATURES, attach_head
from lungwatch.training.normalisation import Standardisation


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """The network's shape and where it comes from.

    Attributes
    ----------
    backbone
        See `lungwatch.training.backbones.load_backbone`.
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
        `lungwatch.training.blocks`); None for all of it.
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
    """Build the network, its backbone frozen.

    Parameters
    ----------
    config
        Its shape and origin.
    standardisation
        How its input is normalised; see `lungwatch.training.grey_input`.
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
    """Keep all of a backbone's weights as they are."""
    for layer in backbone.layers:
        layer.trainable = False


def unfreeze(model: KerasModel, last: int | None) -> list[str]:
    """Let a network's backbone learn: all of it, or from its `last` blocks on.

    Batch norm stays as it came, scale and statistics alike: small batches of X-rays would
    replace what it knows by noise. A batch norm that is not trainable runs in inference mode,
    which a call with `training=False` would not ensure: Keras overrides that from outside.

    Parameters
    ----------
    model
        What `build_transfer` built; it must be compiled afterwards.
    last
        How many blocks (see `lungwatch.training.blocks`), counted from the feature map; None
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

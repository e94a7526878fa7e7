"""The network that is pretrained: one backbone, a linear head for each task."""

from dataclasses import dataclass

from lungwatch.training.backbones import load_backbone
from lungwatch.training.data.pixels import KerasModel
from lungwatch.training.grey_input import imagenet_grey
from lungwatch.training.head import DROPOUT, POOLED
from lungwatch.training.normalisation import Standardisation
from lungwatch.training.tasks import Task

# Keras's 0.99 would need more steps than a run of ten epochs over a few thousand images has.
_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The network's shape and where it comes from; see `TransferConfig`.

    Attributes
    ----------
    backbone, weights, size_px
        See `lungwatch.training.backbones.load_backbone`.
    dropout
        Fraction of the pooled features dropped in training.
    """

    backbone: str = "ResNet50V2"
    weights: str = "none"
    size_px: int = 128
    dropout: float = 0.2


def build_pretraining(
    config: PretrainConfig, standardisation: Standardisation | None, tasks: list[Task]
) -> KerasModel:
    """Build the network; all of it learns, batch norm included.

    Parameters
    ----------
    config
        Its shape and origin.
    standardisation
        How its input is normalised; see `lungwatch.training.grey_input`.
    tasks
        What it answers.

    Returns
    -------
    keras.Model
        From `pixels`, float32 (N, size, size, 1), 0..1, to a dict of logits by the tasks'
        names, (N, answers) each. Its layer named "backbone" is what `load_backbone` takes.

    Raises
    ------
    ConfigError, NotFoundError, ModelError, MissingExtraError
        As `load_backbone` does.
    """
    import keras

    backbone = load_backbone(config.backbone, config.weights, config.size_px)
    for layer in backbone.model.layers:
        layer.trainable = True
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = _MOMENTUM
    pixels = keras.Input((config.size_px, config.size_px, 1), name="pixels")
    x = backbone.features(imagenet_grey(pixels, standardisation))
    x = keras.layers.GlobalAveragePooling2D(name=POOLED)(x)
    x = keras.layers.Dropout(config.dropout, name=DROPOUT)(x)
    heads = {
        task.name: keras.layers.Dense(len(task.answers), name=f"task_{task.name}")(x)
        for task in tasks
    }
    return keras.Model(pixels, heads, name="pretraining")

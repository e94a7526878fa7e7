"""X-ray grey levels brought to the range in which a backbone saw its own pictures."""

from lungwatch.training.data.pixels import Tensor
from lungwatch.training.normalisation import Standardisation

# Mean and standard deviation of ImageNet's pictures in grey, 0..1: the usual colour values,
# (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), averaged over the channels.
IMAGENET_MEAN, IMAGENET_STD = 0.449, 0.226


def imagenet_grey(pixels: Tensor, standardisation: Standardisation | None) -> Tensor:
    """Put the layers onto grey pixels that give them the mean and the spread of ImageNet's.

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

"""JPEG (ISO 10918) for pydicom by libjpeg-turbo, as imagecodecs carries it.

Of the decoders that pydicom knows, the one for lossless and 12-bit JPEG is under the GPL, and
GDCM leaves 12 bits out. This one decodes all of them, several times faster, and comes under
the BSD licence. The names of the module's contents are those that pydicom asks for.
"""

import importlib.util

import numpy as np
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import (
    UID,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
)

PLUGIN = "imagecodecs"
SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = dict.fromkeys(SYNTAXES, ("imagecodecs",))


def is_available(uid: str) -> bool:
    """Whether frames of a transfer syntax can be decoded."""
    return uid in SYNTAXES and importlib.util.find_spec("imagecodecs") is not None


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame.

    Returns
    -------
    bytes
        Samples in 8 bits, or in 16 where the codestream has more than 8; colours by pixel,
        in the colour space that the codestream is in.
    """
    import imagecodecs  # noqa: PLC0415 - 10 ms that only JPEG files need

    space = None
    if runner.samples_per_pixel == 3:
        # Equal on both sides: nothing is converted, which is pydicom's to do.
        space = "RGB" if runner.photometric_interpretation == "RGB" else "YCBCR"
    decoded = np.asarray(imagecodecs.jpeg8_decode(src, colorspace=space, outcolorspace=space))
    runner.set_option("bits_allocated", 8 * decoded.itemsize)
    runner.set_option("planar_configuration", 0)
    return decoded.tobytes()


def register() -> None:
    """Make the decoder known to pydicom."""
    for syntax in SYNTAXES:
        get_decoder(syntax).add_plugin(PLUGIN, (__name__, decode_frame.__name__))

"""JPEG (ISO 10918) and JPEG 2000 for pydicom, as imagecodecs carries libjpeg-turbo and OpenJPEG.

Of the decoders that pydicom knows, the one for lossless and 12-bit JPEG is under the GPL, GDCM
leaves 12 bits out, and that for JPEG 2000 keeps OpenJPEG's warnings to itself. These decode all
of them, several times faster, and come under BSD licences. The names of the module's contents
are those that pydicom asks for.
"""

import importlib.util
import logging
import threading

import numpy as np
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
)

from lungwatch.imaging.codestream import frame_header
from lungwatch.imaging.entropy import check_jpeg, check_jpeg2000, damaged

PLUGIN = "lungwatch"
JPEG_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
JPEG2000_SYNTAXES = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
SYNTAXES = (*JPEG_SYNTAXES, *JPEG2000_SYNTAXES)
DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = dict.fromkeys(SYNTAXES, ("imagecodecs",))


def is_available(uid: str) -> bool:
    """Whether frames of a transfer syntax can be decoded."""
    return uid in SYNTAXES and importlib.util.find_spec("imagecodecs") is not None


def decode_jpeg(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame of JPEG.

    Returns
    -------
    bytes
        Samples in 8 bits, or in 16 where the codestream has more than 8; colours by pixel,
        in the colour space that the codestream is in.

    Raises
    ------
    FileRejected
        As DAMAGED, if the entropy-coded data are.
    """
    import imagecodecs  # noqa: PLC0415 - 10 ms that only compressed files need

    space = None
    if runner.samples_per_pixel == 3:
        # Equal on both sides: nothing is converted, which is pydicom's to do.
        space = "RGB" if runner.photometric_interpretation == "RGB" else "YCBCR"
    decoded = np.asarray(imagecodecs.jpeg8_decode(src, colorspace=space, outcolorspace=space))
    if (header := frame_header(src)) is not None:
        check_jpeg(src, header, decoded)
    runner.set_option("bits_allocated", 8 * decoded.itemsize)
    runner.set_option("planar_configuration", 0)
    return decoded.tobytes()


def decode_jpeg2000(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame of JPEG 2000 or HTJ2K.

    Returns
    -------
    bytes
        Samples in 8 or 16 bits, extended to them where the codestream is signed; colours by
        pixel, as RGB.

    Raises
    ------
    FileRejected
        As DAMAGED, if a marker stands where none may, or if OpenJPEG warns.
    """
    import imagecodecs  # noqa: PLC0415 - as above

    check_jpeg2000(src)
    logger = logging.getLogger("imagecodecs")
    complaints = _Complaints()
    logger.addFilter(complaints)
    try:
        decoded = np.asarray(imagecodecs.jpeg2k_decode(src, planar=False, verbose=1))
    finally:
        logger.removeFilter(complaints)
    if complaints.heard:
        raise damaged("JPEG 2000")
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")
    runner.set_option("bits_allocated", 8 * decoded.itemsize)
    runner.set_option("planar_configuration", 0)
    return decoded.tobytes()


class _Complaints(logging.Filter):
    """Hears what a codec says in this thread, and keeps it from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = False
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self.heard = True
        return False


def register() -> None:
    """Make the decoders known to pydicom."""
    for syntax in JPEG_SYNTAXES:
        get_decoder(syntax).add_plugin(PLUGIN, (__name__, decode_jpeg.__name__))
    for syntax in JPEG2000_SYNTAXES:
        get_decoder(syntax).add_plugin(PLUGIN, (__name__, decode_jpeg2000.__name__))

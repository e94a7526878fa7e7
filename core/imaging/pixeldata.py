"""Pixel data: decoders of every transfer syntax, and checks before and after decoding.

JPEG and JPEG 2000 are decoded by imagecodecs (libjpeg-turbo, OpenJPEG; BSD licences): pydicom's
decoder for lossless and 12-bit JPEG is under the GPL, GDCM cannot decode 12 bits, and pydicom's
for JPEG 2000 hides OpenJPEG's warnings. pydicom asks for the names `is_available` and
`DECODER_DEPENDENCIES`.
"""

import importlib.util
import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import Decoder, DecodeRunner, get_decoder
from pydicom.pixels.processing import apply_color_lut
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
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.codestream import (
    FrameHeader,
    check_jpeg,
    check_jpeg2000,
    check_rle,
    damaged,
    frame_header,
)
from lungwatch.imaging.dicomfile import frame_bytes, holds_bytes, is_encapsulated, single_frame
from lungwatch.imaging.radiograph import code_of, number_of, short, text_of
from lungwatch.imaging.samples import Layout, Samples, check_shape, extract_samples, in_byte_order

PLUGIN = "lungwatch"
JPEG_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1)
JPEG2000_SYNTAXES = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
SYNTAXES = (*JPEG_SYNTAXES, *JPEG2000_SYNTAXES)
DECODER_DEPENDENCIES: dict[UID, tuple[str, ...]] = dict.fromkeys(SYNTAXES, ("imagecodecs",))


def is_available(uid: str) -> bool:
    """Return whether frames of a transfer syntax can be decoded."""
    return uid in SYNTAXES and importlib.util.find_spec("imagecodecs") is not None


def decode_jpeg(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame of JPEG to samples of 8 or 16 bits, in the codestream's colour space.

    Raises
    ------
    FileRejected
        As DAMAGED, if the entropy-coded data are.
    """
    import imagecodecs  # noqa: PLC0415 - 10 ms that only compressed files need

    space = None
    if runner.samples_per_pixel == 3:
        # Equal on both sides: pydicom converts.
        space = "RGB" if runner.photometric_interpretation == "RGB" else "YCBCR"
    decoded = np.asarray(imagecodecs.jpeg8_decode(src, colorspace=space, outcolorspace=space))
    if (header := frame_header(src)) is not None:
        check_jpeg(src, header, decoded)
    runner.set_option("bits_allocated", 8 * decoded.itemsize)
    runner.set_option("planar_configuration", 0)
    return decoded.tobytes()


def decode_jpeg2000(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame of JPEG 2000 or HTJ2K to samples of 8 or 16 bits, colours as RGB.

    Raises
    ------
    FileRejected
        As DAMAGED, if a marker is where none may be, or if OpenJPEG warns.
    """
    import imagecodecs  # noqa: PLC0415 - as above

    check_jpeg2000(src)
    logger = logging.getLogger("imagecodecs")
    warnings = _WarningFilter()
    logger.addFilter(warnings)
    try:
        decoded = np.asarray(imagecodecs.jpeg2k_decode(src, planar=False, verbose=1))
    finally:
        logger.removeFilter(warnings)
    if warnings.has_warned:
        raise damaged("JPEG 2000")
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")
    runner.set_option("bits_allocated", 8 * decoded.itemsize)
    runner.set_option("planar_configuration", 0)
    return decoded.tobytes()


class _WarningFilter(logging.Filter):
    """Notes a codec's warnings in this thread, and keeps them out of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.has_warned = False
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        self.has_warned = True
        return False


def register_decoders() -> None:
    """Make the decoders known to pydicom."""
    for syntax in JPEG_SYNTAXES:
        get_decoder(syntax).add_plugin(PLUGIN, (__name__, decode_jpeg.__name__))
    for syntax in JPEG2000_SYNTAXES:
        get_decoder(syntax).add_plugin(PLUGIN, (__name__, decode_jpeg2000.__name__))


_MONOCHROME = {"MONOCHROME1", "MONOCHROME2"}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_PALETTE = "PALETTE COLOR"
_LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K}
_FAMILIES = {
    "JPEG": JPEG_SYNTAXES,
    "JPEG 2000": JPEG2000_SYNTAXES,
    "JPEG-LS": tuple(JPEGLSTransferSyntaxes),
}
# pydicom would mask unused bits and extend signs regardless of the pixels.
_OPTIONS: Any = {
    "view_only": True,
    "correct_unused_bits": False,
    "apply_j2k_sign_correction": False,
    "apply_jls_sign_correction": False,
}
# Type 1 in PS3.3 C.7.6.3.1; without one of them no image can be read for certain.
_NEEDED = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)
# A palette's image is decoded like a grey one, and coloured afterwards.
_SAMPLES_PER_PIXEL = {**dict.fromkeys(_MONOCHROME | {_PALETTE}, 1), **dict.fromkeys(_COLOUR, 3)}


register_decoders()


def check_pixels(dataset: FileDataset, max_pixels: int) -> None:
    """Refuse pixel data that is missing, too large, not one frame, or of an unknown kind.

    Raises
    ------
    FileRejected
        With the reason; nothing has been decoded by then.
    """
    if "PixelData" not in dataset:
        # A file that ends before its largest element is parsed without an error.
        raise FileRejected(Reason.NO_PIXEL_DATA, "the DICOM file holds no pixel data")
    rows, columns = number_of(dataset, "Rows"), number_of(dataset, "Columns")
    if rows <= 0 or columns <= 0:
        raise FileRejected(Reason.UNREADABLE, "the DICOM file states no image size")
    if rows * columns > max_pixels:
        raise FileRejected(
            Reason.TOO_LARGE, f"the image is {columns}x{rows} pixels, more than {max_pixels} in all"
        )
    if (frames := number_of(dataset, "NumberOfFrames", 1)) > 1:
        raise FileRejected(Reason.MULTI_FRAME, f"the file states {frames} frames, not one")
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    is_native = syntax.is_transfer_syntax and not syntax.is_encapsulated
    is_colour = number_of(dataset, "SamplesPerPixel") > 1
    for keyword in (*_NEEDED, *(("PlanarConfiguration",) if is_native and is_colour else ())):
        if text_of(dataset, keyword) is None:
            raise FileRejected(
                Reason.UNSUPPORTED_PIXEL_FORMAT,
                f"{keyword} is missing, without which the pixel data cannot be understood",
            )
    photometric = code_of(dataset, "PhotometricInterpretation")
    samples = number_of(dataset, "SamplesPerPixel", 1)
    if _SAMPLES_PER_PIXEL.get(photometric) != samples:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"photometric interpretation {short(photometric)} "
            + (f"with {samples} samples a pixel " if photometric in _SAMPLES_PER_PIXEL else "")
            + "is not supported",
        )
    if (sign := number_of(dataset, "PixelRepresentation")) not in (0, 1):
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT, f"PixelRepresentation is {sign}, neither 0 nor 1"
        )
    allocated, stored = number_of(dataset, "BitsAllocated"), number_of(dataset, "BitsStored")
    # PS3.3 C.8.11.3 allows DX no other, and no modality writes them for radiographs.
    if allocated not in (8, 16) or not 0 < stored <= allocated:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"samples of {stored} bits in {allocated} are not supported, only 8 and 16",
        )


def decode_pixels(dataset: FileDataset) -> Samples:
    """Decode the one frame of a data set that `check_pixels` accepts.

    Returns
    -------
    Samples
        Stored values in 8 or 16 bits, shape (rows, columns), or (rows, columns, 3) as RGB,
        without unused bits (overlays, PS3.5 8.1.2). Depth and sign are those that the file
        states, unless the stream or the pixels contradict.

    Raises
    ------
    FileRejected
        If there is no decoder, the pixel data is damaged, or its depth cannot be determined.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    decoder = _decoder(syntax)
    if syntax.is_encapsulated:
        frame = single_frame(dataset.PixelData, syntax)
        header = _frame_header(frame, dataset, syntax)
        if header is not None and header.precision > number_of(dataset, "BitsAllocated"):
            dataset.BitsAllocated = 16
        if "PlanarConfiguration" not in dataset:
            dataset.PlanarConfiguration = 0  # decided by the stream
        # Offsets are not needed for a single frame, and may be wrong.
        dataset.PixelData = encapsulate([frame], has_bot=False)
        for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            dataset.pop(keyword, None)
    else:
        _check_native(dataset, syntax)
        header = None
    if is_narrower := not syntax.is_encapsulated and holds_bytes(dataset):
        dataset.BitsAllocated = 8
    values = _decoded(decoder, dataset, syntax, has_header=header is not None)
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.ndim == 3:
        return Samples(values=values)
    words, is_swapped = values.view(f"u{values.dtype.itemsize}"), False
    if not syntax.is_encapsulated:
        words, is_swapped = in_byte_order(words)
        check_shape(words)
    samples = extract_samples(
        words,
        Layout(
            stored=number_of(dataset, "BitsStored"),
            high_bit=number_of(dataset, "HighBit"),
            is_signed=bool(number_of(dataset, "PixelRepresentation")),
            precision=header.precision if header else 8 * values.dtype.itemsize,
            stream_is_signed=header.is_signed if header else None,
            is_lossy=syntax in _LOSSY,
        ),
    )
    if code_of(dataset, "PhotometricInterpretation") == _PALETTE:
        return Samples(values=apply_color_lut(samples.values, dataset))
    is_corrected = samples.is_corrected or is_swapped or is_narrower
    return Samples(values=samples.values, is_corrected=is_corrected)


def _decoded(
    decoder: Decoder, dataset: FileDataset, syntax: UID, *, has_header: bool
) -> NDArray[Any]:
    try:
        values, _ = decoder.as_array(
            dataset,
            index=0,
            decoding_plugin=_plugin(decoder, dataset),
            **_OPTIONS,
        )
    except FileRejected:
        raise
    # A codec may raise anything on a damaged stream; one in Rust panics, a BaseException by pyo3.
    except BaseException as error:
        if (refusal := _refusal_within(error)) is not None:
            raise refusal from None
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic):
            raise
        raise FileRejected(
            # Data that fail behind a valid header are damaged.
            Reason.DAMAGED if has_header else Reason.UNREADABLE,
            f"the pixel data cannot be decoded ('{syntax.name}')",
        ) from error
    return values


def _refusal_within(error: BaseException | None) -> FileRejected | None:
    """Return the rejection that pydicom has wrapped into an error of its own."""
    while error is not None and not isinstance(error, FileRejected):
        error = error.__cause__ or error.__context__
    return error


def _check_native(dataset: FileDataset, syntax: UID) -> None:
    """Refuse native pixel data that are compressed, or hold more than one frame."""
    value = dataset.PixelData
    if is_encapsulated(value):
        raise FileRejected(
            Reason.UNREADABLE,
            f"the pixel data is compressed, though the transfer syntax is '{syntax.name}'",
        )
    if (frames := len(value) // frame_bytes(dataset)) > 1:
        raise FileRejected(
            Reason.MULTI_FRAME,
            f"the pixel data has {frames} times the size of the one frame that the file states",
        )


def _decoder(syntax: UID) -> Decoder:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise FileRejected(
            Reason.UNSUPPORTED_TRANSFER_SYNTAX,
            f"transfer syntax {_named(syntax)} is not supported: send the image uncompressed, or "
            "in JPEG, JPEG-LS, JPEG 2000 or RLE",
        ) from error
    if not decoder.is_available:
        packages = {
            **dict.fromkeys(SYNTAXES, "imagecodecs"),
            **dict.fromkeys(JPEGLSTransferSyntaxes, "pyjpegls"),
        }
        package = packages[syntax]
        raise FileRejected(
            Reason.UNSUPPORTED_TRANSFER_SYNTAX,
            f"transfer syntax {_named(syntax)} needs a decoder that is not installed: "
            f"pip install {package}",
        )
    return decoder


def _named(syntax: UID) -> str:
    # `name` of a UID that pydicom doesn't know is the UID itself, out of the file.
    known = syntax.name != str(syntax)
    return f"'{syntax.name}' ({syntax})" if known else repr(str(syntax)[:64])


def _plugin(decoder: Decoder, dataset: FileDataset) -> str:
    """Choose one of several decoders, so that none of the others accepts a damaged stream."""
    available = decoder.available_plugins
    is_lossy_colour = number_of(dataset, "SamplesPerPixel", 1) == 3 and decoder.UID in (
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
    )
    # Pillow knows the markers by which a JPEG file tells its colour space.
    preferred = ("pillow",) if is_lossy_colour else (PLUGIN, "pyjpegls")
    return next((name for name in (*preferred, *available) if name in available), "")


def _frame_header(frame: bytes, dataset: FileDataset, syntax: UID) -> FrameHeader | None:
    """Compare a compressed frame's own header with the file's attributes."""
    rows, columns, samples = (
        number_of(dataset, keyword, 1) for keyword in ("Rows", "Columns", "SamplesPerPixel")
    )
    if syntax == RLELossless:
        if frame.startswith((b"\xff\xd8\xff", b"\xff\x4f\xff\x51")):
            raise FileRejected(
                Reason.UNREADABLE, "the pixel data is JPEG, though the transfer syntax is RLE"
            )
        sample_bytes = samples * number_of(dataset, "BitsAllocated") // 8
        # A segment for each byte of a pixel (PS3.5 G.2): how many there are, the frame tells.
        segments = int.from_bytes(frame[:4], "little")
        if segments != sample_bytes and segments in (samples, 2 * samples):
            allocated = 8 * segments // samples
            dataset.BitsAllocated = allocated
            if number_of(dataset, "BitsStored") > allocated:
                dataset.BitsStored, dataset.HighBit = allocated, allocated - 1
            sample_bytes = segments
        size_bytes = rows * columns * sample_bytes
        # Run lengths expand 64-fold at most and cost a byte in 128 at worst: what is longer
        # than that was not made from this image, and might fill the memory.
        if len(frame) > size_bytes + size_bytes // 64 + 16 * rows + 128:
            raise FileRejected(
                Reason.UNREADABLE, "the compressed image is larger than an uncompressed one"
            )
        check_rle(frame, segments=sample_bytes, size=rows * columns)
        return None
    header = frame_header(frame)
    if header is None:
        raise FileRejected(
            Reason.UNREADABLE,
            f"the pixel data is not a stream of the transfer syntax '{syntax.name}'",
        )
    if syntax not in _FAMILIES[header.family]:
        raise FileRejected(
            Reason.UNREADABLE,
            f"the pixel data is {header.family}, though the transfer syntax is '{syntax.name}'",
        )
    if (rows, columns, samples) != (
        header.rows,
        header.columns,
        header.components,
    ):
        raise FileRejected(
            Reason.UNREADABLE, "the compressed image's size is not the one that the file states"
        )
    return header

"""From encoded pixel data to stored values, whatever the transfer syntax."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging import jpegplugin
from lungwatch.imaging.attributes import code_of, number_of, short
from lungwatch.imaging.codestream import FrameHeader, frame_header

_MONOCHROME = {"MONOCHROME1", "MONOCHROME2"}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_PALETTE = "PALETTE COLOR"
_LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K}
# pydicom masks the unused bits without a look at where the used ones are.
_OPTIONS: Any = {"view_only": True, "correct_unused_bits": False}
# A palette's image is decoded like a grey one, and coloured afterwards.
_SAMPLES_PER_PIXEL = {**dict.fromkeys(_MONOCHROME | {_PALETTE}, 1), **dict.fromkeys(_COLOUR, 3)}

jpegplugin.register()


def check_pixels(dataset: FileDataset, max_pixels: int) -> None:
    """Refuse pixel data that is missing, too large, not one frame, or of an unknown kind.

    Raises
    ------
    FileRejected
        With the reason; nothing has been decoded by then.
    """
    if "PixelData" not in dataset:
        # A file cut off before its largest element parses without complaint.
        raise FileRejected(Reason.NO_PIXEL_DATA, "the DICOM file holds no pixel data")
    rows, columns = number_of(dataset, "Rows"), number_of(dataset, "Columns")
    if rows <= 0 or columns <= 0:
        raise FileRejected(Reason.UNREADABLE, "the DICOM file states no image size")
    if rows * columns > max_pixels:
        raise FileRejected(
            Reason.TOO_LARGE, f"the image is {columns}x{rows} pixels, more than {max_pixels} in all"
        )
    if (frames := number_of(dataset, "NumberOfFrames", 1)) > 1:
        raise FileRejected(Reason.MULTI_FRAME, f"the file holds {frames} frames, not one")
    photometric = code_of(dataset, "PhotometricInterpretation")
    samples = number_of(dataset, "SamplesPerPixel", 1)
    if _SAMPLES_PER_PIXEL.get(photometric) != samples:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"photometric interpretation {short(photometric) or 'missing'} "
            + (f"with {samples} samples a pixel " if photometric in _SAMPLES_PER_PIXEL else "")
            + "is not supported",
        )
    allocated, stored = number_of(dataset, "BitsAllocated"), number_of(dataset, "BitsStored")
    # PS3.3 C.8.11.3 allows DX no other, and no modality writes them for radiographs.
    if allocated not in (8, 16) or not 0 < stored <= allocated:
        raise FileRejected(
            Reason.UNSUPPORTED_PIXEL_FORMAT,
            f"samples of {stored} bits in {allocated} are not supported, only 8 and 16",
        )


def decode(dataset: FileDataset) -> NDArray[Any]:
    """Decode the one frame of a data set for which `check_pixels` holds.

    Returns
    -------
    numpy.ndarray
        Stored values in 8 or 16 bits, shape (rows, columns), or (rows, columns, 3) as RGB.
        Signed where PixelRepresentation says so; bits outside those stored (overlays, PS3.5
        8.1.2) are gone.

    Raises
    ------
    FileRejected
        If no decoder is there, or the pixel data is damaged.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    decoder = _decoder(syntax)
    header = _frame_header(dataset, syntax) if syntax.is_encapsulated else None
    try:
        values, _ = decoder.as_array(
            dataset,
            index=0,
            decoding_plugin=_plugin(decoder, dataset),
            **_OPTIONS,
        )
    # A codec may raise anything at all on a damaged stream, and it is the stream's fault. One
    # written in Rust panics, which pyo3 makes a BaseException of.
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic):
            raise
        raise FileRejected(
            Reason.UNREADABLE, f"the pixel data cannot be decoded ('{syntax.name}')"
        ) from error
    if values.ndim == 3:
        return values
    values = _stored_bits(values, dataset, header)
    if code_of(dataset, "PhotometricInterpretation") == _PALETTE:
        return apply_color_lut(values, dataset)
    return values


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
            **dict.fromkeys(jpegplugin.SYNTAXES, "imagecodecs"),
            **dict.fromkeys(JPEGLSTransferSyntaxes, "pyjpegls"),
        }
        package = packages.get(syntax, "pylibjpeg pylibjpeg-openjpeg")
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
    """Choose one of several decoders, so that no damaged stream finds one that takes it."""
    available = decoder.available_plugins
    is_lossy_colour = number_of(dataset, "SamplesPerPixel", 1) == 3 and decoder.UID in (
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
    )
    # Pillow knows the markers by which a JPEG file tells its colour space.
    preferred = ("pillow",) if is_lossy_colour else (jpegplugin.PLUGIN, "pyjpegls", "pylibjpeg")
    return next((name for name in (*preferred, *available) if name in available), "")


def _frame_header(dataset: FileDataset, syntax: UID) -> FrameHeader | None:
    """Compare what the compressed frame says of itself with what the file says of it."""
    try:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    # As with the codecs: the encapsulation is as damaged as the file.
    except Exception as error:
        raise FileRejected(
            Reason.UNREADABLE, "the compressed pixel data's frame cannot be found"
        ) from error
    rows, columns, samples = (
        number_of(dataset, keyword, 1) for keyword in ("Rows", "Columns", "SamplesPerPixel")
    )
    if syntax == RLELossless:
        size_bytes = rows * columns * samples * number_of(dataset, "BitsAllocated") // 8
        # Run lengths expand 64-fold at most and cost a byte in 128 at worst: what is longer
        # than that was not made from this image, and might fill the memory.
        if len(frame) > size_bytes + size_bytes // 64 + 16 * rows + 128:
            raise FileRejected(
                Reason.UNREADABLE, "the compressed image is larger than an uncompressed one"
            )
        return None
    header = frame_header(frame)
    if header is not None and (rows, columns, samples) != (
        header.rows,
        header.columns,
        header.components,
    ):
        raise FileRejected(
            Reason.UNREADABLE, "the compressed image's size is not the one that the file states"
        )
    return header


def _stored_bits(
    values: NDArray[Any], dataset: FileDataset, header: FrameHeader | None
) -> NDArray[Any]:
    """Cut a sample's bits out of its word, and extend its sign (PS3.5 8.1.1)."""
    word = 8 * values.dtype.itemsize
    stored = min(number_of(dataset, "BitsStored"), word)
    above_lowest = number_of(dataset, "HighBit", stored - 1) + 1 - stored
    if stored == word:
        return values
    is_signed = values.dtype.kind == "i"
    # A codec that was given words of 16 bits gives them back, else right-aligned samples.
    is_word = header is None or header.precision > stored
    if is_word and dataset.file_meta.TransferSyntaxUID in _LOSSY:
        # What swings out beyond the stated bits is the codec's error: cutting the bits off
        # would turn white into black.
        low = -(2 ** (stored - 1)) if is_signed else 0
        return np.asarray(np.clip(values, low, low + 2**stored - 1))
    shift = above_lowest if is_word and 0 <= above_lowest <= word - stored else 0
    if is_signed:
        aligned = np.left_shift(values, word - stored - shift)
        return np.asarray(np.right_shift(aligned, word - stored))
    moved = np.right_shift(values, shift) if shift else values
    return np.asarray(np.bitwise_and(moved, values.dtype.type(2**stored - 1)))

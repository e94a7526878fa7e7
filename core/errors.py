"""One tree of errors and one list of reason codes.

A *rejection* says that a file is no usable chest X-ray: the fault lies with the file,
running it again changes nothing. A *failure* says that this program or its machine could
not finish. Both leave the file in quarantine with a reason code that stays stable between
versions, since people query for it.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lungwatch.imaging.radiograph import RadiographMeta


class Reason(StrEnum):
    """Reason codes, as recorded in the database and used as folder names in quarantine."""

    # Rejections: the file is at fault.
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    DAMAGED = "damaged"
    NO_PIXEL_DATA = "no_pixel_data"
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    UNSUPPORTED_PIXEL_FORMAT = "unsupported_pixel_format"
    NOT_A_RADIOGRAPH = "not_a_radiograph"
    WRONG_BODY_PART = "wrong_body_part"
    NOT_FRONTAL = "not_frontal"
    NOT_HUMAN = "not_human"
    FOR_PROCESSING = "for_processing"
    MEDIA_DIRECTORY = "media_directory"
    BAD_ARCHIVE = "bad_archive"
    MULTI_FRAME = "multi_frame"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    NO_CONTRAST = "no_contrast"
    # Rejections by the content gate, which looks at the pixels.
    NOT_FRONTAL_CHEST = "not_frontal_chest"
    ROTATED = "rotated"
    INVERTED = "inverted"
    NO_LUNGS = "no_lungs"
    # Failures: this program or the machine is at fault.
    CRASHED_REPEATEDLY = "crashed_repeatedly"
    DECODER_CRASHED = "decoder_crashed"
    DECODER_TIMED_OUT = "decoder_timed_out"
    DECODER_OUT_OF_MEMORY = "decoder_out_of_memory"
    RETRIES_EXHAUSTED = "retries_exhausted"
    FILE_VANISHED = "file_vanished"
    MODEL_CHANGED = "model_changed"
    INTERNAL_ERROR = "internal_error"
    # Done without an answer: there was no image to ask about.
    UNPACKED = "unpacked"


class LungwatchError(Exception):
    """Something went wrong in lungwatch."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class FileRejected(LungwatchError):  # noqa: N818  # a verdict on the file, not a fault
    """The file is not a usable chest X-ray.

    Parameters
    ----------
    reason
        The code that is recorded and that names the quarantine folder.
    message
        One line for a person. It must not hold patient data: it reaches logs.

    Attributes
    ----------
    meta
        What the file says about its image, as far as it could be read: a refused file is
        looked for by its patient and study too. For the database only.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.meta: RadiographMeta | None = None


class ProcessingFailed(LungwatchError):  # noqa: N818  # the counterpart of FileRejected
    """The file could not be processed, through no fault of its own."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TransientError(LungwatchError):
    """A passing trouble (a full disk, a busy file system); trying again may succeed."""


class ConfigError(LungwatchError):
    """The configuration is not valid."""


class HomeError(LungwatchError):
    """A folder that the daemon needs is missing, not writable, or on another file system."""


class ModelError(LungwatchError):
    """The model bundle is missing, damaged, or speaks a contract that is not understood."""


class DatabaseError(LungwatchError):
    """The database cannot be opened, is from a newer version, or is damaged."""


class NotFoundError(LungwatchError):
    """Nothing matches what was asked for."""


class DatasetError(LungwatchError):
    """The data set cannot be used for what was asked."""


class MissingExtraError(LungwatchError):
    """An optional part is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the extra '{extra}': pip install 'lungwatch[{extra}]'")
        self.extra = extra

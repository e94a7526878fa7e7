"""Errors, reason codes and flags, and text from outside made safe to show.

A *rejection* says that a file is not a usable chest X-ray: running it again changes nothing. A
*failure* says that this program or its machine could not finish. Both leave the file in
quarantine with a reason code. Codes are never renamed, since people query for them.
"""

import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from lungwatch.attributes import RadiographMeta


class Flag(StrEnum):
    """Remarks that a result may carry. They never change the answer.

    Each has its code, as recorded in the database, and its meaning for a reader: one clause of at
    most 64 characters (a DICOM code's meaning). docs/flags.md has the rules.
    """

    meaning: str

    def __new__(cls, code: str, meaning: str = "") -> Self:
        """Make a member of its code and its meaning."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    # By the file's attributes.
    VIEW_UNKNOWN = "view_unknown", "the file does not say from which side the X-ray was taken"
    DECUBITUS = "decubitus", "the patient lay on the side (decubitus)"
    BODY_PART_UNKNOWN = (
        "body_part_unknown",
        "the file does not name the chest, or names more than it",
    )
    DESCRIPTION_DISAGREES = (
        "description_disagrees",
        "a description in the file names another view or body part",
    )
    # Corrections of the reader.
    ORIENTATION_CORRECTED = (
        "orientation_corrected",
        "turned or mirrored as Patient Orientation says",
    )
    DEPTH_CORRECTED = "depth_corrected", "stated depth, sign or range was wrong: the pixels decided"
    TABLE_IGNORED = "table_ignored", "a broken look-up table was left out"
    WINDOW_IGNORED = "window_ignored", "a window that belongs to other values was left out"
    FRAME_REMOVED = "frame_removed", "a uniform frame around the X-ray was cut off"
    SHUTTER_APPLIED = "shutter_applied", "what lies outside the display shutter is black"
    SHUTTER_IGNORED = "shutter_ignored", "a display shutter without a sensible shape was left out"
    # By the picture.
    LOW_DETAIL = "low_detail", "the X-ray has less detail than the model was trained on"
    TEXT_BURNT_IN = "text_burnt_in", "letters are burnt into the pixels"
    PARTIAL_LUNGS = (
        "partial_lungs",
        "part of the lungs is outside of the picture, or cannot be found",
    )
    # Refusals of the content gate, where it is set to flag instead.
    NOT_FRONTAL_CHEST = "not_frontal_chest", "the content gate does not see a frontal chest X-ray"
    ROTATED = "rotated", "the content gate sees a turned chest"
    INVERTED = "inverted", "the content gate sees inverted grey values"
    NO_LUNGS = "no_lungs", "the content gate does not find the lungs"
    NOT_GATED = "not_gated", "the model has no content gate: what is shown was not checked"
    # Findings beside the answer.
    OTHER_OPACITY = "other_opacity", "the lungs show an opacity, though no COVID-19 pattern"
    # By the map.
    ATTENTION_OUTSIDE_LUNGS = (
        "attention_outside_lungs",
        "most of the map for COVID lies outside the lungs",
    )
    EMPTY_MAP = "empty_map", "the map is empty: Grad-CAM shows nothing for the answer"


FLAGS: dict[Flag, str] = {flag: flag.meaning for flag in Flag}
"""Meaning of each flag."""


def flags_in_order(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Return flags without repetition, in the order of `Flag`."""
    found = set(flags)
    return tuple(flag for flag in Flag if flag in found)


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
    # Done without an answer.
    UNPACKED = "unpacked"


GATE_REASONS = (Reason.NOT_FRONTAL_CHEST, Reason.ROTATED, Reason.INVERTED, Reason.NO_LUNGS)


class LungwatchError(Exception):
    """Something went wrong in lungwatch."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class FileRejected(LungwatchError):  # noqa: N818  # a verdict on the file, not a fault
    """The file is not a usable chest X-ray.

    Parameters
    ----------
    message
        One line for a person, without patient data: it reaches logs.

    Attributes
    ----------
    meta
        What the file states about its image, as far as it could be read: refused files are
        searched by patient and study too. For the database only.
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
    """A temporary problem (a full disk, a busy file system); trying again may succeed."""


class ConfigError(LungwatchError):
    """The configuration is not valid."""


class HomeError(LungwatchError):
    """A folder that the daemon needs is missing, not writable, or on another file system."""


class ModelError(LungwatchError):
    """The model bundle is missing, damaged, or has a contract that is not understood."""


class DatabaseError(LungwatchError):
    """The database cannot be opened, is from a newer version, or is damaged."""


class NotFoundError(LungwatchError):
    """No match."""


class DatasetError(LungwatchError):
    """The data set cannot be used for this."""


class MissingExtraError(LungwatchError):
    """An optional part is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the extra '{extra}': pip install 'lungwatch[{extra}]'")
        self.extra = extra


def visible(text: str) -> str:
    r"""Return text as one line that cannot control a terminal, spreadsheet or page.

    Control characters, line and paragraph separators, characters that change the direction of
    the text or have no width, and bytes that are not UTF-8 become escapes, as in ``\x1b``.
    Letters, signs and spaces of any script stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text
    )


def _is_harmless(char: str) -> bool:
    # The wide space of Japanese names is not "printable".
    return char.isprintable() or unicodedata.category(char) == "Zs"


def describe(error: Exception) -> str:
    """Describe an expected error, without the file name that an OSError quotes."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def describe_unexpected(error: BaseException) -> str:
    """Describe an unexpected error by type and place: its text may quote patient data."""
    if isinstance(error, LungwatchError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + where

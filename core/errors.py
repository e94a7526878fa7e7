"""Errors, reason codes and flags, and text from outside made safe to show.

A *rejection* says that a file is not a usable chest X-ray: running it again changes nothing. A
*failure* says that this program or its machine could not finish. Both leave the file in
quarantine with a reason code. Codes are never renamed, since people query for them.
"""

import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lungwatch.attributes import RadiographMeta


class Flag(StrEnum):
    """Codes as recorded in the database; `FLAGS` says what each means and when it is set."""

    # What the file says, or does not say.
    VIEW_UNKNOWN = "view_unknown"
    DECUBITUS = "decubitus"
    BODY_PART_UNKNOWN = "body_part_unknown"
    DESCRIPTION_DISAGREES = "description_disagrees"
    # What reading had to mend.
    ORIENTATION_CORRECTED = "orientation_corrected"
    DEPTH_CORRECTED = "depth_corrected"
    TABLE_IGNORED = "table_ignored"
    WINDOW_IGNORED = "window_ignored"
    FRAME_REMOVED = "frame_removed"
    SHUTTER_APPLIED = "shutter_applied"
    SHUTTER_IGNORED = "shutter_ignored"
    # What the picture is like.
    LOW_DETAIL = "low_detail"
    TEXT_BURNT_IN = "text_burnt_in"
    PARTIAL_LUNGS = "partial_lungs"
    # What the content gate would have refused, where it is set to flag instead.
    NOT_FRONTAL_CHEST = "not_frontal_chest"
    ROTATED = "rotated"
    INVERTED = "inverted"
    NO_LUNGS = "no_lungs"
    NOT_GATED = "not_gated"
    # What the model found beside its answer.
    OTHER_OPACITY = "other_opacity"
    # What the map is like.
    ATTENTION_OUTSIDE_LUNGS = "attention_outside_lungs"
    EMPTY_MAP = "empty_map"


FLAGS: dict[Flag, str] = {
    Flag.VIEW_UNKNOWN: "the file does not say from which side the X-ray was taken",
    Flag.DECUBITUS: "the patient lay on the side (decubitus)",
    Flag.BODY_PART_UNKNOWN: "the file does not name the chest, or names more than it",
    Flag.DESCRIPTION_DISAGREES: "a description in the file names another view or body part",
    Flag.ORIENTATION_CORRECTED: "turned or mirrored as Patient Orientation says",
    Flag.DEPTH_CORRECTED: "stated depth, sign or range was wrong: the pixels decided",
    Flag.TABLE_IGNORED: "a broken look-up table was left out",
    Flag.WINDOW_IGNORED: "a window that belongs to other values was left out",
    Flag.FRAME_REMOVED: "a uniform frame around the X-ray was cut off",
    Flag.SHUTTER_APPLIED: "what lies outside the display shutter is black",
    Flag.SHUTTER_IGNORED: "a display shutter without a sensible shape was left out",
    Flag.LOW_DETAIL: "the X-ray has less detail than the model was trained on",
    Flag.TEXT_BURNT_IN: "letters are burnt into the pixels",
    Flag.PARTIAL_LUNGS: "part of the lungs is outside of the picture, or cannot be found",
    Flag.NOT_FRONTAL_CHEST: "the content gate does not see a frontal chest X-ray",
    Flag.ROTATED: "the content gate sees a turned chest",
    Flag.INVERTED: "the content gate sees inverted grey values",
    Flag.NO_LUNGS: "the content gate does not find the lungs",
    Flag.NOT_GATED: "the model has no content gate: what is shown was not checked",
    Flag.OTHER_OPACITY: "the lungs show an opacity, though no COVID-19 pattern",
    Flag.ATTENTION_OUTSIDE_LUNGS: "most of the map for COVID lies outside the lungs",
    Flag.EMPTY_MAP: "the map is empty: Grad-CAM shows nothing for the answer",
}
"""What each flag says to a reader, in one clause of at most 64 characters (a code's meaning)."""


def flags_in_order(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Return flags each once, in the order in which `Flag` lists them."""
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


def visible(text: str) -> str:
    r"""Return text in which nothing steers what shows it, on one line.

    Control characters, line and paragraph separators, characters that turn the direction of
    the text or have no width, and bytes that are no UTF-8 become escapes, as in ``\x1b``.
    Letters, signs and spaces of any script stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text
    )


def _is_harmless(char: str) -> bool:
    # The wide space of Japanese names, for one, is not "printable".
    return char.isprintable() or unicodedata.category(char) == "Zs"


GATE_REASONS = (Reason.NOT_FRONTAL_CHEST, Reason.ROTATED, Reason.INVERTED, Reason.NO_LUNGS)


def describe(error: Exception) -> str:
    """Describe an error that was foreseen, without the file name that an OSError quotes."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def describe_unexpected(error: BaseException) -> str:
    """Say what an unexpected error is, without the texts that may quote patients' data."""
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

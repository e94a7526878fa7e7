"""Flags: the closed list of remarks that a result may carry.

A flag never changes the answer; it tells a reader what to look at before believing it. A code is
never renamed, since people query for it.
"""

from collections.abc import Iterable
from enum import StrEnum


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
    Flag.ATTENTION_OUTSIDE_LUNGS: "most of the map for COVID lies outside the lungs",
    Flag.EMPTY_MAP: "the map is empty: Grad-CAM shows nothing for the answer",
}
"""What each flag says to a reader, in one clause of at most 64 characters (a code's meaning)."""


def in_order(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Return flags each once, in the order in which `Flag` lists them."""
    found = set(flags)
    return tuple(flag for flag in Flag if flag in found)

"""Patient Orientation: turning an image the right way up (PS3.3 C.7.6.1.1.1)."""

import numpy as np
from pydicom.dataset import Dataset

from lungwatch.imaging.attributes import values_of
from lungwatch.imaging.radiograph import FloatImage

# Pairs that a single direction cannot hold both of.
_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
# A direction is named by up to three letters, the main one first.
_MOST_LETTERS = 3
# What a frontal view looks like on a light box: the patient's right at the viewer's left.
UPRIGHT = ("L", "F")


def directions_of(dataset: Dataset) -> tuple[str, str] | None:
    """Return where rows and columns run to, by the main letter of each.

    Returns
    -------
    tuple of str or None
        Direction of the first row and of the first column, one of A, P, L, R, H, F each; None
        where the attribute is absent, empty or no statement (a single value, words, opposites,
        one axis twice).
    """
    sides = values_of(dataset, "PatientOrientation")
    if len(sides) != len(UPRIGHT) or not all(_is_direction(side) for side in sides):
        return None
    row, column = sides[0][0], sides[1][0]
    return None if column in (row, _OPPOSITE[row]) else (row, column)


def is_known(dataset: Dataset) -> bool:
    """Whether a file says which side of a frontal image is the patient's left."""
    directions = directions_of(dataset)
    return directions is not None and not set("AP") & set(directions)


def turn_upright(pixels: FloatImage, dataset: Dataset) -> FloatImage:
    """Turn and mirror an image so that its rows run to the patient's left, its columns down.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns).
    dataset
        The attributes that may hold Patient Orientation. Field of View Rotation and Horizontal
        Flip (0018,7032), (0018,7034) are not looked at: they say what was done to the stored
        pixels already (C.8.11.4).

    Returns
    -------
    numpy.ndarray
        float32, shape (rows, columns) or (columns, rows); `pixels` itself if it is upright, or if
        nothing is said.
    """
    directions = directions_of(dataset)
    if directions is None or directions == UPRIGHT or not is_known(dataset):
        return pixels
    row, column = directions
    turned = pixels
    if row in ("H", "F"):
        turned, (row, column) = turned.T, (column, row)
    if row == "R":
        turned = turned[:, ::-1]
    if column == "H":
        turned = turned[::-1]
    return np.ascontiguousarray(turned)


def _is_direction(side: str) -> bool:
    letters = set(side)
    return (
        0 < len(side) <= _MOST_LETTERS
        and len(letters) == len(side)
        and letters <= set(_OPPOSITE)
        and not any(_OPPOSITE[letter] in letters for letter in letters)
    )

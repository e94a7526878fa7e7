"""Overlay layout: texts, scales and panels, all outside the X-ray."""

from dataclasses import dataclass

from lungwatch.daemon.overlay.column import (
    AMBER,
    LINE_EM,
    SOFT,
    WHITE,
    Box,
    Column,
    Gauge,
    Lines,
    Patch,
    PlacedText,
)
from lungwatch.daemon.overlay.text import MapState, OverlayText

# The text's size, in proportion to the picture's longest side.
_EM_PER_SIDE = 20 / 1024
_EM_PER_SIDE_OF_PAIR = 26 / 1024
_EM_RANGE_PX = (15, 96)
_MIN_WIDTH_EM = 25
_MIN_CELL_EM = 21
_TITLES = ("X-ray", "Grad-CAM for COVID")

# Two panels of three quarters of the side have about as many pixels as one, so that the second
# costs hardly any time; below this side they stay as they are.
_PAIR_SHARE = 0.75
_PAIR_SIDE_PX = 512


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The whole picture's plan.

    Attributes
    ----------
    height, width
        Of the picture, in pixels.
    panels
        Where the X-ray lies: once, or twice of equal size; the last one is under the map.
    gauge, keys
        Scale of probabilities, and the squares that tell its zones' colours.
    bar, ticks
        Colour bar of the map and the columns of its ticks; None and none without a map.
    texts
        The lines, all within the picture and outside of everything else.
    """

    height: int
    width: int
    panels: tuple[Box, ...]
    gauge: Gauge
    keys: tuple[Patch, ...]
    bar: Box | None
    ticks: tuple[int, ...]
    texts: tuple[PlacedText, ...]


def lay_out(
    shape: tuple[int, int], text: OverlayText, *, state: MapState, side_by_side: bool
) -> Layout:
    """Plan an overlay.

    Parameters
    ----------
    shape
        (rows, columns) of the X-ray's preview.
    text
        What is to be said.
    state
        Whether there is a map to draw.
    side_by_side
        Whether the untouched X-ray lies beside the one under the map. Without a map there is
        one panel, since two would be the same.
    """
    is_pair = side_by_side and state == "drawn"
    rows, columns = _of_pair(shape) if is_pair else shape
    share = _EM_PER_SIDE_OF_PAIR if is_pair else _EM_PER_SIDE
    em = round(min(max(max(rows, columns) * share, _EM_RANGE_PX[0]), _EM_RANGE_PX[1]))
    pad = round(0.8 * em)
    cell = max(columns, (_MIN_CELL_EM if is_pair else _MIN_WIDTH_EM) * em)
    lefts = [pad, pad + cell + em] if is_pair else [pad]

    # Of a pair, the left margin says what the answer is, the right one how sure it is and what
    # the map means. Of a single panel, all of it stands in one column.
    lines = Lines(em)
    left = Column(lines, left=lefts[0], width=cell, top=pad)
    right = Column(lines, left=lefts[1], width=cell, top=pad) if is_pair else left
    left.write(text.label, 1.7, WHITE)
    left.write(text.meaning, 1.1, WHITE)
    gauge = right.place_gauge(text)

    top = max(left.top, right.top) + pad // 2
    cells = [Box(top=top, left=one, height=rows, width=cell) for one in lefts]
    if is_pair or text.sides_known:
        titles = _TITLES if is_pair else ("",)
        for box, title in zip(cells, titles, strict=True):
            lines.head(box, columns, title, sides=text.sides_known)
        top += round(LINE_EM * em)
    panels = tuple(
        Box(top=top, left=box.left + (cell - columns) // 2, height=rows, width=columns)
        for box in cells
    )

    left.top = right.top = top + rows + pad
    right.write(text.caption(state), 1.0, WHITE)
    bar, ticks = right.place_bar() if state == "drawn" else (None, ())
    right.write(text.lungs(state), 1.0, WHITE)
    left.top += 0 if is_pair else em // 3
    left.write_remarks(text.remarks)
    left.write(text.origin, 0.9, SOFT)
    left.write(text.note, 1.0, AMBER)
    return Layout(
        height=max(left.top, right.top) + pad,
        width=lefts[-1] + cell + pad,
        panels=panels,
        gauge=gauge,
        keys=tuple(lines.keys),
        bar=bar,
        ticks=ticks,
        texts=tuple(lines.texts),
    )


def _of_pair(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of each of two panels."""
    longest = max(shape)
    side = max(min(longest, _PAIR_SIDE_PX), _PAIR_SHARE * longest)
    rows, columns = (max(1, round(one * side / longest)) for one in shape)
    return rows, columns

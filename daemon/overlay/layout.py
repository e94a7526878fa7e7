"""Where everything in an overlay goes: text in margins above and below, never on the image."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from PIL import ImageFont

from lungwatch.daemon.overlay.text import OverlayText

Colour = tuple[int, int, int]

_WHITE: Colour = (245, 245, 245)
_SOFT: Colour = (190, 190, 190)
_AMBER: Colour = (255, 191, 64)

# The unit of all lengths is the text's size, in proportion to the picture.
_EM_PER_SIDE = 20 / 1024
_EM_RANGE_PX = (14, 96)
_MIN_WIDTH_EM = 25
_BAR_WIDTH_EM = 22
_LINE_EM = 1.3
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle of the picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rectangle as an index of rows and columns."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )


@dataclass(frozen=True, kw_only=True)
class PlacedText:
    """One line of text.

    Attributes
    ----------
    text, size_px, colour
        What is written, and how.
    left, top
        Of the line's box, in pixels.
    """

    text: str
    size_px: int
    colour: Colour
    left: int
    top: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The whole picture's plan.

    Attributes
    ----------
    height, width
        Of the picture, in pixels.
    image, bar
        Where the X-ray and the colour bar lie.
    ticks
        Columns of the colour bar's ticks.
    texts
        The lines, all within the picture and outside of `image` and `bar`.
    """

    height: int
    width: int
    image: Box
    bar: Box
    ticks: tuple[int, ...]
    texts: tuple[PlacedText, ...]


@lru_cache(maxsize=32)
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own scalable font, which every installation has."""
    # Without a size it would be the bitmap font of old.
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size_px))


def lay_out(shape: tuple[int, int], text: OverlayText, *, empty: bool) -> Layout:
    """Plan an overlay.

    Parameters
    ----------
    shape
        (rows, columns) of the X-ray's preview.
    text
        What is to be said.
    empty
        Whether the map has no positive value.
    """
    rows, columns = shape
    em = round(min(max(max(shape) * _EM_PER_SIDE, _EM_RANGE_PX[0]), _EM_RANGE_PX[1]))
    pad = round(0.7 * em)
    width = max(columns, _MIN_WIDTH_EM * em)
    inner = width - 2 * pad

    column = _Column(left=pad, width=inner, top=pad)
    column.write(text.title, round(1.5 * em), _WHITE)
    column.write(text.score, round(1.1 * em), _WHITE)
    image = Box(top=column.top + pad // 2, left=(width - columns) // 2, height=rows, width=columns)

    column.top = image.top + rows + pad
    column.write(text.caption(empty=empty), em, _WHITE)
    column.top += em // 4
    bar = Box(top=column.top, left=pad, height=em, width=min(inner, _BAR_WIDTH_EM * em))
    column.top += round(1.4 * em)
    ticks = column.write_ticks(bar, round(0.8 * em))
    column.top += em // 4
    column.write(text.origin, round(0.9 * em), _SOFT)
    column.write(text.note, em, _AMBER)
    return Layout(
        height=column.top + pad,
        width=width,
        image=image,
        bar=bar,
        ticks=ticks,
        texts=tuple(column.texts),
    )


class _Column:
    """Lines of text one below the other."""

    def __init__(self, *, left: int, width: int, top: int) -> None:
        self.left = left
        self.width = width
        self.top = top
        self.texts: list[PlacedText] = []

    def write(self, text: str, size_px: int, colour: Colour) -> None:
        for line in wrap(text, size_px, self.width):
            self._place(line, size_px, colour, self.left)
            self.top += round(_LINE_EM * size_px)

    def write_ticks(self, bar: Box, size_px: int) -> tuple[int, ...]:
        columns = []
        for value in _TICKS:
            column = bar.left + round(value * (bar.width - 1))
            label = f"{value:g}"
            length = font(size_px).getlength(label)
            # Centred under the ticks, but for the outer labels, which end with the bar.
            share = value if value in (0.0, 1.0) else 0.5
            self._place(label, size_px, _SOFT, round(column - share * length))
            columns.append(column)
        self.top += round(_LINE_EM * size_px)
        return tuple(columns)

    def _place(self, text: str, size_px: int, colour: Colour, left: int) -> None:
        self.texts.append(
            PlacedText(text=text, size_px=size_px, colour=colour, left=left, top=self.top)
        )


def wrap(text: str, size_px: int, width_px: int) -> Iterator[str]:
    """Break a text into lines of at most `width_px`, shortening words that are wider."""
    measure = font(size_px).getlength
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if measure(longer) <= width_px:
            line = longer
            continue
        if line:
            yield line
        line = word if measure(word) <= width_px else _shorten(word, size_px, width_px)
    if line:
        yield line


def _shorten(word: str, size_px: int, width_px: int) -> str:
    measure = font(size_px).getlength
    # Names differ at their ends (versions) as often as at their beginnings: drop the middle.
    for kept in range(len(word) - 1, 0, -1):
        short = f"{word[: (kept + 1) // 2]}…{word[len(word) - kept // 2 :]}"
        if measure(short) <= width_px:
            return short
    return "…"

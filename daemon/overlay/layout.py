"""Overlay layout: texts, scales and panels, all outside the X-ray."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from PIL import ImageFont

from lungwatch.contract import COVID, NEGATIVE, UNCERTAIN, Label
from lungwatch.daemon.overlay.text import MapState, OverlayText

Colour = tuple[int, int, int]
WHITE: Colour = (245, 245, 245)
SOFT: Colour = (170, 170, 175)
AMBER: Colour = (255, 191, 64)
# Blue and orange of Okabe & Ito 2008 with grey between them: distinct with every common colour
# blindness, and by their order alone on a grey printer.
_ZONES = {NEGATIVE: (86, 180, 233), UNCERTAIN: (175, 175, 175), COVID: (230, 159, 0)}
# Dims the zones that the probability is not in.
_DIMMED = 0.45
# The unit of all lengths is the text's size, in pixels.
_SCALE_WIDTH_EM = 24
LINE_EM = 1.3
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_REMARK_LINES = 6


@dataclass(frozen=True, kw_only=True)
class Rectangle:
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

    @property
    def right(self) -> int:
        """The first column beyond it."""
        return self.left + self.width

    @property
    def bottom(self) -> int:
        """The first row beyond it."""
        return self.top + self.height


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
class Patch:
    """A rectangle of one colour."""

    box: Rectangle
    colour: Colour


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """The scale of probabilities from 0 to 1.

    Attributes
    ----------
    box
        The whole scale.
    zones
        Negative, uncertain and COVID, side by side in `box`; two where the model never abstains.
    marker, threshold
        Columns of the probability and of the threshold.
    """

    box: Rectangle
    zones: tuple[Patch, ...]
    marker: int
    threshold: int


@lru_cache(maxsize=32)
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own scalable font, which every installation has."""
    # Without a size it would be the bitmap font of old.
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size_px))


class MarginLines:
    """The texts and keys of all columns."""

    def __init__(self, em: int) -> None:
        self.em = em
        self.texts: list[PlacedText] = []
        self.keys: list[Patch] = []

    def place(self, text: str, size_px: int, colour: Colour, *, left: int, top: int) -> None:
        """Place one line of text."""
        self.texts.append(PlacedText(text=text, size_px=size_px, colour=colour, left=left, top=top))

    def head(self, cell: Rectangle, columns: int, title: str, *, sides: bool) -> None:
        """Write a panel's title and its side markers above it."""
        size = round(0.9 * self.em)
        length = font(size).getlength(title)
        if title:
            left = cell.left + round((cell.width - length) / 2)
            self.place(title, size, SOFT, left=left, top=cell.top)
        if sides:
            # Over the X-ray's own corners, unless it is too narrow for all three.
            needed = round(length) + 4 * self.em
            over = columns if columns >= needed else cell.width
            left = cell.left + (cell.width - over) // 2
            right = left + over - round(font(self.em).getlength("L"))
            self.place("R", self.em, WHITE, left=left, top=cell.top)
            self.place("L", self.em, WHITE, left=right, top=cell.top)


class MarginColumn:
    """A column of text lines."""

    def __init__(self, lines: MarginLines, *, left: int, width: int, top: int) -> None:
        self.top = top
        self._lines = lines
        self._em = lines.em
        self._left = left
        self._width = width

    def write(self, text: str, size_em: float, colour: Colour) -> None:
        """Write a text below the previous one, wrapped."""
        size = round(size_em * self._em)
        for line in wrap(text, size, self._width):
            self._lines.place(line, size, colour, left=self._left, top=self.top)
            self.top += round(LINE_EM * size)

    def write_remarks(self, remarks: tuple[str, ...]) -> None:
        """Write as many remarks as fit, and the number of the others."""
        size = round(0.9 * self._em)
        lines: list[str] = []
        for index, remark in enumerate(remarks):
            left = len(remarks) - index
            wrapped = list(wrap(f"- {remark}", size, self._width))
            room = _MOST_REMARK_LINES - len(lines) - (left > 1)
            if len(wrapped) > room:
                lines.append(f"+ {left} more")
                break
            lines += wrapped
        for line in ("Remarks", *lines) if lines else ():
            self._lines.place(line, size, WHITE, left=self._left, top=self.top)
            self.top += round(LINE_EM * size)
        if lines:
            self.top += self._em // 3

    def place_gauge(self, text: OverlayText) -> Gauge:
        """Place the scale of probabilities, its marker, threshold and key."""
        em = self._em
        self.top += em // 4
        self.write(text.score, 1.1, WHITE)
        self.top += round(0.5 * em)  # the marker stands on the scale
        box = self._scale(round(0.6 * em))
        self.top = box.bottom + round(0.45 * em)
        zones = text.zones
        gauge = Gauge(
            box=box,
            zones=tuple(
                Patch(box=_between(box, low, high), colour=_shade(label, text))
                for label, _, low, high in zones
            ),
            marker=_column_of(box, text.probability),
            threshold=_column_of(box, text.decision.threshold),
        )
        self._label_gauge(gauge, text.threshold)
        self._write_keys(text)
        return gauge

    def place_bar(self) -> tuple[Rectangle, tuple[int, ...]]:
        """Place the colour bar and its ticks."""
        em, size = self._em, round(0.8 * self._em)
        self.top += em // 4
        bar = self._scale(round(0.8 * em))
        self.top = bar.bottom + round(0.35 * em)
        columns = []
        for value in _TICKS:
            column = _column_of(bar, value)
            label = f"{value:g}"
            length = font(size).getlength(label)
            # Centred under the ticks, but for the outer labels, which end with the bar.
            share = value if value in (0.0, 1.0) else 0.5
            left = round(column - share * length)
            self._lines.place(label, size, SOFT, left=left, top=self.top)
            columns.append(column)
        self.top += round(LINE_EM * size) + em // 4
        return bar, tuple(columns)

    def _scale(self, height: int) -> Rectangle:
        width = min(self._width, _SCALE_WIDTH_EM * self._em)
        return Rectangle(top=self.top, left=self._left, height=height, width=width)

    def _label_gauge(self, gauge: Gauge, threshold: str) -> None:
        """Write 0, the threshold and 1 under the scale; the threshold takes precedence."""
        size, box = round(0.8 * self._em), gauge.box
        length = round(font(size).getlength(threshold))
        left = min(max(gauge.threshold - length // 2, box.left), box.right - length)
        end = round(font(size).getlength("0"))
        if left - self._em // 2 >= box.left + end:
            self._lines.place("0", size, SOFT, left=box.left, top=self.top)
        self._lines.place(threshold, size, WHITE, left=left, top=self.top)
        if left + length + self._em // 2 <= box.right - end:
            self._lines.place("1", size, SOFT, left=box.right - end, top=self.top)
        self.top += round(LINE_EM * size)

    def _write_keys(self, text: OverlayText) -> None:
        """Write the key of the zones, side by side as far as there is room."""
        em, size = self._em, round(0.8 * self._em)
        side, left = round(0.6 * self._em), self._left
        for label, words, _, _ in text.zones:
            length = round(1.5 * side + font(size).getlength(words))
            if left > self._left and left + length > self._left + self._width:
                left = self._left
                self.top += round(LINE_EM * size)
            square = Rectangle(top=self.top + round(0.2 * em), left=left, height=side, width=side)
            self._lines.keys.append(Patch(box=square, colour=_shade(label, text)))
            colour = WHITE if label == text.label else SOFT
            start = left + round(1.5 * side)
            self._lines.place(words, size, colour, left=start, top=self.top)
            left += length + em
        self.top += round(LINE_EM * size)


def _column_of(scale: Rectangle, value: float) -> int:
    """Return the pixel column of a value, 0..1, on a scale."""
    return scale.left + round(value * (scale.width - 1))


def _between(scale: Rectangle, low: float, high: float) -> Rectangle:
    """Return the part of a scale between two values, at least a pixel wide."""
    left = min(scale.left + round(low * scale.width), scale.right - 1)
    width = max(1, scale.left + round(high * scale.width) - left)
    return Rectangle(top=scale.top, left=left, height=scale.height, width=width)


def _shade(label: Label, text: OverlayText) -> Colour:
    red, green, blue = _ZONES[label]
    if label == text.label:
        return red, green, blue
    return round(_DIMMED * red), round(_DIMMED * green), round(_DIMMED * blue)


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


# The text's size, in proportion to the picture's longest side.
_EM_PER_SIDE = 20 / 1024
_EM_PER_SIDE_OF_PAIR = 26 / 1024
_EM_RANGE_PX = (15, 96)
_MIN_WIDTH_EM = 25
_MIN_CELL_EM = 21
# Two panels of three quarters of the side have about as many pixels as one, so that the second
# costs hardly any time; below this side they stay as they are.
_PAIR_SHARE = 0.75
_PAIR_SIDE_PX = 512


@dataclass(frozen=True, kw_only=True)
class OverlayLayout:
    """Layout of a whole overlay.

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
    panels: tuple[Rectangle, ...]
    gauge: Gauge
    keys: tuple[Patch, ...]
    bar: Rectangle | None
    ticks: tuple[int, ...]
    texts: tuple[PlacedText, ...]


def lay_out(
    shape: tuple[int, int], text: OverlayText, *, state: MapState, side_by_side: bool
) -> OverlayLayout:
    """Lay out an overlay.

    Parameters
    ----------
    shape
        (rows, columns) of the X-ray's preview.
    text
        Contents of the margins.
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

    # With two panels, the left column has the result, the right one its probability and the map's
    # meaning. With one panel, one column has all.
    lines = MarginLines(em)
    left = MarginColumn(lines, left=lefts[0], width=cell, top=pad)
    right = MarginColumn(lines, left=lefts[1], width=cell, top=pad) if is_pair else left
    left.write(text.title, 1.7, WHITE)
    left.write(text.meaning, 1.1, WHITE)
    gauge = right.place_gauge(text)
    for finding in text.findings:
        is_present = finding.probability >= finding.threshold
        right.write(finding.line, 1.0, WHITE if is_present else SOFT)

    top = max(left.top, right.top) + pad // 2
    cells = [Rectangle(top=top, left=one, height=rows, width=cell) for one in lefts]
    if is_pair or text.sides_known:
        titles = ("X-ray", f"Grad-CAM for {text.mapped}") if is_pair else ("",)
        for box, title in zip(cells, titles, strict=True):
            lines.head(box, columns, title, sides=text.sides_known)
        top += round(LINE_EM * em)
    panels = tuple(
        Rectangle(top=top, left=box.left + (cell - columns) // 2, height=rows, width=columns)
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
    return OverlayLayout(
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

"""Probabilities and their bounds in decimals, rounded so that no reader is misled."""

import math
from collections.abc import Sequence

_DECIMALS = range(3, 9)


def format_score(probability: float, bounds: Sequence[float]) -> tuple[str, tuple[str, ...]]:
    """Write a probability and its bounds so that neither rounding nor brevity misleads.

    A probability is never rounded to 0 or 1 ("< 0.001", "> 0.999"), and all get as many decimals
    as it takes, from three, for the printed values to lie on the same sides of each other as the
    real ones: 0.4998 against 0.5 is not printed as 0.500.

    Parameters
    ----------
    probability, bounds
        0..1.

    Returns
    -------
    str, tuple of str
        The probability and the bounds, with equally many decimals.
    """
    shown, printed = "", tuple[str, ...]()
    for decimals in _DECIMALS:
        shown, low, high = _shown(probability, decimals)
        printed = tuple(f"{bound:.{decimals}f}" for bound in bounds)
        if all(
            _is_told(probability, bound, low, high, float(text))
            for bound, text in zip(bounds, printed, strict=True)
        ):
            break
    return shown, printed


def _is_told(probability: float, bound: float, low: float, high: float, printed: float) -> bool:
    """Whether a reader sees on which side of a bound a probability lies.

    `low` and `high` bound what the printed probability can be taken for.
    """
    if bound in (0.0, 1.0):
        return True  # nothing lies beyond
    if printed in (0.0, 1.0):
        return False
    return low >= printed if probability >= bound else high < printed


def _shown(probability: float, decimals: int) -> tuple[str, float, float]:
    step = 10.0**-decimals
    text = f"{probability:.{decimals}f}"
    if float(text) == 0.0:
        return f"< {step:.{decimals}f}", 0.0, math.nextafter(step, 0.0)
    if float(text) == 1.0:
        bound = f"{1.0 - step:.{decimals}f}"
        return f"> {bound}", float(bound), 1.0
    return text, float(text), float(text)


def decimal_score(probability: float, bounds: Sequence[float]) -> tuple[str, tuple[str, ...]]:
    """Write a probability and its bounds as plain numbers, where no sign can stand before them.

    Three decimals, and more only where three would put the probability on another side of a
    bound, or would make a 0 or 1 of it that it is not.

    Parameters
    ----------
    probability, bounds
        0..1.

    Returns
    -------
    str, tuple of str
        The probability and the bounds, with equally many decimals.
    """
    shown, printed = "", tuple[str, ...]()
    for decimals in _DECIMALS:
        shown = f"{probability:.{decimals}f}"
        printed = tuple(f"{bound:.{decimals}f}" for bound in bounds)
        is_end = float(shown) in (0.0, 1.0) and float(shown) != probability
        if not is_end and all(
            (probability >= bound) == (float(shown) >= float(text))
            for bound, text in zip(bounds, printed, strict=True)
        ):
            break
    return shown, printed

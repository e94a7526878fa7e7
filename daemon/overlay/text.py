"""What an overlay says in words: nothing about the patient, everything about the model."""

import math
from dataclasses import dataclass

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import Label

CLASS_NAMES = ("NEGATIVE", "COVID")
_SHORT_HASH = 12
_DECIMALS = range(3, 9)


@dataclass(frozen=True, kw_only=True)
class OverlayText:
    """What stands in an overlay's margins.

    Attributes
    ----------
    label
        What the model's decision made of the probability.
    probability, threshold
        Of COVID, 0..1: as the model said, and from which on the label is COVID.
    model
        The model's identity, "name-version".
    sha256
        Digest of the file's content in hexadecimal; twelve digits of it are shown.
    note
        What the picture must not be taken for.
    """

    label: Label
    probability: float
    threshold: float
    model: str
    sha256: str
    note: str = RESEARCH_USE_ONLY

    def __post_init__(self) -> None:
        for name in ("probability", "threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, not within 0..1")

    @property
    def title(self) -> str:
        """The label, and what it means where that is no common word."""
        return "UNCERTAIN: the model abstains" if self.label == "UNCERTAIN" else self.label

    @property
    def score(self) -> str:
        """Probability and threshold."""
        probability, threshold = format_score(self.probability, self.threshold)
        sign = "" if probability[0] in "<>" else "= "
        return f"P(COVID) {sign}{probability}, threshold {threshold}"

    @property
    def origin(self) -> str:
        """The model and the picture, as short as they can be told apart."""
        return f"Model {self.model}, image {self.sha256[:_SHORT_HASH]}"

    def caption(self, *, empty: bool) -> str:
        """Which class the map explains; `empty` for a map without any positive value."""
        name = CLASS_NAMES[shown_class(self.label)]
        if empty:
            return f"Grad-CAM for {name}: no positive evidence in this image"
        return f"Grad-CAM for {name}, relative to the strongest evidence in this image"


def shown_class(label: Label) -> int:
    """Return the index of the class whose map explains a label: 0 NEGATIVE, 1 COVID.

    The map is that of the class decided for. For UNCERTAIN it is COVID's: someone will have
    to look for it.
    """
    return 0 if label == "NEGATIVE" else 1


def format_score(probability: float, threshold: float) -> tuple[str, str]:
    """Write probability and threshold so that neither rounding nor brevity misleads.

    A probability is never rounded to 0 or 1 ("< 0.001", "> 0.999"), and both get as many
    decimals as it takes, from three, for the printed values to lie on the same sides of each
    other as the real ones: 0.4998 against 0.5 is not printed as 0.500.

    Parameters
    ----------
    probability, threshold
        0..1.

    Returns
    -------
    tuple of str
        The two, with equally many decimals.
    """
    pair = ("", "")
    for decimals in _DECIMALS:
        shown, low, high = _shown(probability, decimals)
        pair = shown, f"{threshold:.{decimals}f}"
        printed = float(pair[1])
        if printed in (0.0, 1.0) and printed != threshold:
            continue
        # `low` and `high` bound what a reader can take the printed probability for.
        if (low >= printed) if probability >= threshold else (high < printed):
            break
    return pair


def _shown(probability: float, decimals: int) -> tuple[str, float, float]:
    step = 10.0**-decimals
    text = f"{probability:.{decimals}f}"
    if float(text) == 0.0:
        return f"< {step:.{decimals}f}", 0.0, math.nextafter(step, 0.0)
    if float(text) == 1.0:
        bound = f"{1.0 - step:.{decimals}f}"
        return f"> {bound}", float(bound), 1.0
    return text, float(text), float(text)

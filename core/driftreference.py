"""Drift reference of a bundle, `drift.json`: how a model's training population is distributed.

It holds no picture and nothing of a person: distributions of a few figures, counts of tags, and
the axes by which an embedding is reduced to a few components.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ModelError
from lungwatch.twosample import Distribution

FORMAT = 1
COMPONENTS = 8
MOST_COMPONENTS = 16
GATE_ACCEPTED = "accepted"
"""Value of the tag `gate` for what the content gate does not refuse."""
_DIGITS = 6
_PLACES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class DriftReference:
    """A reference population, and how embeddings are reduced.

    Attributes
    ----------
    source
        Data set and split: "open-cxr/val".
    centre
        float32, (n,): mean embedding.
    axes
        float32, (k, n), k <= 16: principal axes (Pearson 1901), each divided by the standard
        deviation along it, so that components have mean 0 and variance 1.
    values
        Distributions by figure: `logit`, `gate_score`, `lung_area`, `lung_share`,
        `component_1`…, `embedding_distance`; those that could be measured.
    tags
        Counts by tag and value, of tags that the data set tells.
    """

    source: str
    centre: NDArray[np.float32]
    axes: NDArray[np.float32]
    values: Mapping[str, Distribution]
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def components(self, embedding: NDArray[np.float32]) -> list[float] | None:
        """Reduce an embedding, (n,), to k numbers; None for one that holds what is none."""
        reduced = self.axes.astype(np.float64) @ (embedding.astype(np.float64) - self.centre)
        if not np.isfinite(reduced).all():
            return None
        return [round(float(value), _PLACES) for value in reduced]

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(
            {
                "drift": FORMAT,
                "source": self.source,
                "centre": _rounded(self.centre),
                "axes": [_rounded(axis) for axis in self.axes],
                "values": {
                    name: {"count": one.count, "values": _rounded(one.values)}
                    for name, one in self.values.items()
                },
                "tags": {name: dict(counts) for name, counts in self.tags.items()},
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, data: bytes, embedding_size: int | None = None) -> Self:
        """Read the file.

        Parameters
        ----------
        data
            UTF-8.
        embedding_size
            That of the model beside it; None where nothing is to be reduced.

        Raises
        ------
        ModelError
            If it is of another format, damaged, or for another embedding.
        """
        try:
            found = json.loads(data.decode("utf-8"))
            if found["drift"] != FORMAT:
                raise ModelError(
                    f"drift.json has the format {found['drift']}, this program reads {FORMAT}: "
                    "install the lungwatch release that the model was made for"
                )
            reference = cls(
                source=str(found["source"]),
                centre=np.array(found["centre"], dtype=np.float32),
                axes=np.array(found["axes"], dtype=np.float32),
                values={str(name): _distribution(one) for name, one in found["values"].items()},
                tags={
                    str(name): {str(value): int(count) for value, count in counts.items()}
                    for name, counts in found["tags"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError("drift.json is not understood") from error
        reference.check(reference.centre.size if embedding_size is None else embedding_size)
        return reference

    def check(self, embedding_size: int) -> None:
        """Refuse a reference that does not fit the model's embedding.

        Raises
        ------
        ModelError
            If it does not, or holds what is no number.
        """
        shape = self.axes.shape
        if len(shape) != 2 or not 1 <= shape[0] <= MOST_COMPONENTS or shape[1] != embedding_size:
            raise ModelError(
                f"drift.json has axes of the shape {shape}, not 1 to {MOST_COMPONENTS} of "
                f"{embedding_size}: it is of another model"
            )
        if self.centre.shape != (embedding_size,):
            raise ModelError("drift.json has a centre of another embedding")
        if not (np.isfinite(self.axes).all() and np.isfinite(self.centre).all()):
            raise ModelError("drift.json holds an axis that is no number")


def embedding_distance(components: list[float]) -> float:
    """Return the distance from the reference's centre, in standard deviations (Mahalanobis)."""
    return math.sqrt(sum(value * value for value in components))


def figures_of(
    *,
    logit: float | None,
    gate_score: float | None,
    lung_area: float | None,
    lung_share: float | None,
    components: list[float] | None,
) -> dict[str, float]:
    """Return the figures of one result that drift is told from, by name, as far as known."""
    figures = {
        "logit": logit,
        "gate_score": gate_score,
        "lung_area": lung_area,
        "lung_share": lung_share,
    }
    if components:
        figures |= {f"component_{i}": value for i, value in enumerate(components, 1)}
        figures["embedding_distance"] = embedding_distance(components)
    return {
        name: value for name, value in figures.items() if value is not None and math.isfinite(value)
    }


def _distribution(found: Mapping[str, Any]) -> Distribution:
    values = np.array(found["values"], dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("a distribution is a list of numbers")
    return Distribution(count=int(found["count"]), values=np.sort(values))


def _rounded(values: NDArray[np.float32] | NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]

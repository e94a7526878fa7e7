"""Label map: which finding the labels of a data set mean, and which labels are not used."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.samples import FINDINGS, Finding

IGNORE = "ignore"
OPTION = "--label-map"
_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """What the labels mean that are no finding by their own name.

    Attributes
    ----------
    meanings
        Label -> finding; None where images with the label are left out. A label of a manifest's
        row, or the path of a class folder relative to the data set or to its split, as
        "PNEUMONIA" or "COVID/images". Findings may be mapped, too.
    """

    meanings: Mapping[str, Finding | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read "LABEL=FINDING" and "LABEL=ignore".

        Raises
        ------
        ConfigError
            If one is neither, or a label has two meanings.
        """
        meanings: dict[str, Finding | None] = {}
        for text in texts:
            label, equals, meaning = text.rpartition("=")
            if not equals or meaning not in (*FINDINGS, IGNORE):
                raise ConfigError(
                    f"{OPTION} {text!r} is neither LABEL={'|'.join(FINDINGS)} nor LABEL={IGNORE}"
                )
            found = None if meaning == IGNORE else cast("Finding", meaning)
            if meanings.setdefault(label, found) != found:
                raise ConfigError(f"{OPTION}: {label!r} has two meanings")
        return cls(meanings=meanings)

    def knows(self, label: str) -> bool:
        """Whether the label is a finding or is mapped."""
        return label in self.meanings or label in FINDINGS

    def finding(self, label: str) -> Finding | None:
        """Return what a known label means; None for one whose images are left out."""
        if label in self.meanings:
            return self.meanings[label]
        return cast("Finding", label)

    def to_dict(self) -> dict[str, str]:
        """Return label -> finding or "ignore", sorted."""
        return {label: meaning or IGNORE for label, meaning in sorted(self.meanings.items())}


@dataclass(frozen=True, kw_only=True)
class LabelCount:
    """How many images of a data set have which label, by what becomes of them.

    Attributes
    ----------
    mapped
        Images by label, of labels that the map gives a finding.
    ignored
        Images by label, of labels that the map leaves out.
    unknown
        Images by label, of labels that are no finding and are not mapped.
    """

    mapped: Mapping[str, int]
    ignored: Mapping[str, int]
    unknown: Mapping[str, int]

    @classmethod
    def of(cls, labels: Sequence[str], label_map: LabelMap) -> Self:
        """Count the labels of a data set's images."""
        mapped, ignored, unknown = Counter[str](), Counter[str](), Counter[str]()
        for label in labels:
            if not label_map.knows(label):
                unknown[label] += 1
            elif label_map.finding(label) is None:
                ignored[label] += 1
            elif label in label_map.meanings:
                mapped[label] += 1
        return cls(mapped=dict(mapped), ignored=dict(ignored), unknown=dict(unknown))

    def lines(self) -> list[str]:
        """Name and count the labels that are not used, a line each; empty if there are none."""
        return [*self.unknown_lines(), *self.ignored_lines()]

    def unknown_lines(self) -> list[str]:
        """Name and count the labels that are no finding and not mapped."""
        return [
            f"label {label!r}: {n} images not used: no finding and not in {OPTION}"
            for label, n in self._unknown()
        ]

    def ignored_lines(self) -> list[str]:
        """Name and count the labels that the map leaves out."""
        return [
            f"label {label!r}: {n} images left out, as {OPTION} says"
            for label, n in sorted(self.ignored.items())
        ]

    def require_known(self, what: str) -> None:
        """Refuse labels that nothing is known of: what they are is for the user to say.

        Raises
        ------
        DatasetError
            If there are any; they are named and counted.
        """
        if not self.unknown:
            return
        unknown = self._unknown()
        named = ", ".join(f"{label!r} ({n} images)" for label, n in unknown[:_NAMED])
        if len(unknown) > _NAMED:
            named += f" and {len(unknown) - _NAMED} more"
        first = unknown[0][0]
        near = difflib.get_close_matches(first.upper(), FINDINGS, n=1, cutoff=0.5)
        raise DatasetError(
            f"{what}: unknown label {named}: not one of {', '.join(FINDINGS)}; say what it is, "
            f"with {OPTION} '{first}={near[0] if near else 'OTHER_PNEUMONIA'}' or "
            f"'{first}={IGNORE}'"
        )

    def _unknown(self) -> list[tuple[str, int]]:
        return sorted(self.unknown.items())

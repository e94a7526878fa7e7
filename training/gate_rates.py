"""Rates of a content gate over folders of pictures: by folder, reason and turned copy."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.gate import GateContract, Verdict
from lungwatch.imaging import read_radiograph
from lungwatch.imaging.dicomfile import is_dicom
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.raster import is_raster
from lungwatch.lungfield import area_of, lung_mask
from lungwatch.preprocess import preprocess

AS_IS = "as it is"
VARIANTS: dict[str, Callable[[FloatImage], FloatImage]] = {
    AS_IS: lambda pixels: pixels,
    "turned by 90°": lambda pixels: np.rot90(pixels, 1).copy(),
    "turned by 180°": lambda pixels: np.rot90(pixels, 2).copy(),
    "turned by 270°": lambda pixels: np.rot90(pixels, 3).copy(),
    "inverted": lambda pixels: 1.0 - pixels,
}
"""The copies that are looked at; turned counter-clockwise."""
_HEAD_BYTES = 132
_AT_ONCE = 32


class Answer(Protocol):
    """What a gate says of one picture."""

    @property
    def verdict(self) -> Verdict:
        """Whether it passes."""

    @property
    def lungs(self) -> NDArray[np.float32]:
        """float32, shape (side, side), 0..1: each cell's probability of being lung."""


class Gate(Protocol):
    """A content gate that can be asked."""

    @property
    def contract(self) -> GateContract:
        """How its input is made and its answer read."""

    def run(self, batch: NDArray[np.float32]) -> Sequence[Answer]:
        """Look at pictures, float32 (n, side, side, 1), 0..1."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What became of one picture.

    Attributes
    ----------
    folder
        That of its file, from the folder that was named on.
    file
        Path below that folder.
    variant
        One of `VARIANTS`.
    reason
        Why it was refused, by the reader or by the gate; None if it was kept.
    check, score
        The check that decided, and its score, 0..1; None where the reader refused.
    lung_area
        Share of the picture that is lung, 0..1; None likewise.
    """

    folder: str
    file: str
    variant: str
    reason: str | None
    check: str | None = None
    score: float | None = None
    lung_area: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Kept and refused pictures of one folder, or of all.

    Attributes
    ----------
    folder, variant
        See `Looked`.
    pictures, kept
        Numbers of pictures.
    refused_by_reader, refused_by_gate
        Reason -> number of pictures, the most frequent first.
    """

    folder: str
    variant: str
    pictures: int
    kept: int
    refused_by_reader: dict[str, int] = field(default_factory=dict)
    refused_by_gate: dict[str, int] = field(default_factory=dict)

    @property
    def kept_share(self) -> float:
        """Share of the pictures that were kept, 0..1."""
        return self.kept / self.pictures

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with both shares."""
        shares = {
            "kept_share": round(self.kept_share, 6),
            "refused_share": round(1.0 - self.kept_share, 6),
        }
        return {**asdict(self), **shares}


def image_files(folder: Path) -> list[Path]:
    """Return the DICOM, PNG and JPEG files below a folder, by their content, in order.

    Raises
    ------
    DatasetError
        If there are none, or a file cannot be read.
    """
    try:
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_image(path)]
    except OSError as error:
        raise DatasetError(f"{error.filename or folder}: {error.strerror}") from error
    if not found:
        raise DatasetError(f"{folder}: no DICOM, PNG or JPEG file in it")
    return found


def look_at(
    gate: Gate,
    folder: Path,
    files: Sequence[Path],
    *,
    variants: Sequence[str] = (AS_IS,),
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[Looked]:
    """Read pictures as the daemon does and ask the gate.

    Parameters
    ----------
    gate
        The gate.
    folder, files
        A folder and the files below it, as `image_files` returns them.
    variants
        Keys of `VARIANTS`, first `AS_IS`. What the reader refuses has no other copies.
    workers
        Decoding threads.
    progress
        Called with 1 after each file.
    """
    looked: list[Looked] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        # A few at a time: full-size pixels of a whole folder would fill the memory.
        for start in range(0, len(files), _AT_ONCE):
            chunk = files[start : start + _AT_ONCE]
            for path, pixels in zip(chunk, pool.map(_read, chunk), strict=True):
                looked.extend(_asked(gate, folder, path, pixels, variants))
                if progress:
                    progress(1)
    return looked


def rates(looked: Sequence[Looked]) -> list[Rate]:
    """Count by folder and variant, in order, and for more than one folder of all together."""
    by_place: dict[tuple[str, str], list[Looked]] = defaultdict(list)
    for one in looked:
        by_place[one.folder, one.variant].append(one)
    found = [_rate(*place, ones) for place, ones in by_place.items()]
    if len({one.folder for one in looked}) > 1:
        found.extend(
            _rate("all", variant, [one for one in looked if one.variant == variant])
            for variant in dict.fromkeys(one.variant for one in looked)
        )
    return found


def _rate(folder: str, variant: str, looked: Sequence[Looked]) -> Rate:
    reasons: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for one in looked:
        if one.reason is not None:
            reasons[one.check is not None][one.reason] += 1
    return Rate(
        folder=folder,
        variant=variant,
        pictures=len(looked),
        kept=sum(one.reason is None for one in looked),
        refused_by_reader=dict(reasons[False].most_common()),
        refused_by_gate=dict(reasons[True].most_common()),
    )


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return is_raster(head) or is_dicom(head)


def _read(path: Path) -> FloatImage | str:
    """Return a picture's pixels, or the reason for which the reader refuses it."""
    try:
        return read_radiograph(path).pixels
    except FileRejected as error:
        return error.reason.value
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error


def _asked(
    gate: Gate, folder: Path, path: Path, pixels: FloatImage | str, variants: Sequence[str]
) -> Iterator[Looked]:
    place = Path(folder.resolve().name) / path.parent.relative_to(folder)
    name = str(path.relative_to(folder))
    if isinstance(pixels, str):
        yield Looked(folder=str(place), file=name, variant=AS_IS, reason=pixels)
        return
    spec = gate.contract.preprocess
    copies = {variant: VARIANTS[variant](pixels) for variant in variants}
    answers = gate.run(np.stack([preprocess(copy, spec) for copy in copies.values()]))
    for (variant, copy), answer in zip(copies.items(), answers, strict=True):
        verdict = answer.verdict
        mask = lung_mask(answer.lungs, (copy.shape[0], copy.shape[1]), spec)
        yield Looked(
            folder=str(place),
            file=name,
            variant=variant,
            reason=None if verdict.reason is None else verdict.reason.value,
            check=verdict.check,
            score=verdict.score,
            lung_area=area_of(mask),
        )

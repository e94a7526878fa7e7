"""Scan of a data set: each file read once, its statistics cached, and their summary."""

import hashlib
import io
import json
import secrets
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch import __version__
from lungwatch.errors import DatasetError, FileRejected
from lungwatch.files import make_dirs, write_atomic
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import letters_in_line
from lungwatch.training.data.dataset import LabelCount, Sample
from lungwatch.training.data.pixels import FloatArray

THUMBNAIL_PX = 64
HISTOGRAM_BINS = 32
# Pixels of the copy that is looked at; letters of a radiograph stay legible at this size.
_SIDE_PX = 512
_FLAT = 0.02  # standard deviation of a row or column that shows nothing
_ARRAYS = ("histogram", "thumbnail")
_PER_BLOCK = 100
# Iglewicz & Hoaglin 1993: modified z-scores beyond 3.5 are potential outliers.
_MAX_ROBUST_Z = 3.5
_MEASURES = ("mean", "std", "p01", "p50", "p99")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScannedImage:
    """Statistics and thumbnail of one readable file.

    Attributes
    ----------
    sample
        The file and its label.
    sha256
        Of the file's bytes.
    format
        "DICOM", "PNG" or "JPEG".
    rows, columns
        Size of the stored image, in pixels.
    mean, std, p01, p50, p99
        Of the grey values, 0..1.
    border
        Share of the area that is blank margin, 0..1.
    text_marks
        Letters of the longest line of burnt-in text.
    histogram
        float32, shape (32,), shares of the grey values, summing to 1.
    thumbnail
        float32, shape (64, 64), 0..1, stretched to the square.
    patient_id
        Of the DICOM header; None without. Not to be written anywhere.
    """

    sample: Sample
    sha256: str
    format: str
    rows: int
    columns: int
    mean: float
    std: float
    p01: float
    p50: float
    p99: float
    border: float
    text_marks: int
    histogram: FloatArray
    thumbnail: FloatArray
    patient_id: str | None


def reduced(pixels: FloatImage) -> FloatImage:
    """Return the image with its longest side at most 512 px, aspect kept, float32 0..1."""
    rows, columns = pixels.shape
    scale = min(1.0, _SIDE_PX / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def border_fraction(pixels: FloatImage) -> float:
    """Return the share of the area, 0..1, in rows and columns at the edges that show nothing.

    Parameters
    ----------
    pixels
        float32, shape (rows, columns), 0..1.
    """
    rows = np.flatnonzero(pixels.std(axis=1) > _FLAT)
    columns = np.flatnonzero(pixels.std(axis=0) > _FLAT)
    if not len(rows) or not len(columns):
        return 1.0
    shown = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return 1.0 - float(shown) / pixels.size


_VALUES = tuple(f.name for f in fields(ScannedImage) if f.name not in ("sample", *_ARRAYS))


class ScanCache:
    """Cache of scans by file, size and time of change, written in blocks.

    It holds thumbnails of X-rays: it is to be kept as safe as the data set. A header's patient
    ID is replaced by a keyed digest, which still tells patients apart.

    Parameters
    ----------
    folder
        Where the blocks are; made if it is missing. A damaged block, or one of another version
        of lungwatch, is left unread.
    """

    def __init__(self, folder: Path) -> None:
        make_dirs(folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._fresh: dict[str, ScannedImage] = {}
        self._known: dict[str, dict[str, Any]] = {}
        salt = folder / "salt"
        if not salt.is_file():
            write_atomic(salt, secrets.token_bytes(32))
        self._salt = salt.read_bytes()
        self._blocks = 0
        for block in sorted(folder.glob("*.npz")):
            self._blocks = max(self._blocks, int(block.stem) if block.stem.isdigit() else 0)
            self._load(block)

    def key(self, sample: Sample) -> str:
        """Return a key of the file's present state; call it before the file is read.

        Raises
        ------
        OSError
            If the file is gone.
        """
        state = sample.path.stat()
        return f"{state.st_size} {state.st_mtime_ns} {sample.path.absolute()}"

    def find(self, key: str, sample: Sample) -> ScannedImage | None:
        """Return the cached scan of a file that has not changed since; None without one."""
        values = self._known.get(key)
        return ScannedImage(sample=sample, **values) if values else None

    def keep(self, key: str, item: ScannedImage) -> ScannedImage:
        """Cache a scan; return it as `find` will."""
        if item.patient_id:
            digest = hashlib.blake2b(item.patient_id.encode(), key=self._salt, digest_size=12)
            item = replace(item, patient_id=digest.hexdigest())
        with self._lock:
            self._fresh[key] = item
            if len(self._fresh) >= _PER_BLOCK:
                self._flush()
        return item

    def flush(self) -> None:
        """Write the cached scans that are not yet written."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._fresh:
            return
        scans = list(self._fresh.values())
        about = {
            "version": __version__,
            "keys": list(self._fresh),
            "values": [{name: getattr(item, name) for name in _VALUES} for item in scans],
        }
        data = io.BytesIO()
        arrays = {name: np.stack([getattr(item, name) for item in scans]) for name in _ARRAYS}
        arrays["about"] = np.array(json.dumps(about))
        np.savez(data, **arrays)  # type: ignore[arg-type]  # none is named allow_pickle
        self._blocks += 1
        write_atomic(self._folder / f"{self._blocks:05d}.npz", data.getvalue())
        self._fresh.clear()

    def _load(self, block: Path) -> None:
        try:
            with np.load(block, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name: file[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return
        if about["version"] != __version__:
            return
        for index, (key, values) in enumerate(zip(about["keys"], about["values"], strict=True)):
            self._known[key] = values | {name: arrays[name][index] for name in _ARRAYS}


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file that the reader refuses, and why."""

    sample: Sample
    reason: str


def scan(
    samples: Sequence[Sample],
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    cache: ScanCache | None = None,
) -> tuple[list[ScannedImage], list[Unreadable]]:
    """Read every file through the daemon's reader, in the order of `samples`.

    Parameters
    ----------
    samples
        Files to read.
    workers
        Decoding threads.
    cache
        Cache of an earlier scan; files that have not changed since are not read again.
    """
    scans: list[ScannedImage] = []
    unreadable: list[Unreadable] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for found in pool.map(lambda sample: _scan_cached(sample, cache), samples):
            if isinstance(found, ScannedImage):
                scans.append(found)
            else:
                unreadable.append(found)
            if progress:
                progress(1)
    finally:
        # After an interruption the finished scans are kept and no new file is read.
        pool.shutdown(cancel_futures=True)
        if cache:
            cache.flush()
    return scans, unreadable


def require_readable(unreadable: Sequence[Unreadable]) -> None:
    """Refuse a data set with files that cannot be read.

    Raises
    ------
    DatasetError
        If there are any; the first is named.
    """
    if unreadable:
        first, more = unreadable[0], len(unreadable) - 1
        others = f" (and {more} more; `lungwatch dataset check` lists them)" if more else ""
        raise DatasetError(f"{first.sample.path}: {first.reason}{others}")


def _scan_cached(sample: Sample, cache: ScanCache | None) -> ScannedImage | Unreadable:
    if cache is None:
        return _scan_file(sample)
    try:
        key = cache.key(sample)
    except OSError:  # gone: reading it says so
        return _scan_file(sample)
    known = cache.find(key, sample)
    if known is not None:
        return known
    found = _scan_file(sample)
    return cache.keep(key, found) if isinstance(found, ScannedImage) else found


def _scan_file(sample: Sample) -> ScannedImage | Unreadable:
    try:
        digest = hashlib.sha256(sample.path.read_bytes()).hexdigest()
        radiograph = read_radiograph(sample.path)
    except (FileRejected, OSError) as error:
        return Unreadable(sample=sample, reason=str(error))
    pixels, meta = radiograph.pixels, radiograph.meta
    small = reduced(pixels)
    counts, _ = np.histogram(pixels, bins=HISTOGRAM_BINS, range=(0.0, 1.0))
    p01, p50, p99 = (float(value) for value in np.percentile(small, (1, 50, 99)))
    side = (THUMBNAIL_PX, THUMBNAIL_PX)
    thumbnail = cv2.resize(pixels, side, interpolation=cv2.INTER_AREA)
    return ScannedImage(
        sample=sample,
        sha256=digest,
        format=meta.format,
        rows=meta.rows,
        columns=meta.columns,
        mean=float(pixels.mean(dtype=np.float64)),
        std=float(pixels.std(dtype=np.float64)),
        p01=p01,
        p50=p50,
        p99=p99,
        border=border_fraction(small),
        text_marks=letters_in_line(cv2.convertScaleAbs(small, alpha=255.0).astype(np.uint8)),
        histogram=(counts / pixels.size).astype(np.float32),
        thumbnail=np.asarray(thumbnail, dtype=np.float32),
        patient_id=meta.patient_id,
    )


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """Grey values (0..1) of one split and class; every image weighs the same.

    Attributes
    ----------
    split, finding
        The group; "all" for everything.
    images
        Number of images.
    mean, std
        Of all the pixels together.
    mean_of_means, std_of_means
        How the images' own means are distributed.
    mean_of_stds, std_of_stds
        How the images' own standard deviations are distributed.
    """

    split: str
    finding: str
    images: int
    mean: float
    std: float
    mean_of_means: float
    std_of_means: float
    mean_of_stds: float
    std_of_stds: float


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An image whose grey values are unlike the others'.

    Attributes
    ----------
    file
        The image.
    measure
        What is furthest off: mean, std, or a percentile.
    value
        Its value, 0..1.
    robust_z
        Its distance from the median in robust standard deviations.
    """

    file: Path
    measure: str
    value: float
    robust_z: float


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """A data set in numbers.

    Attributes
    ----------
    location
        The folder or manifest.
    files
        Number of files listed.
    distribution
        Split -> finding -> number of files.
    sources
        "source/FINDING" -> number of files.
    formats, sizes
        Format, and "COLUMNSxROWS" (the twenty commonest), -> number of images.
    size_range
        Smallest and largest width and height, in pixels.
    statistics
        By split and class, the whole and its classes first.
    outliers
        The furthest off first.
    unreadable
        File -> reason.
    unused_labels
        Labels and class folders whose images are not among the files, each with their number.
    """

    location: Path
    files: int
    distribution: Mapping[str, Mapping[str, int]]
    sources: Mapping[str, int]
    formats: Mapping[str, int]
    sizes: Mapping[str, int]
    size_range: Mapping[str, int]
    statistics: Sequence[PixelStatistics]
    outliers: Sequence[Outlier]
    unreadable: Mapping[str, str]
    unused_labels: Sequence[str] = ()


def explore(
    location: Path,
    samples: Sequence[Sample],
    scans: Sequence[ScannedImage],
    unreadable: Sequence[Unreadable],
    labels: LabelCount | None = None,
) -> Exploration:
    """Summarise a data set that has been scanned."""
    distribution: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        distribution[sample.split or "unsplit"][sample.finding] += 1
    widths, heights = [item.columns for item in scans], [item.rows for item in scans]
    return Exploration(
        location=location,
        files=len(samples),
        distribution={split: dict(counts) for split, counts in distribution.items()},
        sources=dict(Counter(f"{s.source or 'unknown'}/{s.finding}" for s in samples)),
        formats=dict(Counter(item.format for item in scans)),
        sizes=dict(Counter(f"{item.columns}x{item.rows}" for item in scans).most_common(20)),
        size_range={
            "width_min_px": min(widths, default=0),
            "width_max_px": max(widths, default=0),
            "height_min_px": min(heights, default=0),
            "height_max_px": max(heights, default=0),
        },
        statistics=_by_group(scans),
        outliers=find_outliers(scans),
        unreadable={str(bad.sample.path): bad.reason for bad in unreadable},
        unused_labels=labels.lines() if labels else [],
    )


def per_image(scans: Sequence[ScannedImage]) -> list[dict[str, object]]:
    """List what was measured of each image, for a table."""
    return [
        {
            "file": str(item.sample.path),
            "split": item.sample.split or "",
            "label": item.sample.finding,
            "source": item.sample.source,
            "format": item.format,
            "width_px": item.columns,
            "height_px": item.rows,
            **{name: round(getattr(item, name), 6) for name in _MEASURES},
            "border": round(item.border, 4),
            "text_marks": item.text_marks,
        }
        for item in scans
    ]


def find_outliers(scans: Sequence[ScannedImage]) -> list[Outlier]:
    """List images with a modified z-score beyond 3.5 in any measure, the furthest off first."""
    if not scans:
        return []
    values = np.array([[getattr(item, name) for name in _MEASURES] for item in scans])
    away = values - np.median(values, axis=0)
    spread = np.median(np.abs(away), axis=0)
    # Where most images agree exactly (say, on black), any difference would be infinitely far.
    scores = np.where(spread > 1e-6, 0.6745 * away / np.maximum(spread, 1e-6), 0.0)
    found = []
    for item, row, seen in zip(scans, scores, values, strict=True):
        worst = int(np.argmax(np.abs(row)))
        if abs(row[worst]) > _MAX_ROBUST_Z:
            found.append(
                Outlier(
                    file=item.sample.path,
                    measure=_MEASURES[worst],
                    value=float(seen[worst]),
                    robust_z=float(row[worst]),
                )
            )
    return sorted(found, key=lambda outlier: -abs(outlier.robust_z))


def _by_group(scans: Sequence[ScannedImage]) -> list[PixelStatistics]:
    groups: dict[tuple[str, str], list[ScannedImage]] = defaultdict(list)
    for item in scans:
        split, finding = item.sample.split or "unsplit", item.sample.finding
        for key in {("all", "all"), ("all", finding), (split, "all"), (split, finding)}:
            groups[key].append(item)
    order = {"all": 0, "train": 1, "val": 2, "test": 3, "unsplit": 4}
    keys = sorted(groups, key=lambda key: (order[key[0]], key[1] != "all", key[1]))
    return [_statistics(*key, groups[key]) for key in keys]


def _statistics(split: str, finding: str, scans: Sequence[ScannedImage]) -> PixelStatistics:
    means = np.array([item.mean for item in scans])
    stds = np.array([item.std for item in scans])
    variance = float(np.mean(stds**2 + means**2) - means.mean() ** 2)
    return PixelStatistics(
        split=split,
        finding=finding,
        images=len(scans),
        mean=float(means.mean()),
        std=max(0.0, variance) ** 0.5,
        mean_of_means=float(means.mean()),
        std_of_means=float(means.std()),
        mean_of_stds=float(stds.mean()),
        std_of_stds=float(stds.std()),
    )

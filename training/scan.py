"""Look once at every file of a data set and keep what the checks need of it."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from lungwatch.errors import DatasetError, FileRejected
from lungwatch.imaging import read_radiograph
from lungwatch.imaging.lettering import letters_in_line
from lungwatch.training.artefacts import border_fraction, reduced
from lungwatch.training.look import HISTOGRAM_BINS, THUMBNAIL_PX, Look
from lungwatch.training.samples import Sample
from lungwatch.training.scan_cache import ScanCache


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
) -> tuple[list[Look], list[Unreadable]]:
    """Read every file through the daemon's reader, in the order of `samples`.

    Parameters
    ----------
    samples
        Files to read.
    workers
        Decoding threads.
    progress
        Called with 1 after each file.
    cache
        What an earlier scan found; files that have not changed since are not read again.
    """
    looks: list[Look] = []
    unreadable: list[Unreadable] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for found in pool.map(lambda sample: _cached_look(sample, cache), samples):
            if isinstance(found, Look):
                looks.append(found)
            else:
                unreadable.append(found)
            if progress:
                progress(1)
    finally:
        # What was seen before an interruption is kept, and nothing new begun.
        pool.shutdown(cancel_futures=True)
        if cache:
            cache.flush()
    return looks, unreadable


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


def _cached_look(sample: Sample, cache: ScanCache | None) -> Look | Unreadable:
    if cache is None:
        return _look(sample)
    try:
        key = cache.key(sample)
    except OSError:  # gone: reading it says so
        return _look(sample)
    known = cache.find(key, sample)
    if known is not None:
        return known
    found = _look(sample)
    return cache.keep(key, found) if isinstance(found, Look) else found


def _look(sample: Sample) -> Look | Unreadable:
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
    return Look(
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

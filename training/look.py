"""Inspection of one file of a data set: size, margins, text, fingerprint."""

from dataclasses import dataclass

from lungwatch.training.pixels import FloatArray
from lungwatch.training.samples import Sample

THUMBNAIL_PX = 64
HISTOGRAM_BINS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """What one readable file looks like.

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

"""The image that every part of lungwatch works on, and what is known about it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.flags import Flag

FloatImage = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Box:
    """Rows `top` to `bottom` and columns `left` to `right`, the latter of each excluded."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, pixels: FloatImage) -> FloatImage:
        """Return this part of an image, a view."""
        return pixels[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True, kw_only=True)
class RadiographMeta:
    """What the file says about the image; everything optional is None when it is silent.

    Attributes
    ----------
    format
        "DICOM", "PNG" or "JPEG".
    rows, columns
        Size of the stored image, in pixels; that of `Radiograph.pixels` differs where the
        file's pixels are not square, where the image was turned, or where a frame was cut off.
    bits_stored
        Significant bits of a stored sample.
    photometric
        PhotometricInterpretation (0028,0004), or "MONOCHROME2" for grey PNG and JPEG.
    transfer_syntax
        UID of the transfer syntax (0002,0010); None for PNG and JPEG.
    patient_id, accession, study_uid, series_uid, sop_uid, sop_class
        (0010,0020), (0008,0050), (0020,000D), (0020,000E), (0008,0018), (0008,0016).
    modality, body_part, view_position
        (0008,0060), (0018,0015), (0018,5101).
    study_date, series_date, acquisition_date
        (0008,0020), (0008,0021), and (0008,0022) or the day of (0008,002A), as YYYYMMDD.
    manufacturer, manufacturer_model, station, institution
        (0008,0070), (0008,1090), (0008,1010), (0008,0080).
    """

    format: str
    rows: int
    columns: int
    bits_stored: int
    photometric: str
    transfer_syntax: str | None = None
    patient_id: str | None = None
    accession: str | None = None
    study_uid: str | None = None
    series_uid: str | None = None
    sop_uid: str | None = None
    sop_class: str | None = None
    modality: str | None = None
    body_part: str | None = None
    view_position: str | None = None
    study_date: str | None = None
    series_date: str | None = None
    acquisition_date: str | None = None
    manufacturer: str | None = None
    manufacturer_model: str | None = None
    station: str | None = None
    institution: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Radiograph:
    """A decoded X-ray as a reader would see it on a light box: air dark, bone bright.

    Attributes
    ----------
    pixels
        float32, shape (rows, columns), 0 = black to 1 = white.
    meta
        What the file says about it.
    flags
        What reading noticed or had to mend, without repetition.
    orientation_known
        Whether the file says which side is the patient's left; then the patient's right is at the
        left of `pixels`, and the head above.
    kept
        Which part of the upright image `pixels` are; None where no frame was cut off.
    """

    pixels: FloatImage
    meta: RadiographMeta
    flags: tuple[Flag, ...] = ()
    orientation_known: bool = False
    kept: Box | None = None

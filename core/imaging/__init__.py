"""From a file's bytes to grey values: DICOM, PNG and JPEG into one `Radiograph`."""

from lungwatch.imaging.radiograph import Radiograph, RadiographMeta
from lungwatch.imaging.reader import ReadPolicy, read_radiograph

__all__ = ["Radiograph", "RadiographMeta", "ReadPolicy", "read_radiograph"]

"""From a claimed file to the network's input and the overlay's background."""

from lungwatch.daemon.overlay import make_preview
from lungwatch.daemon.records import Claimed, Prepared
from lungwatch.imaging import ReadPolicy, read_radiograph
from lungwatch.preprocess import PreprocessSpec, preprocess


def prepare(
    claim: Claimed, *, policy: ReadPolicy, spec: PreprocessSpec, overlay_side_px: int
) -> Prepared:
    """Decode a file and reduce it to what the later stages need.

    The full-size pixels, by far the largest thing on the way, do not leave this function.

    Raises
    ------
    FileRejected
        If the file is no usable chest X-ray.
    OSError
        If it cannot be read.
    """
    radiograph = read_radiograph(claim.path, policy)
    rows, columns = radiograph.pixels.shape
    return Prepared(
        claim=claim,
        meta=radiograph.meta,
        tensor=preprocess(radiograph.pixels, spec),
        preview=make_preview(radiograph.pixels, overlay_side_px),
        shape=(rows, columns),
    )

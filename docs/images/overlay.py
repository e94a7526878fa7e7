"""Writes overlay.png, the real chest radiograph as a model shows it: python docs/images/overlay.py.

An argument names another model bundle or its folder. Needs `pydicom-data` (extra `demo`).
"""

import hashlib
import sys
from datetime import UTC, datetime
from pathlib import Path

from pydicom.data import get_testdata_file

from lungwatch.daemon.config import Config
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.overlay.render import encode_png
from lungwatch.daemon.pipeline.decode import decode_file
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.daemon.pipeline.pipeline import classify
from lungwatch.daemon.pipeline.record import assess, draw_result
from lungwatch.daemon.pipeline.records import Claimed, Prepared
from lungwatch.errors import FileRejected, ProcessingFailed

# It abstains on this radiograph, so that all of an overlay is seen; the default model has a
# negative answer, and so no map.
_MODEL = "baseline-1.1.0"
_PLACE = Path(__file__).with_suffix(".png")


def main(model: str) -> None:
    """Draw the radiograph as the daemon does."""
    config = Config()
    classifier = Classifier.load(find_bundle(model))
    gate = classifier.gate
    path = Path(str(get_testdata_file("RG1_UNCR.dcm")))
    decoded = decode_file(
        path,
        policy=config.read_policy,
        spec=classifier.contract.preprocess,
        overlay_side_px=config.overlay_side_px,
        gate_spec=None if gate is None else gate.contract.preprocess,
    )
    claim = Claimed(
        result_id=1,
        image_id=1,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        path=path,
        file=OwnedFile.open(path),
        attempt=1,
        received_at=datetime.now(UTC),
        started_s=0.0,
    )
    (classified,) = classify([Prepared(claim=claim, **vars(decoded))], classifier, _raise)
    judged = assess(classified, classifier.contract)
    picture = draw_result(classified, judged, classifier.contract, side_by_side=True)
    _PLACE.write_bytes(encode_png(picture))


def _raise(_: Prepared, error: FileRejected | ProcessingFailed) -> None:
    raise error


if __name__ == "__main__":
    main(*(sys.argv[1:] or [_MODEL]))

"""A poisoned image costs itself only, not its batch."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from lungwatch.attributes import RadiographMeta
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.pipeline.pipeline import classify
from lungwatch.daemon.pipeline.records import Claimed, Prepared, Scores
from lungwatch.errors import Reason


def prepared(number: int) -> Prepared:
    claim = Claimed(
        result_id=number,
        image_id=number,
        sha256=f"{number:064x}",
        path=Path("x"),
        file=OwnedFile.open(Path("/dev/null")),
        attempt=1,
        received_at=datetime.now(UTC),
        started_s=0.0,
    )
    meta = RadiographMeta(format="PNG", rows=1, columns=1, bits_stored=8, photometric="MONOCHROME2")
    tensor = np.full((4, 4, 1), number, dtype=np.float32)
    return Prepared(
        claim=claim, meta=meta, tensor=tensor, preview=np.zeros((1, 1), np.uint8), shape=(1, 1)
    )


class Model:
    """Fails on any batch that holds the number 3; has no gate."""

    gate = None

    def run(self, batch):
        if (batch == 3).any():
            raise RuntimeError("poisoned")
        cam = np.zeros((2, 1, 1), np.float32)
        return [
            Scores(
                probability=0.5,
                logit=float(item.mean()),
                label="NEGATIVE",
                cam=cam,
                embedding=np.zeros(1, np.float32),
            )
            for item in batch
        ]


@pytest.mark.parametrize("poisoned", [[], [3]])
def test_a_poisoned_image_is_found_and_the_others_are_scored(poisoned):
    failed = []
    done = classify(
        [prepared(number) for number in [1, 2, *poisoned, 4]],
        Model(),
        lambda item, failure: failed.append((item.claim.result_id, failure.reason)),
    )
    assert [item.prepared.claim.result_id for item in done] == [1, 2, 4]
    assert [item.scores.logit for item in done] == [1.0, 2.0, 4.0]
    assert failed == [(number, Reason.INTERNAL_ERROR) for number in poisoned]

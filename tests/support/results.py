"""A finished result, as the objects for a PACS are made of it."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lungwatch.daemon.pacs.source import ResultFacts


def result_facts(folder: Path, **changes: Any) -> ResultFacts:
    """Return a COVID answer whose overlay is drawn into a folder."""
    overlay = folder / "overlay.png"
    cv2.imwrite(str(overlay), np.full((64, 64, 3), 90, dtype=np.uint8))
    facts = ResultFacts(
        sha256="ab" * 32,
        label="COVID",
        probability=0.9,
        threshold=0.5,
        flags=(),
        model_name="guided",
        model_version="0.1.0",
        model_sha256="cd" * 32,
        finished_at=datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
        overlay=overlay,
    )
    return replace(facts, **changes)

"""Claims and results for a test's database, with values for all that the test does not vary."""

from typing import Any

from lungwatch.attributes import RadiographMeta
from lungwatch.db.claims import Drop
from lungwatch.db.results import Store
from tests.support.clock import START

META = RadiographMeta(format="DICOM", rows=1, columns=1, bits_stored=12, photometric="MONOCHROME2")


def drop(number: int = 0, **changes: Any) -> Drop:
    """Return the drop of another file for each number; `model_id` has to be among the changes."""
    values: dict[str, Any] = {
        "token": f"t{number}",
        "sha256": f"{number:064x}",
        "size_bytes": 1,
        "source_name": "x.dcm",
        "path": f"work/{number}/x.dcm",
        "max_attempts": 3,
        "now": START,
        "exists": lambda _: True,
    }
    return Drop(**values | changes)


def record(store: Store, result_id: int, **changes: Any) -> None:
    """Record a COVID answer of a claimed result."""
    values: dict[str, Any] = {
        "meta": META,
        "label": "COVID",
        "probability": 0.9,
        "logit": 2.0,
        "threshold": 0.5,
        "flags": [],
        "overlay": "overlays/x.png",
        "duration_ms": 1,
        "now": START,
    }
    store.record(result_id=result_id, **values | changes)

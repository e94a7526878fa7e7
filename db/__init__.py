"""The record: what arrived, what became of it, and which model said what."""

from lungwatch.db.engine import open_engine
from lungwatch.db.migrate import check_current, open_database, open_existing, upgrade
from lungwatch.db.states import State
from lungwatch.db.store import Claim, ClaimKind, Store

__all__ = [
    "Claim",
    "ClaimKind",
    "State",
    "Store",
    "check_current",
    "open_database",
    "open_engine",
    "open_existing",
    "upgrade",
]

"""Database of what was dropped, what became of it, and which model gave which result."""

from lungwatch.db.claims import Claim, ClaimKind, Drop
from lungwatch.db.engine import open_engine
from lungwatch.db.maintenance import check_current, open_database, open_existing, upgrade
from lungwatch.db.models import State
from lungwatch.db.results import Store

__all__ = [
    "Claim",
    "ClaimKind",
    "Drop",
    "State",
    "Store",
    "check_current",
    "open_database",
    "open_engine",
    "open_existing",
    "upgrade",
]

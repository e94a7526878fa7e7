"""What the configuration owes of each result."""

from lungwatch.daemon.config import Config
from lungwatch.db.deliveries import OutboxPlan


def plan_of(config: Config) -> OutboxPlan | None:
    """Return what is sent of each result, and whereto; None if nothing is."""
    if not config.pacs_destinations:
        return None
    return OutboxPlan(destinations=config.pacs_destinations, kinds=config.pacs_send)

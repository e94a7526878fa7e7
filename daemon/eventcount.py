"""How often each event was logged: what the database does not keep, such as tries again."""

import logging
import threading
from collections import Counter

DECODER_REPLACED = "decoder_replaced"


class EventCount(logging.Handler):
    """Counts the events of the process since it was made."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()
        self._decoders: Counter[str] = Counter()
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Count an event; a record that is none is not counted."""
        fields = getattr(record, "event_fields", None)
        if fields is None:
            return
        with self._guard:
            self._counts[fields["action"]] += 1
            if fields["action"] == DECODER_REPLACED:
                self._decoders[str(fields["reason"])] += 1

    @property
    def by_action(self) -> dict[str, int]:
        """Events by their action."""
        with self._guard:
            return dict(self._counts)

    @property
    def decoders(self) -> dict[str, int]:
        """Ended decoder processes by reason."""
        with self._guard:
            return dict(self._decoders)

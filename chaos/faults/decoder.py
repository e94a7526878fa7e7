"""Decoders crash, hang and eat memory."""

from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import Place
from lungwatch.daemon.pipeline.sandbox import fault_mark
from tests.support.pictures import png


class BadDecoder(PassingFault):
    """Among others come files that each take their decoder down."""

    name: ClassVar[str] = "decoder crashes, hangs, out of memory"
    how: ClassVar[str] = "files whose decoding process segfaults, sleeps for ever, or allocates"
    sign: ClassVar[str] = "action=decoder_replaced"
    settings: ClassVar[dict[str, str]] = {
        "TEST_DECODER": "1",
        "DECODE_TIMEOUT_S": "3",
        "DECODE_MEMORY_MB": "768",
    }
    _faults: ClassVar[tuple[str, ...]] = ("segfault", "hang", "memory")

    def inject(self, place: Place) -> None:
        """Drop three of each kind."""
        for number in range(9):
            kind = self._faults[number % 3]
            place.drop(f"{kind}-{number}.png", png(7000 + number) + fault_mark(kind))

    def heal(self, place: Place) -> None:
        """Nothing to be done: each file costs itself."""

"""Decoders crash, hang, eat memory, and attack."""

from typing import ClassVar

from chaos.fault import PassingFault
from chaos.place import Place
from lungwatch.daemon.pipeline.sandbox import fault_mark
from tests.support import attacker
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


class AttackingDecoder(PassingFault):
    """Among others come files that each take their decoder over."""

    name: ClassVar[str] = "decoder attacks"
    how: ClassVar[str] = "files whose decoding process runs programs, opens sockets, traces, reads"
    sign: ClassVar[str] = "reason=forbidden_call"
    settings: ClassVar[dict[str, str]] = {"TEST_DECODER": attacker.__file__}
    _attacks: ClassVar[tuple[str, ...]] = ("exec", "all", "inet", "vmwrite", "ptrace")

    def inject(self, place: Place) -> None:
        """Drop one of each kind."""
        for number, kind in enumerate(self._attacks):
            place.drop(f"{kind}.png", png(7100 + number) + fault_mark(kind))

    def heal(self, place: Place) -> None:
        """Nothing to be done: each file costs itself."""

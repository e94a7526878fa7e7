"""Every fault, in the order of the table."""

from chaos.fault import Fault
from chaos.faults.clock import ClockJump, WrongClock
from chaos.faults.custody import SwappedBytes
from chaos.faults.database import CorruptedPage, DatabaseLocked, DatabaseReplaced
from chaos.faults.decoder import AttackingDecoder, BadDecoder
from chaos.faults.disk_full import DiskFull
from chaos.faults.drop_folder import DropFolderCovered, DropFolderGone
from chaos.faults.errors import IoError, ReadOnly, StaleHandle
from chaos.faults.flood import Flood
from chaos.faults.inotify import EventsLost, NoWatches
from chaos.faults.kill import KillAtRandom, KillAtStep
from chaos.faults.leaks import Leaks
from chaos.faults.memory import MemoryPressure, OutOfMemory
from chaos.faults.peers import StalledPeers
from chaos.faults.postgres import KillServer, KillWithPostgres
from chaos.faults.power import PowerLoss
from chaos.faults.sending import KillWhileSending, SlowDestination
from chaos.faults.sigterm import Sigterm
from chaos.faults.stalled_log import StalledLog

FAULTS: dict[str, Fault] = {
    "kill-step": KillAtStep(),
    "kill-random": KillAtRandom(),
    "kill-postgres": KillWithPostgres(),
    "postgres-killed": KillServer(),
    "kill-sending": KillWhileSending(),
    "slow-destination": SlowDestination(),
    "stalled-peers": StalledPeers(),
    "power": PowerLoss(),
    "disk-full": DiskFull(),
    "read-only": ReadOnly(),
    "drop-gone": DropFolderGone(),
    "drop-covered": DropFolderCovered(),
    "eio": IoError(),
    "estale": StaleHandle(),
    "db-locked": DatabaseLocked(),
    "db-replaced": DatabaseReplaced(),
    "db-page": CorruptedPage(),
    "events-lost": EventsLost(),
    "no-watches": NoWatches(),
    "flood": Flood(),
    "clock": ClockJump(),
    "wrong-clock": WrongClock(),
    "decoder": BadDecoder(),
    "swapped-bytes": SwappedBytes(),
    "attack": AttackingDecoder(),
    "memory": MemoryPressure(),
    "oom": OutOfMemory(),
    "sigterm": Sigterm(),
    "stalled-log": StalledLog(),
    "leaks": Leaks(),
}

"""A home folder of its own and the command in processes of its own, as an administrator has."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from chaos.ledger import Audit, audit
from tests.support.processes import DaemonProcess, environment, run_command
from tests.support.record import RecordError, Row, read_rows, sha256
from tests.support.waits import PATIENCE_S

_POLL_S = 0.03
# Small overlays, and no file given up because the harness kills the process; what is dropped is
# drawn, and a content gate may well tell it from an X-ray.
_SETTINGS = {
    "LUNGWATCH_GATE": "flag",
    "LUNGWATCH_MIN_FREE_MB": "0",
    "LUNGWATCH_MAX_ATTEMPTS": "100",
    "LUNGWATCH_OVERLAY_SIDE_PX": "128",
}


class ChaosError(RuntimeError):
    """The daemon did what it must not, or the harness could not do what it should."""


class Place(DaemonProcess):
    """A home, what was dropped into it, and the daemon in it.

    Attributes
    ----------
    dropped
        The name of each dropped content by its SHA-256.
    on_start
        Called with the process's number as soon as there is one.
    """

    error: ClassVar[type[Exception]] = ChaosError

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        super().__init__(root, root.parent / f"{root.name}.log")
        self.env = env
        self.dropped: dict[str, str] = {}
        self.on_start: Callable[[int], None] | None = None
        self.incoming = root / "incoming"
        self.incoming.mkdir(parents=True, exist_ok=True)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "lungwatch.db"

    @property
    def _url(self) -> str:
        """Another database's URL, where the record is not in the SQLite file."""
        return self.env.get("LUNGWATCH_DATABASE_URL", "")

    def drop(self, name: str, content: bytes, *, plainly: bool = False) -> None:
        """Let a file appear in the drop folder; `plainly` without rename, as a copy does."""
        self.dropped[sha256(content)] = name
        if plainly:
            (self.incoming / name).write_bytes(content)
            return
        part = self.incoming / f".{name}"
        part.write_bytes(content)
        part.rename(self.incoming / name)

    def expect(self, name: str, content: bytes) -> None:
        """Note a content that comes out of an archive."""
        self.dropped[sha256(content)] = name

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a command in this home to its end."""
        env = self.environment({})
        return run_command(*args, "--home", str(self.root), env=env, timeout_s=600)

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the harness's settings, this home's and some of its own."""
        return environment(_SETTINGS, self.env, env)

    def start(self, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the daemon without waiting for it."""
        process = super().start(*args, **env)
        if self.on_start is not None:
            self.on_start(process.pid)
        return process

    def rows(self) -> list[Row] | None:
        """Every result; None while the database cannot be read."""
        try:
            return read_rows(self._url or self.database, timeout_s=0.2)
        except RecordError:
            return None

    def ended(self) -> set[str]:
        """The contents that have their end."""
        return {row.sha256 for row in self.rows() or () if row.is_settled}

    def waiting(self) -> set[str]:
        """The contents that have no end yet."""
        return set(self.dropped) - self.ended()

    def revive(self) -> bool:
        """Start the daemon if it has died, as a service manager does."""
        if self.is_running:
            return False
        self.start()
        return True

    def settle(self, timeout_s: float = PATIENCE_S) -> None:
        """See everything to its end, reviving the daemon where it dies, and stop it."""
        deaths = 0
        deadline = time.monotonic() + timeout_s
        while self.waiting():
            if time.monotonic() > deadline or deaths > 20:
                self.kill()
                return  # the audit names what is missing
            deaths += self.revive()
            time.sleep(0.1)
        if self.is_running:
            self.stop()

    def next_end_s(self, since_s: float) -> float:
        """Return the seconds from a moment until another file has its end, or nothing waits."""
        before = self.ended()
        deadline = time.monotonic() + PATIENCE_S
        while self.waiting() and not self.ended() - before:
            if time.monotonic() > deadline:
                raise ChaosError(f"nothing went on: {self.log()[-500:]}")
            self.revive()
            time.sleep(_POLL_S)
        return time.monotonic() - since_s

    def audit(self) -> Audit:
        """Compare what was dropped with folders and record, and ask `lungwatch reconcile`."""
        found = audit(self.root, self.dropped, self._url)
        said = self.command("reconcile", "--json")
        if said.returncode not in (0, 1) or not said.stdout:
            raise ChaosError(f"reconcile: {said.stderr[-300:]}")
        report = json.loads(said.stdout)
        differences = {f"reconcile: {item['kind']}" for item in report["differences"]}
        return Audit(
            files=found.files,
            lost=found.lost,
            duplicated=found.duplicated,
            damaged=(*found.damaged, *sorted(differences)),
        )

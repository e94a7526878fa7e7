"""A home folder of its own and the command in processes of its own, as an administrator has."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos.ledger import Audit, LedgerError, Row, audit, read_rows, sha256

COMMAND = Path(sys.executable).with_name("lungwatch")
# Longer than anything takes on an idle machine; what fails here has hung.
PATIENCE_S = 120.0
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


@dataclass
class Place:
    """A home, what was dropped into it, and the daemon in it.

    Attributes
    ----------
    on_start
        Called with the process's number as soon as there is one.
    """

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    on_start: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self.incoming.mkdir(parents=True, exist_ok=True)

    @property
    def incoming(self) -> Path:
        """The drop folder."""
        return self.root / "incoming"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "lungwatch.db"

    @property
    def _url(self) -> str:
        """Another database's URL, where the record is not in the SQLite file."""
        return self.env.get("LUNGWATCH_DATABASE_URL", "")

    @property
    def log_file(self) -> Path:
        """Where the daemons of this home write their log."""
        return self.root.parent / f"{self.root.name}.log"

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
        return subprocess.run(
            [COMMAND, *args, "--home", str(self.root)],
            env=self._environment({}),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=600,
            check=False,
        )

    def start(self, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the daemon without waiting for it."""
        self.starts += 1
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [COMMAND, "run", *args, "--home", str(self.root)],
                env=self._environment(env),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        if self.on_start is not None:
            self.on_start(self.process.pid)
        return self.process

    def start_ready(self, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the daemon and wait until it says that it is ready."""
        before = self.log().count("action=ready")
        process = self.start(*args, **env)
        self.wait_for(
            lambda: self.log().count("action=ready") > before or process.poll() is not None,
            "no start",
        )
        if process.poll() is not None:
            raise ChaosError(f"the start failed: {self.log()[-500:]}")
        return process

    def kill(self) -> None:
        """End the daemon as a power cut or the kernel would."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(PATIENCE_S)

    def suspend(self) -> None:
        """Stop every thread of the daemon, until it is sent SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        # On a busy machine some of them run on for a while.
        self.wait_for(
            lambda: all(
                stat.read_text().rpartition(")")[2].split()[0] == "T"
                for stat in threads.glob("*/stat")
            ),
            "it does not stop",
        )

    def stop(self) -> int:
        """Ask the daemon to end; return its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def log(self) -> str:
        """What the daemons said."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_text(errors="surrogateescape")

    @property
    def is_running(self) -> bool:
        """Whether there is a daemon that has not ended."""
        return self.process is not None and self.process.poll() is None

    def rows(self) -> list[Row] | None:
        """Every result; None while the database cannot be read."""
        try:
            return read_rows(self._url or self.database, timeout_s=0.2)
        except LedgerError:
            return None

    def ended(self) -> set[str]:
        """The contents that have their end."""
        return {row.sha256 for row in self.rows() or () if row.has_ended}

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

    def wait_for(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait until something holds.

        Raises
        ------
        ChaosError
            If it does not for a long time.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            if time.monotonic() > deadline:
                raise ChaosError(f"{what}: {self.log()[-500:]}")
            time.sleep(_POLL_S)

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

    def _environment(self, env: dict[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LUNGWATCH_")}
        return inherited | _SETTINGS | self.env | env

"""The installed command and the daemon in processes of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from tests.support.waits import PATIENCE_S, wait_for

COMMAND = Path(sys.executable).with_name("lungwatch")


def environment(*settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without settings of lungwatch but the given ones."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("LUNGWATCH_")}
    for some in settings:
        found |= some
    return found


def run_command(
    *args: str, env: Mapping[str, str], cwd: Path | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `env` is all of its environment."""
    return subprocess.run(
        [COMMAND, *args],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout_s,
        check=False,
    )


class DaemonProcess:
    """`lungwatch run` in a home, one process after the other.

    Parameters
    ----------
    home
        The home folder.
    log_file
        What the processes write to stderr, one after the other.

    Attributes
    ----------
    starts
        How often it has been started.
    error
        Raised where it does not do what it has to.
    """

    error: ClassVar[type[Exception]] = AssertionError

    def __init__(self, home: Path, log_file: Path) -> None:
        self.root = home
        self.log_file = log_file
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a start or command, with some variables of its own."""
        return environment(env)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The last process that was started."""
        assert self._process is not None, "it was never started"
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start it without waiting for it."""
        self.starts += 1
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [COMMAND, "run", *args, "--home", str(self.root)],
                env=self.environment(env),
                cwd=self.root.parent,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        return self._process

    def start_ready(self, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start it and wait until it says that it is ready."""
        before = self.log().count("action=ready")
        process = self.start(*args, **env)
        self.wait_for(
            lambda: self.log().count("action=ready") > before or process.poll() is not None,
            "no start",
        )
        if process.poll() is not None:
            raise self.error(f"the start failed: {self._tail()}")
        return process

    def suspend(self) -> None:
        """Stop every thread of it, until `resume`."""
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

    def resume(self) -> None:
        """Let it go on after `suspend`."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """Ask it to end; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> int | None:
        """End it as a power cut or the kernel would; return its exit status, if it was started."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait(PATIENCE_S)

    def log(self) -> str:
        """Return all that it has said."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_text(errors="surrogateescape")

    def wait_for(self, is_true: Callable[[], object], what: str = "") -> None:
        """Wait until something holds; the failure's message is `what` and the log's end."""
        wait_for(is_true, lambda: f"{what}: {self._tail()}", error=self.error)

    def wait_until_said(self, text: str) -> None:
        """Wait until the log holds a text while the process lives."""
        self.wait_for(lambda: text in self.log() or not self.is_running, text)
        if not self.is_running:
            raise self.error(f"it has ended: {self._tail()}")

    def _tail(self) -> str:
        return self.log()[-2000:]

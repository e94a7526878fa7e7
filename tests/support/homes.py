"""A home folder, its daemon and its record, as an administrator sees them."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.support.processes import DaemonProcess, environment, run_command
from tests.support.record import Row, read_rows, sha256
from tests.support.waits import PATIENCE_S, wait_for


class Home:
    """A home folder, and all that a test wants to do with it and to know of it.

    `env` holds settings without their prefix, ``{"OBSERVER": "polling"}``, and Python's own.
    """

    def __init__(self, root: Path, env: dict[str, str] | None = None) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.env = env or {}
        self.incoming.mkdir(parents=True, exist_ok=True)

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of its processes, with some settings of their own."""
        return environment(
            {
                key if key.startswith("PYTHON") else f"LUNGWATCH_{key}": value
                for key, value in {**self.env, **(env or {})}.items()
            }
        )

    def command(
        self, *args: str, env: Mapping[str, str] | None = None, with_home: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; it gets ``--home`` unless told otherwise."""
        home = ("--home", str(self.root)) if with_home else ()
        return run_command(*args, *home, env=self.environment(env), cwd=self.root.parent)

    def run_once(self, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Process what is in the drop folder."""
        return self.command("run", "--once", env=env)

    def daemon(self, *args: str) -> "Daemon":
        """Return a daemon that is not started yet."""
        return Daemon(self, args)

    def drop(self, name: str, content: bytes, *, old: bool = False) -> Path:
        """Write a file into the drop folder; with `old` as if it had lain there for a while."""
        path = self.incoming / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if old:
            os.utime(path, (time.time() - 60,) * 2)
        return path

    def rows(self) -> list[Row]:
        """Return every result."""
        return read_rows(self.root / "lungwatch.db")

    def row(self, content: bytes) -> Row:
        """Return the one result of a content."""
        (row,) = [row for row in self.rows() if row.sha256 == sha256(content)]
        return row

    def results(self) -> list[dict[str, Any]]:
        """Return what `results list --json` prints."""
        listed = self.command("results", "list", "--json")
        assert listed.returncode == 0, listed.stderr
        found: list[dict[str, Any]] = json.loads(listed.stdout)
        return found

    def reconcile(self, *args: str) -> tuple[int, dict[str, Any]]:
        """Return the exit status and the report."""
        said = self.command("reconcile", "--json", *args)
        assert said.returncode in (0, 1), said.stderr
        return said.returncode, json.loads(said.stdout)

    def files(self, *folders: str) -> list[Path]:
        """Return the regular files below some of the home's folders."""
        # Not `rglob`, which raises when a running daemon removes a folder under it.
        found = (
            Path(place, name)
            for folder in folders
            for place, _, names in os.walk(self.root / folder)
            for name in names
        )
        return sorted(path for path in found if path.is_file() and not path.is_symlink())

    def kept(self) -> Counter[str]:
        """Return the multiset of contents that have reached their last place."""
        return Counter(sha256(path.read_bytes()) for path in self.files("done", "quarantine"))

    def wait_until_ended(self, contents: Iterable[bytes], timeout_s: float = PATIENCE_S) -> None:
        """Wait until every content's result has an end and its file is in its place."""
        wanted = {sha256(content) for content in contents}

        def missing() -> set[str]:
            return wanted - {row.sha256 for row in self.rows() if row.is_settled}

        wait_for(lambda: not missing(), lambda: f"no end of {missing()}: {self.log()}", timeout_s)

    def log(self) -> str:
        """Return what the last two daemons said, the end of it."""
        return "".join(
            path.read_text(errors="surrogateescape")[-2000:]
            for path in sorted(self.root.parent.glob("stderr-*"))[-2:]
        )

    def assert_settled(self, contents: Iterable[bytes], *, arrivals: int = 1) -> None:
        """Each content once in the record, once in the folders, unaltered; nothing between."""
        digests = {sha256(content) for content in contents}
        rows = self.rows()
        assert Counter(row.sha256 for row in rows) == Counter(dict.fromkeys(digests, 1))
        assert self.kept() == Counter(dict.fromkeys(digests, 1))
        assert {row.arrivals for row in rows} == {arrivals}
        for row in rows:
            assert row.has_ended, row
            folder = "done" if row.state == "done" else "quarantine"
            assert row.path is not None
            assert row.path.startswith(f"{folder}/"), row
            assert sha256((self.root / row.path).read_bytes()) == row.sha256
            # An archive is done when its files go on alone; there is nothing to show of it.
            is_scored = row.state == "done" and row.reason != "unpacked"
            assert (row.overlay is not None) == is_scored
            assert row.overlay is None or (self.root / row.overlay).is_file()
        assert list((self.root / "work").iterdir()) == []
        status, report = self.reconcile()
        assert (status, report["differences"]) == (0, [])
        assert report["agrees"] is True


class Daemon(DaemonProcess):
    """`lungwatch run` in a process of its own: ready inside the ``with``, ended after it."""

    def __init__(self, home: Home, args: tuple[str, ...] = ()) -> None:
        number = len(list(home.root.parent.glob("stderr-*")))
        super().__init__(home.root, home.root.parent / f"stderr-{number}")
        self._home = home
        self._args = args

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return the home's environment."""
        return self._home.environment(env)

    def launch(self) -> Self:
        """Start the process without waiting for it."""
        self.start(*self._args)
        return self

    def __enter__(self) -> Self:
        try:
            self.start_ready(*self._args)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

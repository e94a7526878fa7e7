"""The real command in processes of its own, real files, real signals.

What came of it is read from the command's own output, the folders and the SQLite file, as an
administrator would.
"""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.golden import golden_pixels
from lungwatch.models import SHIPPED_DEFAULT

# Longer than anything takes on an idle machine: what is being tested is that it happens.
START_S = 60.0
END_S = 60.0
_POLL_S = 0.02
COMMAND = Path(sys.executable).with_name("lungwatch")
_ENDS = ("done", "rejected", "failed")
_ROWS = """
    SELECT result.id, image.sha256, result.state, result.reason, result.message,
        result.attempts, result.overlay, image.path, result.probability,
        (SELECT count(*) FROM arrival WHERE arrival.result_id = result.id)
    FROM result JOIN image ON image.id = result.image_id ORDER BY result.id
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result as the SQLite file has it."""

    id: int
    sha256: str
    state: str
    reason: str | None
    message: str | None
    attempts: int
    overlay: str | None
    path: str | None
    probability: float | None
    arrivals: int

    @property
    def has_ended(self):
        return self.state in _ENDS

    @property
    def is_kept(self):
        """Whether the record says that the file has reached its last place."""
        return self.path is not None and self.path.startswith(("done/", "quarantine/"))


class Home:
    """A home folder, and all that a test wants to do with it and to know of it.

    `env` holds settings without their prefix, ``{"OBSERVER": "polling"}``, and Python's own.
    """

    def __init__(self, root: Path, env: dict[str, str] | None = None):
        self.root = root
        self.incoming = root / "incoming"
        self.env = env or {}
        self.incoming.mkdir(parents=True, exist_ok=True)

    def environment(self, env: dict[str, str] | None = None):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LUNGWATCH_")}
        settings = {**self.env, **(env or {})}
        return inherited | {
            key if key.startswith("PYTHON") else f"LUNGWATCH_{key}": value
            for key, value in settings.items()
        }

    def command(self, *args: str, env: dict[str, str] | None = None, with_home: bool = True):
        """Run the command to its end; it gets ``--home`` unless told otherwise."""
        return subprocess.run(
            [COMMAND, *args, *(["--home", str(self.root)] if with_home else [])],
            env=self.environment(env),
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=240,
            check=False,
        )

    def run_once(self, env: dict[str, str] | None = None):
        return self.command("run", "--once", env=env)

    def daemon(self, *args: str):
        return Daemon(self, args)

    def drop(self, name: str, content: bytes, *, old: bool = False):
        """Write a file into the drop folder; with `old` as if it had lain there for a while."""
        path = self.incoming / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if old:
            os.utime(path, (time.time() - 60,) * 2)
        return path

    def rows(self):
        if not (self.root / "lungwatch.db").exists():
            return []
        with closing(sqlite3.connect(self.root / "lungwatch.db", timeout=30)) as connection:
            return [
                Row(**dict(zip(Row.__dataclass_fields__, values, strict=True)))
                for values in connection.execute(_ROWS)
            ]

    def row(self, content: bytes):
        """The one result of a content."""
        (row,) = [row for row in self.rows() if row.sha256 == sha256(content)]
        return row

    def results(self):
        listed = self.command("results", "list", "--json")
        assert listed.returncode == 0, listed.stderr
        return json.loads(listed.stdout)

    def reconcile(self, *args: str):
        """Return the exit status and the report."""
        said = self.command("reconcile", "--json", *args)
        assert said.returncode in (0, 1), said.stderr
        return said.returncode, json.loads(said.stdout)

    def files(self, *folders: str):
        """The regular files below some of the home's folders."""
        # Not `rglob`, which raises when a running daemon removes a folder under it.
        found = (
            Path(place, name)
            for folder in folders
            for place, _, names in os.walk(self.root / folder)
            for name in names
        )
        return sorted(path for path in found if path.is_file() and not path.is_symlink())

    def kept(self):
        """The multiset of contents that have reached their last place."""
        return Counter(sha256(path.read_bytes()) for path in self.files("done", "quarantine"))

    def wait_until_ended(self, contents: Iterable[bytes], timeout_s: float = END_S):
        """Wait until every content's result has an end and its file is in its place."""
        wanted = {sha256(content) for content in contents}

        def missing():
            return wanted - {row.sha256 for row in self.rows() if row.has_ended and row.is_kept}

        wait_for(lambda: not missing(), timeout_s, lambda: f"no end of {missing()}: {self.log()}")

    def log(self):
        """What the last daemons said, the end of it."""
        return "".join(
            path.read_text(errors="surrogateescape")[-2000:]
            for path in sorted(self.root.parent.glob("stderr-*"))[-2:]
        )

    def assert_settled(self, contents: Iterable[bytes], *, arrivals: int = 1):
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


class Daemon:
    """`lungwatch run` in a process of its own: ready inside the ``with``, ended after it."""

    def __init__(self, home: Home, args: tuple[str, ...] = ()):
        self._home = home
        self._args = args
        number = len(list(home.root.parent.glob("stderr-*")))
        self.stderr_file = home.root.parent / f"stderr-{number}"
        self.process: subprocess.Popen[bytes]

    def launch(self):
        """Start the process without waiting for it."""
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [COMMAND, "run", *self._args, "--home", str(self._home.root)],
                env=self._home.environment(),
                cwd=self._home.root.parent,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        return self

    def __enter__(self):
        self.launch()
        try:
            wait_for(
                lambda: "action=ready" in self.stderr() or self.process.poll() is not None,
                START_S,
                self.stderr,
            )
            assert self.process.poll() is None, self.stderr()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object):
        self.kill()

    def stderr(self):
        return self.stderr_file.read_text(errors="surrogateescape")

    def wait_until_said(self, text: str):
        """Wait until the log holds a text, and the process with it."""
        wait_for(
            lambda: text in self.stderr() or self.process.poll() is not None, END_S, self.stderr
        )
        assert self.process.poll() is None, self.stderr()

    def suspend(self):
        """Stop every thread of it, until it is sent SIGCONT."""
        self.process.send_signal(signal.SIGSTOP)

        def running():
            # On a busy machine some threads run on for a while.
            stats = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
            return [s for s in stats if s.read_text().rpartition(")")[2].split()[0] != "T"]

        wait_for(lambda: not running(), END_S, self.stderr)

    def stop(self):
        """Ask it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S)

    def kill(self):
        """End it as a power loss would."""
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait(END_S)


def sha256(content: bytes):
    return hashlib.sha256(content).hexdigest()


def wait_for(is_true: Callable[[], bool], timeout_s: float, show: Callable[[], str]):
    """Wait until something holds; what `show` says is the failure's message."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {show()}")
        time.sleep(_POLL_S)


@pytest.fixture(scope="session")
def make_home(tmp_path_factory):
    """Make a new home, with settings of its own; drawn pictures are no X-rays, so flags only."""

    def make(**env: str):
        return Home(tmp_path_factory.mktemp("place") / "home", {"GATE": "flag", **env})

    return make


@pytest.fixture(scope="session")
def sample(find_testdata):
    """Return the bytes of one of pydicom's real files."""
    return lambda name: find_testdata(name).read_bytes()


@pytest.fixture(scope="session")
def picture():
    """A small PNG of a chest caricature, another one for each number."""
    base = cv2.resize(golden_pixels(), (160, 160), interpolation=cv2.INTER_AREA) * 220

    def draw(number: int):
        noise = np.random.default_rng(number).normal(10, 5, base.shape)
        pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
        is_encoded, data = cv2.imencode(".png", pixels)
        assert is_encoded
        return data.tobytes()

    return draw


@pytest.fixture(scope="session")
def shipped_bundle():
    """The folder of the model that runs unless another one is named."""
    return Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture
def altered_bundle(shipped_bundle, tmp_path):
    """The shipped model with one bit turned over."""
    copy = Path(shutil.copytree(shipped_bundle, tmp_path / "altered"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    return copy


@pytest.fixture
def newer_bundle(shipped_bundle, tmp_path):
    """The shipped model in other bytes: to the record, another model that says the same."""
    copy = Path(shutil.copytree(shipped_bundle, tmp_path / "newer"))
    # A field that no reader of the format knows, and that every reader has to skip.
    data = (copy / "model.onnx").read_bytes() + b"\xf8\xff\x01\x01"
    (copy / "model.onnx").write_bytes(data)
    listed = json.loads((copy / "bundle.json").read_text())
    listed["sha256"]["model.onnx"] = sha256(data)
    (copy / "bundle.json").write_text(json.dumps(listed))
    return copy


@pytest.fixture
def has_no_privilege(tmp_path):
    """Skip a test about rights where this process has them all."""
    path = tmp_path / "secret"
    path.touch(mode=0)
    if os.access(path, os.R_OK):
        pytest.skip("this process, root's, reads and writes everything")

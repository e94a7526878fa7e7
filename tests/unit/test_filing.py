"""A move to the last place that is cut short is completed by being repeated."""

import errno
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from lungwatch import files
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.records import Claimed
from tests.support.clock import ManualClock

WHEN = datetime(2026, 1, 2, tzinfo=UTC)


class Told:
    """Takes the store's and the writer's place, and remembers what it is told."""

    def __init__(self):
        self.paths = []

    def call(self, step):
        return step()

    def finish(self, *, result_id, path, now):
        self.paths.append((result_id, path, now))

    def filed_as_done(self, _image_id):
        return None

    def set_path(self, *, image_id, path):
        self.paths.append((image_id, path))


@pytest.fixture
def claimed(tmp_path):
    """A home, and a PNG in its work/."""
    home = Home(tmp_path / "home")
    home.prepare()
    path = home.work / "token" / "chest.png"
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG\r\n\x1a\n and more")
    return home, path


def filing_of(home, told):
    return Filing(SimpleNamespace(home=home, store=told, writer=told, clock=ManualClock(WHEN)))


def claim_of(path):
    return Claimed(
        result_id=1,
        image_id=1,
        sha256="ab" * 32,
        path=path,
        file=OwnedFile.open(path),
        attempt=1,
        received_at=WHEN,
        started_s=0.0,
    )


@pytest.mark.parametrize("folder", ["done", "quarantine"])
def test_repeated_after_the_rename_it_finds_the_file_where_it_went(claimed, monkeypatch, folder):
    """A folder that cannot be synchronised at first costs a repetition, and not the file."""
    home, path = claimed
    told = Told()
    filing, claim = filing_of(home, told), claim_of(path)

    def move():
        return filing.file(claim) if folder == "done" else filing.quarantine(claim, "too_small")

    synchronise = files.fsync_dir

    def fail_once_moved(where):
        if not path.exists():
            raise OSError(errno.ESTALE, "Stale file handle")
        synchronise(where)

    monkeypatch.setattr(files, "fsync_dir", fail_once_moved)
    with pytest.raises(OSError, match="Stale"):
        move()
    assert not path.exists()
    assert told.paths == []

    monkeypatch.setattr(files, "fsync_dir", synchronise)
    target = move()
    assert target.is_relative_to(home.root / folder)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert [entry[1] for entry in told.paths] == [home.relative(target)]
    assert not path.parent.exists()


def test_a_file_that_is_nowhere_is_an_error(claimed):
    home, path = claimed
    path.unlink()
    told = Told()
    filing = filing_of(home, told)
    with pytest.raises(FileNotFoundError):
        filing.file(claim_of(path))
    assert told.paths == []

"""A trouble of the file system that passes costs a delay, and no file."""

import errno
from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.intake import claims
from lungwatch.daemon.pipeline import filing, record
from lungwatch.daemon.service import Service
from lungwatch.db.engine import DatabaseBusyError
from lungwatch.db.maintenance import open_database
from lungwatch.db.queries import ResultFilter, list_results
from lungwatch.db.results import Store
from lungwatch.preprocess import golden_pixels

pytestmark = pytest.mark.slow


class FailsOnce:
    """Stands before a function and lets its first call fail as a busy disk does."""

    def __init__(self, function):
        self.function = function
        self.failures = 0

    def __call__(self, *arguments):
        if self.failures == 0:
            self.failures += 1
            raise OSError(errno.EIO, "Input/output error")
        return self.function(*arguments)


def run_over_one_picture(root: Path):
    (root / "incoming").mkdir()
    picture = np.rint(golden_pixels() * 255).astype(np.uint8)
    cv2.imwrite(str(root / "incoming" / "x.png"), picture)
    config = load_config(
        home=root, environ={"LUNGWATCH_MIN_FREE_MB": "0", "LUNGWATCH_GATE": "flag"}
    )
    status = Service(config).run(once=True)
    engine = open_database(config.database_url)
    try:
        (row,) = list_results(engine, ResultFilter())
    finally:
        engine.dispose()
    return status, row


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(claims, "fsync_dir", id="making the claim's move durable"),
        pytest.param(record, "write_atomic", id="writing the overlay"),
        pytest.param(filing, "move_atomic", id="moving the recorded file"),
    ],
)
def test_an_error_that_passes_is_waited_out(tmp_path, monkeypatch, module, name):
    stumbling = FailsOnce(getattr(module, name))
    monkeypatch.setattr(module, name, stumbling)
    status, row = run_over_one_picture(tmp_path)
    assert stumbling.failures == 1
    assert (status, row.status, row.attempts) == (0, "done", 1)
    assert (tmp_path / row.file).is_file()
    assert (tmp_path / row.overlay).is_file()


def test_a_database_away_between_the_move_and_the_rows_last_state_is_waited_for(
    tmp_path, monkeypatch
):
    """The file is in done/ already when the row cannot be told: told later, moved once."""
    finish, calls = Store.finish, []

    def stumbling(store, **values):
        calls.append((tmp_path / values["path"]).is_file())
        if len(calls) == 1:
            raise DatabaseBusyError
        finish(store, **values)

    monkeypatch.setattr(Store, "finish", stumbling)
    status, row = run_over_one_picture(tmp_path)
    assert calls == [True, True]
    assert (status, row.status, row.attempts) == (0, "done", 1)
    assert (tmp_path / row.file).is_file()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["record", "finish"])
def test_a_commit_whose_answer_is_lost_is_not_done_twice(tmp_path, monkeypatch, name):
    """A server that dies after the commit has kept it; the next try finds its own work."""
    transaction, lost = getattr(Store, name), []

    def unanswered(store, **values):
        transaction(store, **values)
        if not lost:
            lost.append(name)
            raise DatabaseBusyError

    monkeypatch.setattr(Store, name, unanswered)
    status, row = run_over_one_picture(tmp_path)
    assert lost == [name]
    assert (status, row.status, row.attempts) == (0, "done", 1)
    assert (tmp_path / row.file).is_file()
    assert (tmp_path / row.overlay).is_file()

"""The chaos harness sees what it is there to see."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTENTS = [b"first", b"second", b"third"]
OVERLAY = b"\x89PNG...IEND\xaeB`\x82"
SCHEMA = """
    CREATE TABLE image (id INTEGER PRIMARY KEY, sha256 TEXT, path TEXT);
    CREATE TABLE result (id INTEGER PRIMARY KEY, image_id INTEGER, state TEXT, reason TEXT,
        overlay TEXT, message TEXT, attempts INTEGER, probability REAL);
    CREATE TABLE arrival (id INTEGER PRIMARY KEY, result_id INTEGER);
"""


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def home(tmp_path):
    """A home in which each content has its one end, and what was dropped."""
    from tests.support.record import sha256

    for folder in ("incoming", "work", "done", "quarantine", "overlays"):
        (tmp_path / folder).mkdir()
    with closing(sqlite3.connect(tmp_path / "lungwatch.db")) as connection, connection:
        connection.executescript(SCHEMA)
        for number, content in enumerate(CONTENTS, 1):
            (tmp_path / f"done/{number}").write_bytes(content)
            (tmp_path / f"overlays/{number}.png").write_bytes(OVERLAY)
            connection.execute(
                "INSERT INTO image VALUES (?, ?, ?)", (number, sha256(content), f"done/{number}")
            )
            connection.execute(
                "INSERT INTO result VALUES (?, ?, 'done', NULL, ?, NULL, 1, 0.5)",
                (number, number, f"overlays/{number}.png"),
            )
            connection.execute("INSERT INTO arrival (result_id) VALUES (?)", (number,))
    return tmp_path


def examine(home, *statements):
    from chaos.ledger import audit
    from tests.support.record import sha256

    with closing(sqlite3.connect(home / "lungwatch.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return audit(home, {sha256(content): str(n) for n, content in enumerate(CONTENTS)})


def test_a_sound_home_is_clean(home):
    assert examine(home).is_clean


def test_an_archive_that_is_unpacked_owes_no_overlay(home):
    (home / "overlays/1.png").unlink()
    without = "UPDATE result SET overlay = NULL WHERE id = 1"
    assert not examine(home, without).is_clean
    assert examine(home, "UPDATE result SET reason = 'unpacked' WHERE id = 1").is_clean


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM result WHERE id = 2",
        "UPDATE result SET state = 'recorded' WHERE id = 2",
        "UPDATE image SET path = 'done/elsewhere' WHERE id = 2",
        "UPDATE result SET state = 'failed' WHERE id = 2",
    ],
)
def test_a_content_without_its_end_in_the_record_is_lost(home, statement):
    found = examine(home, statement)
    assert len(found.lost) == 1
    assert not found.is_clean


def test_a_file_that_is_gone_is_lost(home):
    (home / "done/2").unlink()
    assert len(examine(home).lost) == 1


def test_a_half_written_file_is_lost_and_damage(home):
    (home / "done/2").write_bytes(b"seco")
    found = examine(home)
    assert (len(found.lost), found.damaged) == (1, ("done/2",))


def test_a_half_written_overlay_is_damage(home):
    (home / "overlays/2.png").write_bytes(OVERLAY[:-3])
    assert examine(home).damaged == ("overlays/2.png",)


@pytest.mark.parametrize("folder", ["incoming", "work", "done", "quarantine"])
def test_a_second_copy_is_a_duplicate(home, folder):
    (home / folder / "again").write_bytes(CONTENTS[1])
    assert len(examine(home).duplicated) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO result VALUES (9, 2, 'done', NULL, 'overlays/2.png', NULL, 1, 0.5)",
        "INSERT INTO arrival (result_id) VALUES (2)",
    ],
)
def test_a_second_result_or_arrival_is_a_duplicate(home, statement):
    assert len(examine(home, statement).duplicated) == 1


def test_a_power_cut_takes_what_was_not_synchronised(tmp_path):
    """Of content without fsync nothing is there, of a rename without the folder's fsync neither."""
    from chaos.disk import OPEN, RENAME, SYNC, WRITE, Call, Disk

    home = tmp_path / "home"
    (home / "a").mkdir(parents=True)
    disk = Disk(home)
    inode_of_a = (home / "a").stat().st_ino

    def call(op, path="", *, inode=0, data=b""):
        disk.apply(Call(op=op, flags=os.O_CREAT, inode=inode, offset=0, path=str(path), data=data))

    def left(name):
        disk.cut(tmp_path / name)
        root = tmp_path / name
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}

    call(OPEN, home / "a/part.png", inode=1)
    call(WRITE, inode=1, data=b"content")
    assert left("nothing") == {}
    call(SYNC, inode=inode_of_a)
    assert left("name") == {"a/part.png": b""}
    call(SYNC, inode=1)
    assert left("content") == {"a/part.png": b"content"}
    call(RENAME, home / "a/part.png", data=os.fsencode(home / "a/whole.png"))
    assert left("renamed") == {"a/part.png": b"content"}
    call(SYNC, inode=inode_of_a)
    assert left("synchronised") == {"a/whole.png": b"content"}


@pytest.mark.parametrize("forgotten", ["FILES", "FOLDERS"])
def test_a_forgotten_fsync_costs_what_it_would_have_kept(tmp_path, forgotten):
    """The model does to a file and to a name what `make chaos ARGS=--self-test` relies on."""
    from chaos.disk import OPEN, SYNC, WRITE, Call, Disk, Forgotten

    home = tmp_path / "home"
    home.mkdir()
    left = {}
    for label, mistake in (("sound", None), ("mistaken", Forgotten[forgotten])):
        disk = Disk(home, mistake)
        for op, inode, data in (
            (OPEN, 1, b""),
            (WRITE, 1, b"content"),
            (SYNC, 1, b""),
            (SYNC, home.stat().st_ino, b""),
        ):
            path = str(home / "whole.png") if op == OPEN else ""
            disk.apply(Call(op=op, flags=os.O_CREAT, inode=inode, offset=0, path=path, data=data))
        disk.cut(tmp_path / label)
        left[label] = [p.read_bytes() for p in (tmp_path / label).rglob("*.png")]
    assert left["sound"] == [b"content"]
    assert left["mistaken"] == ([b""] if forgotten == "FILES" else [])

"""Troubles of disk, folders, database and kernel: waited out, said once, and nothing is lost."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

COUNT = 6
SIGKILLED = -signal.SIGKILL


@pytest.fixture
def contents(picture):
    return [picture(number) for number in range(COUNT)]


@pytest.fixture
def small_disk(make_home):
    """A home on a file system of its own, of 24 MiB."""
    home = make_home(MIN_FREE_MB="0", DRAIN_S="2")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(home.root)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    home.incoming.mkdir()
    yield home
    subprocess.run(["umount", "--lazy", str(home.root)], check=True)


def fill(home):
    """Take all the space that is left, to the last block."""
    with (home.root / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def hide(home, contents):
    """Put files where nobody takes them, to be dropped when there is no room for them."""
    for number, content in enumerate(contents):
        home.drop(f".{number}.png", content, old=True)


def show(home):
    for path in list(home.incoming.iterdir()):
        path.rename(home.incoming / path.name.removeprefix("."))


def test_a_full_disk_is_waited_out_by_the_same_process(small_disk, contents):
    """It stops claiming, says so once, and goes on when there is room again."""
    home = small_disk
    with home.daemon() as daemon:
        hide(home, contents)
        fill(home)
        show(home)
        daemon.wait_until_said("action=short_of_space")
        assert not [row for row in home.rows() if row.has_ended]
        (home.root / "ballast").unlink()
        home.wait_until_ended(contents)
        daemon.wait_until_said("action=space_back")
        assert daemon.log().count("action=short_of_space") <= 2
        assert daemon.stop() == 0, daemon.log()
    assert "Traceback" not in daemon.log()
    assert {row.state for row in home.rows()} == {"done"}
    home.assert_settled(contents)


def test_a_disk_that_fills_up_while_files_are_in_hand_costs_none_of_them(small_disk, picture):
    """Filled and emptied again and again under a stream: each file once, all of them done."""
    home = small_disk
    contents = [picture(number) for number in range(4 * COUNT)]
    with home.daemon() as daemon:
        hide(home, contents)
        show(home)
        for _ in range(4):
            fill(home)
            time.sleep(0.7)
            (home.root / "ballast").unlink()
            time.sleep(0.3)
        home.wait_until_ended(contents)
        assert daemon.stop() == 0, daemon.log()
    assert {row.state for row in home.rows()} == {"done"}
    home.assert_settled(contents)


def test_a_stop_is_heard_while_the_disk_is_full(small_disk, contents):
    home = small_disk
    with home.daemon() as daemon:
        hide(home, contents)
        fill(home)
        show(home)
        daemon.wait_until_said("action=short_of_space")
        assert daemon.stop() == 0, daemon.log()
    (home.root / "ballast").unlink()
    again = home.run_once()
    assert again.returncode == 0, again.stderr
    home.assert_settled(contents)


@pytest.mark.parametrize("observer", ["inotify", "polling"])
@pytest.mark.parametrize("is_same", [True, False], ids=["the same", "another"])
def test_a_drop_folder_that_goes_and_comes_back_is_watched_again(
    make_home, picture, observer, is_same
):
    """Gone, as when its server is: said once, tried again, and the new one is taken from."""
    home = make_home(OBSERVER=observer, STABILITY_S="0.2")
    with home.daemon() as daemon:
        home.drop("before.png", picture(1))
        home.wait_until_ended([picture(1)])
        home.incoming.rename(home.root / "elsewhere")
        daemon.wait_until_said("action=drop_folder_lost")
        if is_same:
            (home.root / "elsewhere").rename(home.incoming)
        else:
            (home.root / "elsewhere").rmdir()
            home.incoming.mkdir()
        daemon.wait_until_said("action=watching")
        home.drop("after.png", picture(2))
        home.wait_until_ended([picture(1), picture(2)])
        assert daemon.log().count("action=drop_folder_lost") == 1
        assert daemon.log().count("action=drop_folder_back") == 1
        assert daemon.stop() == 0, daemon.log()
    assert "Traceback" not in daemon.log()
    home.assert_settled([picture(1), picture(2)])


def test_a_mount_that_leaves_a_bare_folder_of_another_disk_is_noticed(make_home, picture):
    """Nothing could be moved out of it: it counts as gone, until the right one is back."""
    home = make_home()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home.incoming)]
    with home.daemon() as daemon:
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting takes root's rights")
        try:
            daemon.wait_until_said("action=drop_folder_lost")
            assert "another file system" in daemon.log()
        finally:
            subprocess.run(["umount", "--lazy", str(home.incoming)], check=True)
        daemon.wait_until_said("action=drop_folder_back")
        home.drop("x.png", picture(1))
        home.wait_until_ended([picture(1)])
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([picture(1)])


def test_a_database_locked_beyond_the_timeout_is_waited_for(make_home, contents):
    """By another program, for longer than the driver waits: said, retried, and gone on from."""
    home = make_home()
    with home.daemon() as daemon:
        with closing(sqlite3.connect(home.root / "lungwatch.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            for number, content in enumerate(contents):
                home.drop(f"{number}.png", content, old=True)
            daemon.wait_until_said("action=database_away")
            other.rollback()
        home.wait_until_ended(contents)
        daemon.wait_until_said("action=database_back")
        assert daemon.log().count("action=database_away") == 1
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled(contents)


def test_a_damaged_database_is_refused_in_one_line_that_says_what_to_do(make_home, contents):
    home = make_home()
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content, old=True)
    assert home.run_once().returncode == 0
    database = home.root / "lungwatch.db"
    with closing(sqlite3.connect(database)) as connection:
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE type = 'table' AND name = 'image'"
        ).fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with database.open("r+b") as file:
        file.seek((root - 1) * page)
        file.write(os.urandom(page))
    refused = home.run_once()
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert "damaged" in refused.stderr
    assert "lungwatch backup restore" in refused.stderr


def test_events_lost_by_the_kernel_are_said_and_made_up_for(make_home, picture):
    """The queue overflows while the daemon is stopped: the rescan finds the file all the same."""
    home = make_home(RESCAN_S="0.5")
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 50_000:
        pytest.skip(f"the kernel's queue takes {limit} events")
    with home.daemon() as daemon:
        # All threads of it: one that still reads events makes room for more.
        daemon.suspend()
        noise = home.incoming / ".noise"
        for _ in range(limit // 3 + 1000):  # created, closed and deleted
            noise.touch()
            noise.unlink()
        home.drop("x.png", picture(1))
        daemon.resume()
        home.wait_until_ended([picture(1)])
        daemon.wait_until_said("action=inotify_overflow")
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([picture(1)])


def test_without_a_watch_to_be_had_the_rescan_works_alone_and_says_so(make_home, picture):
    """The user's inotify watches are used up: polling, with the reason in the first line."""
    home = make_home(OBSERVER="inotify")
    home.drop("x.png", picture(1), old=True)
    none_left = "echo 0 > /proc/sys/user/max_inotify_watches && exec "
    unshare = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*unshare, none_left + "true"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a user's namespace with limits of its own cannot be had here")
    command = Path(sys.executable).with_name("lungwatch")
    done = subprocess.run(
        [*unshare, f"{none_left}{command} run --once --home {home.root}"],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "observer=polling" in done.stderr
    assert "inotify is not available" in done.stderr
    home.assert_settled([picture(1)])


def test_a_recorded_result_whose_file_somebody_took_away_has_an_end(make_home, picture):
    """It failed, its file vanished; the same bytes dropped again are scored anew."""
    home = make_home()
    content = picture(1)
    home.drop("x.png", content, old=True)
    assert home.run_once(env={"CRASH_AT": "recorded"}).returncode == SIGKILLED
    assert home.row(content).state == "recorded"
    (path,) = home.files("work")
    path.unlink()

    assert home.run_once().returncode == 0
    row = home.row(content)
    assert (row.state, row.reason, row.path) == ("failed", "file_vanished", None)
    status, report = home.reconcile()
    assert (status, report["differences"]) == (0, [])

    home.drop("x.png", content, old=True)
    assert home.run_once().returncode == 0
    assert home.row(content).state == "done"
    home.assert_settled([content], arrivals=2)


def test_the_folder_of_an_archive_goes_with_its_last_file(make_home, picture, tmp_path):
    """While the daemon runs: no empty folders gather in incoming/."""
    home = make_home()
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("1.png", picture(1))
        archive.writestr("2.png", picture(2))
    packed = (tmp_path / "study.zip").read_bytes()
    with home.daemon() as daemon:
        home.drop("study.zip", packed)
        home.wait_until_ended([packed, picture(1), picture(2)])
        assert list(home.incoming.iterdir()) == []
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([packed, picture(1), picture(2)])

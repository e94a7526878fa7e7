"""A dropper that keeps its file open changes nothing of what is scored, sent and filed."""

import ctypes
import mmap
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pydicom
import pytest

from tests.support.peers import StoreScp
from tests.support.pictures import archive, dicom, png
from tests.support.record import sha256
from tests.support.waits import wait_for

SIGKILLED = -signal.SIGKILL
BEFORE_COPY = ("renamed",)
BEFORE_RECORD = ("copied",)
RECORDED = ("claimed", "replaced", "decoded", "classified", "overlaid", "recorded", "filed")
NOBODY = 65534
PR_CAPBSET_DROP, CAP_LEASE = 24, 28


class Dropper:
    """Drops a file and keeps it: by a descriptor, or by a writable mapping.

    A descriptor for reading is no writer that the kernel would tell of, and its owner can open
    the same inode through it for writing at any time.
    """

    def __init__(self, home, name, content, *, maps=False):
        self._size = len(content)
        path = home.drop(name, content)
        self._map = None
        if maps:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
            os.chown(path, NOBODY, NOBODY)
        os.utime(path, (1_700_000_000,) * 2)
        self.descriptor = os.open(path, os.O_RDONLY)

    def swap(self, content):
        """Write other bytes of the same length into the inode."""
        assert len(content) == self._size
        if self._map is not None:
            self._map[:] = content
            return
        with Path(f"/proc/self/fd/{self.descriptor}").open("r+b", buffering=0) as file:
            file.write(content)

    def close(self):
        os.close(self.descriptor)
        if self._map is not None:
            self._map.close()


@pytest.fixture
def drop():
    """Drop a file and keep hold of it to the end of the test."""
    droppers = []

    def make(*args, **options):
        droppers.append(Dropper(*args, **options))
        return droppers[-1]

    yield make
    for dropper in droppers:
        dropper.close()


@pytest.fixture
def make_quick(make_home):
    return lambda **env: make_home(GATE="flag", MIN_FREE_MB="0", **env)


@pytest.fixture
def untouched(make_quick):
    """Return what the daemon says of a content that nobody changes."""

    def ask(content):
        home = make_quick()
        home.drop("x.dcm", content, old=True)
        assert home.run_once().returncode == 0
        (found,) = home.results()
        return found["label"], found["probability"]

    return ask


def without_lease(start):
    """Run `start` on a thread whose children cannot ask the kernel who writes to a file.

    As a daemon that is not root has it with the files of other users.
    """

    def run():
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_LEASE, 0, 0, 0) == 0
        start()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def paused_at(home, point, tmp_path, during, *, is_blind=False):
    """Run a daemon that pauses at a point, do something meanwhile, and let it go on."""
    env = {"PAUSE_AT": point, "PAUSE_DIR": str(tmp_path)}
    daemon = home.daemon()
    try:
        if is_blind:
            without_lease(lambda: daemon.start(**env))
        else:
            daemon.start(**env)
        wait_for((tmp_path / "reached").exists, home.log)
        during()
        (tmp_path / "go").touch()
        yield_to_end(home, daemon)
    finally:
        daemon.kill()


def yield_to_end(home, daemon):
    """Wait until nothing is in hand, and stop."""
    wait_for(
        lambda: home.rows() and all(row.is_settled for row in home.rows()),
        lambda: f"{home.rows()} {home.log()}",
    )
    assert daemon.stop() == 0, home.log()


def assert_is_of(home, content, expected):
    """The one result is that of a content, and so is the file, which nobody else has open."""
    home.assert_settled([content])
    (found,) = home.results()
    assert (found["label"], found["probability"]) == expected
    (path,) = home.files("done")
    status = path.stat()
    assert status.st_uid == os.geteuid()
    assert status.st_nlink == 1
    assert not status.st_mode & 0o027
    assert status.st_mtime == 1_700_000_000


@pytest.mark.parametrize("point", [*BEFORE_COPY, *BEFORE_RECORD, *RECORDED])
def test_bytes_that_are_swapped_in_a_pause_are_not_scored_or_filed(
    make_quick, drop, untouched, tmp_path, point
):
    """What was hashed is scored; before the copy that is what the dropper made of it."""
    content, other = dicom(1), dicom(2)
    hashed = other if point in BEFORE_COPY else content
    home = make_quick()
    dropper = drop(home, "x.dcm", content)

    def swap():
        dropper.swap(other)
        os.utime(dropper.descriptor, (1_700_000_000,) * 2)

    paused_at(home, point, tmp_path, swap)
    dropper.swap(dicom(3))
    assert_is_of(home, hashed, untouched(hashed))


@pytest.mark.parametrize("point", [*BEFORE_COPY, *BEFORE_RECORD, *RECORDED])
def test_bytes_that_are_swapped_after_a_crash_are_not_scored_or_filed(
    make_quick, drop, untouched, point
):
    """Once the claim is recorded its content is the one of which there is a result."""
    content, other = dicom(1), dicom(2)
    hashed = content if point in RECORDED else other
    home = make_quick()
    dropper = drop(home, "x.dcm", content)
    assert home.run_once(env={"CRASH_AT": point}).returncode == SIGKILLED
    dropper.swap(other)
    os.utime(dropper.descriptor, (1_700_000_000,) * 2)
    again = home.run_once()
    assert again.returncode == 0, again.stderr
    assert_is_of(home, hashed, untouched(hashed))


@pytest.mark.parametrize("point", ["claimed", "decoded", "filed"])
def test_a_writable_mapping_changes_nothing_of_what_is_filed(
    make_quick, drop, untouched, tmp_path, point
):
    """As another user keeps one; the kernel does not tell the daemon of it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    content, other = dicom(1), dicom(2)
    home = make_quick(STABILITY_S="1")
    dropper = drop(home, "x.dcm", content, maps=True)
    paused_at(home, point, tmp_path, lambda: dropper.swap(other), is_blind=True)
    assert_is_of(home, content, untouched(content))


def test_an_archive_is_unpacked_from_its_copy(make_quick, drop, tmp_path):
    members = {"a.png": png(1), "b.png": png(2)}
    home = make_quick()
    whole = archive(members)
    dropper = drop(home, "x.zip", whole)
    paused_at(home, "claimed", tmp_path, lambda: dropper.swap(bytes(len(whole))))
    last = home.run_once()
    assert last.returncode == 0, last.stderr
    home.assert_settled([whole, *members.values()])


@pytest.mark.parametrize("point", ["recorded", "filed"])
def test_what_reaches_a_pacs_is_of_the_patient_that_was_scored(make_quick, drop, tmp_path, point):
    content, other = dicom(1), dicom(2)
    (tmp_path / "pause").mkdir()
    with StoreScp(tmp_path / "peer") as peer:
        home = make_quick(PACS_DESTINATIONS=peer.name, PACS_RETRY_S="0.2")
        dropper = drop(home, "x.dcm", content)
        paused_at(home, point, tmp_path / "pause", lambda: dropper.swap(other))
        sent = home.command("run", "--once")
        assert sent.returncode == 0, sent.stderr
        found = [pydicom.dcmread(path) for path in peer.folder.iterdir()]
    assert len(found) == 2
    assert {one.PatientID for one in found} == {"CHAOS1"}
    assert home.kept() == {sha256(content): 1}


def test_no_object_is_made_of_a_filed_file_that_was_changed(make_quick, tmp_path):
    """Its delivery has an error with the reason, and nothing is sent."""
    home = make_quick(PACS_DESTINATIONS="DOWN@127.0.0.1:1", PACS_RETRY_S="0.2")
    home.drop("x.dcm", dicom(1), old=True)
    assert home.run_once(env={"CRASH_AT": "packed"}).returncode == SIGKILLED
    for path in home.files("outbox"):
        path.unlink()
    (path,) = home.files("done")
    path.chmod(0o600)
    path.write_bytes(dicom(2))
    home.run_once()
    listed = home.command("pacs", "queue", "--json", "--state", "invalid")
    assert listed.stdout.count("its SHA-256 differs") == 2, listed.stdout


def test_no_descriptor_of_a_file_is_left_when_it_has_its_end(make_quick):
    """Of scored, rejected, known and unreadable files and of archives."""
    if os.geteuid() != 0:
        pytest.skip("only root sees the descriptors of a process that is not dumpable")
    home = make_quick()
    contents = [png(number) for number in range(12)]
    with home.daemon() as daemon:

        def held():
            links = []
            for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    links.append(str(link.readlink()))
            return [link for link in links if link.startswith((work, done))]

        work, done = str(home.root / "work"), str(home.root / "done")

        for number, content in enumerate(contents):
            home.drop(f"{number}.png", content)
        home.drop("no image.png", b"not an image")
        home.drop("archive.zip", archive({"m.png": png(50)}))
        home.wait_until_ended([*contents, b"not an image", png(50)])
        home.drop("again.png", contents[0])
        wait_for(lambda: home.row(contents[0]).arrivals == 2, home.log)
        wait_for(lambda: not held(), held)
        assert daemon.stop() == 0

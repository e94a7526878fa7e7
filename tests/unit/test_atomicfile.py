"""A file appears whole or not at all, and a failure leaves everything as it was."""

import errno
import os
from pathlib import Path

import pytest

from lungwatch.files import fsync_dir, make_dirs, move_atomic, write_atomic


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


class TestWrite:
    def test_holds_exactly_the_bytes(self, tmp_path: Path) -> None:
        target = tmp_path / "a.png"
        write_atomic(target, b"\0\x01" * 5000)
        assert target.read_bytes() == b"\0\x01" * 5000
        assert list(tmp_path.iterdir()) == [target]

    def test_replaces_what_was_there(self, tmp_path: Path) -> None:
        target = tmp_path / "a.png"
        target.write_bytes(b"old and longer")
        write_atomic(target, b"new")
        assert target.read_bytes() == b"new"

    @pytest.mark.usefixtures("full_disk")
    def test_a_full_disk_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No space") as caught:
            write_atomic(tmp_path / "a.png", b"data")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("full_disk")
    def test_a_full_disk_leaves_the_old_content(self, tmp_path: Path) -> None:
        target = tmp_path / "a.png"
        target.write_bytes(b"old")
        with pytest.raises(OSError, match="No space"):
            write_atomic(target, b"new")
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]

    def test_an_interruption_leaves_nothing_behind_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(descriptor: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(tmp_path / "a.png", b"data")
        assert list(tmp_path.iterdir()) == []

    def test_the_content_is_durable_before_the_name_and_the_name_afterwards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target, seen, real = tmp_path / "a.png", [], os.fsync

        def fsync(descriptor: int) -> None:
            seen.append((target.exists(), Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        write_atomic(target, b"data")
        assert seen == [(False, False), (True, True)]

    @pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
    def test_the_users_umask_decides_who_may_read(self, tmp_path: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            write_atomic(tmp_path / "a.png", b"data")
        finally:
            os.umask(before)
        assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write_atomic(tmp_path / "missing" / "a.png", b"data")


class TestMove:
    def test_moves_between_folders(self, tmp_path: Path) -> None:
        source, folder = tmp_path / "a", tmp_path / "done"
        source.write_bytes(b"data")
        folder.mkdir()
        move_atomic(source, folder / "b")
        assert not source.exists()
        assert (folder / "b").read_bytes() == b"data"

    def test_replaces_the_target(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"new")
        (tmp_path / "b").write_bytes(b"old")
        move_atomic(tmp_path / "a", tmp_path / "b")
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]

    def test_a_missing_target_folder_leaves_the_source(self, tmp_path: Path) -> None:
        source = tmp_path / "a"
        source.write_bytes(b"data")
        with pytest.raises(FileNotFoundError):
            move_atomic(source, tmp_path / "missing" / "a")
        assert source.read_bytes() == b"data"

    def test_another_file_system_is_refused_and_leaves_the_source(self, tmp_path: Path) -> None:
        other = Path("/dev/shm")
        if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system here")
        source, target = tmp_path / "a", other / f"lungwatch-test-{os.getpid()}"
        source.write_bytes(b"data")
        with pytest.raises(OSError, match="cross-device") as caught:
            move_atomic(source, target)
        assert caught.value.errno == errno.EXDEV
        assert source.read_bytes() == b"data"
        assert not target.exists()

    def test_both_folders_are_made_durable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced, real = [], os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())
            real(descriptor)

        (tmp_path / "from").mkdir()
        (tmp_path / "to").mkdir()
        (tmp_path / "from" / "a").write_bytes(b"data")
        monkeypatch.setattr(os, "fsync", fsync)
        move_atomic(tmp_path / "from" / "a", tmp_path / "to" / "a")
        assert set(synced) == {tmp_path / "from", tmp_path / "to"}


class TestFolders:
    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        make_dirs(tmp_path / "2024" / "05" / "17")
        assert (tmp_path / "2024" / "05" / "17").is_dir()

    def test_making_what_exists_does_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"data")
        make_dirs(tmp_path)
        assert (tmp_path / "a").read_bytes() == b"data"

    def test_a_file_in_the_way_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"data")
        with pytest.raises(OSError, match="Not a directory"):
            make_dirs(tmp_path / "a" / "b")

    def test_a_missing_folder_cannot_be_synchronised(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            fsync_dir(tmp_path / "missing")

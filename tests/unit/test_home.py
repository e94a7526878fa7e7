"""The home's folders: made, checked, held by one process, and deterministic in their names."""

from datetime import UTC, datetime

import pytest

from lungwatch.daemon.home import Home
from lungwatch.errors import HomeError, Reason
from lungwatch.files import file_kind

SHA = "ab" * 32
DAY = datetime(2026, 3, 4, tzinfo=UTC)


def test_a_new_home_gets_all_its_folders(tmp_path):
    home = Home(tmp_path / "new" / "home")
    home.prepare()
    assert all(folder.is_dir() for folder in home.folders)


def test_a_home_that_cannot_be_made_says_which_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeError, match="incoming"):
        Home(tmp_path / "file").prepare()


def test_only_one_process_holds_a_home(tmp_path):
    home = Home(tmp_path)
    with home.locked(), pytest.raises(HomeError, match="another lungwatch"), home.locked():
        pass
    with home.locked():
        assert home.lock_file.exists()


def test_places_depend_on_content_and_first_arrival_only(tmp_path):
    home = Home(tmp_path)
    assert home.relative(home.done_path(SHA, DAY, ".dcm")) == f"done/2026/03/04/{SHA}.dcm"
    kept = home.quarantine_path(SHA, Reason.WRONG_BODY_PART, ".dcm")
    assert home.relative(kept) == f"quarantine/wrong_body_part/{SHA}.dcm"


def test_a_reason_that_is_none_cannot_lead_out_of_the_quarantine(tmp_path):
    kept = Home(tmp_path).quarantine_path(SHA, "../../etc", ".dcm")
    assert kept.parent == tmp_path / "quarantine" / "internal_error"


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        (b"\x89PNG\r\n\x1a\n...", ".png"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (bytes(128) + b"DICM", ".dcm"),
        (b"hello", ".bin"),
        (b"", ".bin"),
    ],
)
def test_the_extension_follows_the_content(tmp_path, head, suffix):
    path = tmp_path / "misleading.txt"
    path.write_bytes(head)
    assert file_kind(path).value == suffix

"""Litter of NAS systems, desktops and transfer programs in a drop folder is not taken."""

import json
import re
from collections import Counter

import pytest

from tests.support.waits import wait_for

LITTER = {
    "@eaDir/xray.png/SYNOPHOTO_THUMB_XL.jpg": "@eaDir",
    "#recycle/deleted.png": "#recycle",
    "$Recycle.Bin/S-1-5-21/$R7A2B3C.png": "$RECYCLE.BIN",
    "study/Thumbs.db": "Thumbs.db",
    "study/DESKTOP.INI": "desktop.ini",
    ".DS_Store": ".DS_Store",
    "._image.png": "._*",
    "~$befund.docx": "~$*",
}
UNFINISHED = {
    "IM0001.TMP": "*.tmp",
    ".png": ".*",
    "scan~": "*~",
    ".Doe^Jane/a.png": ".*",
    "study.download/b.png": "*.download",
    "c.png.!sync": "*.!sync",
    "d.png.opdownload": "*.opdownload",
    "e.png.uploading": "*.uploading",
}


EXPECTED = Counter((*LITTER.values(), *UNFINISHED.values()))


@pytest.fixture
def home(make_home, picture):
    """A home with one X-ray among images that nobody dropped, all of them old."""
    home = make_home(OPEN_TIMEOUT_S="1", RESCAN_S="0.1")
    for number, name in enumerate((*LITTER, *UNFINISHED), start=1):
        home.drop(name, picture(number), old=True)
    home.drop("study/xray.png", picture(0), old=True)
    return home


def told(log):
    """How often each pattern was logged."""
    return Counter(re.findall(r'action=skipped pattern="?([^" ]+)', log))


def test_one_x_ray_among_litter_is_one_result_and_the_rest_is_told_once(home, picture):
    """However long it lies: by the daemon, by `doctor`, and in no row."""
    with home.daemon() as daemon:
        home.wait_until_ended([picture(0)])
        wait_for(lambda: told(daemon.log()) == EXPECTED, daemon.log)
        # One more look at least, at which nothing is told again.
        home.drop("again/xray.png", picture(0))
        daemon.wait_until_said("action=duplicate")
        checks = json.loads(home.command("doctor", "--json").stdout)
        assert daemon.stop() == 0, daemon.log()
    (check,) = [check for check in checks if check["name"] == "waiting"]
    assert (check["data"]["files"], check["data"]["skipped"]) == (0, EXPECTED)
    assert "16 skipped for their names" in check["detail"]
    assert told(daemon.log()) == EXPECTED
    assert "Doe" not in daemon.log()
    assert len(home.files("incoming")) == len(LITTER) + len(UNFINISHED)
    home.assert_settled([picture(0)], arrivals=2)


def test_run_once_tells_of_what_it_leaves_and_ends_well(home, picture):
    done = home.run_once(env={"OPEN_TIMEOUT_S": "3600"})
    assert done.returncode == 0, done.stderr
    assert told(done.stderr) == EXPECTED
    assert len(home.files("incoming")) == len(LITTER) + len(UNFINISHED)
    home.assert_settled([picture(0)])


def test_a_file_is_taken_once_it_is_renamed_and_the_lists_are_the_site_s(make_home, picture):
    home = make_home(IGNORED_NAMES="cache*", UNFINISHED_NAMES="*.sending")
    home.drop("a.png.sending", picture(1), old=True)
    home.drop("Cache 1/b.png", picture(2), old=True)
    home.drop("c.part", picture(3), old=True)
    assert home.run_once().returncode == 0
    home.assert_settled([picture(3)])
    (home.incoming / "a.png.sending").rename(home.incoming / "a.png")
    assert home.run_once().returncode == 0
    home.assert_settled([picture(1), picture(3)])

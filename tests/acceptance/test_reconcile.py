"""Reconciliation: differences of folders and database are named, and repaired where certain."""

import json
import shutil
import sqlite3
from contextlib import closing
from hashlib import sha256

import pytest


@pytest.fixture(scope="module")
def settled(make_home, sample, picture):
    home = make_home()
    home.drop("leg.dcm", sample("RG3_J2KI.dcm"), old=True)
    home.drop("chest.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    return home


@pytest.fixture
def home(make_home, settled):
    """A copy of a home in which all is well: a home can be moved."""
    copy = make_home()
    shutil.copytree(settled.root, copy.root, dirs_exist_ok=True)
    return copy


@pytest.fixture
def done(home, picture):
    return home.root / home.row(picture(1)).path


@pytest.fixture
def overlay(home, picture):
    return home.root / home.row(picture(1)).overlay


def only_difference(home, *args):
    status, report = home.reconcile(*args)
    (difference,) = report["differences"]
    assert status == (0 if difference["mended"] else 1)
    assert report["agrees"] is difference["mended"]
    return difference


def tree(home):
    folders = ("incoming", "work", "done", "quarantine", "overlays")
    return {path: path.read_bytes() for path in home.files(*folders)}, home.rows()


def test_a_home_in_which_all_is_well_agrees(home, sample, picture):
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])
    status, report = home.reconcile()
    assert status == 0
    assert (report["results"], report["files"], report["overlays"]) == (2, 2, 1)
    said = home.command("reconcile")
    assert said.returncode == 0
    assert "agree" in said.stdout


def test_a_stray_file_goes_back_to_the_drop_folder_and_gets_its_end(home, done, sample, picture):
    done.with_name("stray.png").write_bytes(picture(2))
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("unknown_file", True)
    assert len(home.files("incoming")) == 1
    assert home.run_once().returncode == 0
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1), picture(2)])


def test_an_extra_copy_is_removed(home, done, sample, picture):
    shutil.copy(done, done.with_name("copy.png"))
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("extra_copy", True)
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])


def test_a_missing_file_is_reported_until_it_is_dropped_again(home, done, sample, picture):
    done.unlink()
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("missing_file", False)
    assert difference["path"] == str(done.relative_to(home.root))
    home.drop("again.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    assert done.read_bytes() == picture(1)
    assert home.reconcile()[0] == 0


def test_a_file_that_was_moved_within_done_finds_back(home, done):
    elsewhere = home.root / "done" / "elsewhere.png"
    done.rename(elsewhere)
    status, report = home.reconcile()
    assert status == 1
    assert {item["kind"] for item in report["differences"]} == {"missing_file", "unknown_file"}
    assert home.run_once().returncode == 0
    assert home.reconcile()[0] == 0
    assert done.exists()


def test_altered_bytes_are_reported_until_the_original_is_dropped_again(home, done, picture):
    done.write_bytes(picture(1)[:-1] + b"x")
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("wrong_content", False)
    home.drop("again.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    assert done.read_bytes() == picture(1)
    assert home.reconcile()[0] == 0


def test_a_missing_overlay_is_reported(home, overlay):
    overlay.unlink()
    assert only_difference(home)["kind"] == "missing_overlay"


def test_a_changed_overlay_is_reported(home, overlay):
    overlay.write_bytes(overlay.read_bytes() + b"x")
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("wrong_overlay", False)
    assert difference["path"] == str(overlay.relative_to(home.root))
    assert "its bytes changed" in difference["remedy"]


def test_exchanged_overlays_are_reported_with_the_result_that_each_belongs_to(make_home, picture):
    home = make_home()
    for number in (1, 2):
        home.drop(f"{number}.png", picture(number), old=True)
    assert home.run_once().returncode == 0
    first, second = (home.row(picture(number)) for number in (1, 2))
    one, other = (home.root / row.overlay for row in (first, second))
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(before)
    status, report = home.reconcile()
    assert status == 1
    found = {(item["result_id"], item["kind"]) for item in report["differences"]}
    assert found == {(first.id, "wrong_overlay"), (second.id, "wrong_overlay")}
    (of_first,) = [d for d in report["differences"] if d["result_id"] == first.id]
    assert f"it is that of result {second.id}" in of_first["remedy"]


def test_the_digest_of_an_overlay_is_shown_and_that_of_an_earlier_version_is_not_asked_for(
    home, overlay, picture
):
    number = str(home.row(picture(1)).id)
    shown = json.loads(home.command("results", "show", number, "--json").stdout)
    assert shown["overlay_sha256"] == sha256(overlay.read_bytes()).hexdigest()
    with closing(sqlite3.connect(home.root / "lungwatch.db")) as connection, connection:
        connection.execute("UPDATE result SET overlay_sha256 = NULL")
    overlay.write_bytes(b"changed")
    assert home.reconcile()[0] == 0


def test_an_overlay_that_no_row_names_is_removed(home, overlay):
    other = overlay.with_name("other.png")
    shutil.copy(overlay, other)
    difference = only_difference(home)
    assert (difference["kind"], difference["mended"]) == ("unknown_overlay", True)
    assert not other.exists()
    assert overlay.exists()


def test_what_a_crash_left_is_named_until_a_start_finishes_it(home, picture):
    home.drop("x.png", picture(2), old=True)
    assert home.run_once(env={"CRASH_AT": "classified"}).returncode < 0
    status, report = home.reconcile()
    assert status == 1
    assert {item["kind"] for item in report["differences"]} >= {"unfinished", "left_in_work"}
    assert home.run_once().returncode == 0
    assert home.reconcile()[0] == 0


def test_a_dry_run_changes_nothing(home, done, overlay, picture):
    done.with_name("stray.png").write_bytes(picture(2))
    shutil.copy(done, done.with_name("copy.png"))
    shutil.copy(overlay, overlay.with_name("other.png"))
    before = tree(home)
    status, report = home.reconcile("--dry-run")
    assert status == 1
    assert {(item["kind"], item["mended"]) for item in report["differences"]} == {
        ("unknown_file", False),
        ("extra_copy", False),
        ("unknown_overlay", False),
    }
    assert tree(home) == before


def test_while_a_daemon_runs_nothing_is_mended(home, done, picture):
    with home.daemon():
        done.with_name("stray.png").write_bytes(picture(2))
        said = home.command("reconcile", "--json")
        assert said.returncode == 1
        report = json.loads(said.stdout)
        assert report["daemon_running"] is True
        assert [(item["kind"], item["mended"]) for item in report["differences"]] == [
            ("unknown_file", False)
        ]
        assert done.with_name("stray.png").exists()


def test_where_there_is_no_home_it_says_so(home):
    said = home.command("reconcile", "--home", str(home.root / "nowhere"), with_home=False)
    assert said.returncode == 1
    assert "no lungwatch home" in said.stderr
    assert not (home.root / "nowhere").exists()


def test_an_object_that_no_destination_waits_for_is_removed(home):
    stray = home.root / "outbox" / "2.25.1.dcm"
    stray.write_bytes(b"left behind")
    difference = only_difference(home)
    assert (difference["kind"], difference["path"]) == ("unknown_object", "outbox/2.25.1.dcm")
    assert not stray.exists()

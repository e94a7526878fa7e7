"""A zip archive's files each have an end of their own, once, through crashes too."""

import io
import json
import signal
import zipfile

import pytest


def zipped(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content, **options)
    return buffer.getvalue()


@pytest.fixture
def study(sample, picture):
    """Files of two studies under names that would like to leave the folder."""
    return {
        "study1/chest": sample("RG1_UNCR.dcm"),
        "study2/leg.dcm.part": sample("RG3_J2KI.dcm"),
        "../../outside.png": picture(1),
        "/etc/passwd.png": picture(2),
        "study2/DICOMDIR": sample("DICOMDIR"),
        "study2/chest": picture(3),
        "Brustkorb/Röntgen vom 1.3.png": picture(4),
    }


def assert_unpacked(home, archive, study):
    home.assert_settled([archive, *study.values()])
    row = home.row(archive)
    assert (row.state, row.reason, row.probability) == ("done", "unpacked", None)
    assert row.path.startswith("done/")
    assert row.path.endswith(".zip")
    states = {name: home.row(content).state for name, content in study.items()}
    assert states == {
        "study1/chest": "done",
        "study2/leg.dcm.part": "rejected",
        "../../outside.png": "done",
        "/etc/passwd.png": "done",
        "study2/DICOMDIR": "rejected",
        "study2/chest": "done",
        "Brustkorb/Röntgen vom 1.3.png": "done",
    }
    assert home.row(study["study2/DICOMDIR"]).reason == "media_directory"
    assert home.files("incoming") == home.files(".unpacking") == []
    assert not list(home.root.parent.rglob("outside*"))


def test_each_file_of_an_archive_has_its_own_end(make_home, study):
    home = make_home()
    litter = ("__MACOSX/._chest", "study1/.DS_Store", "study1/Thumbs.db", "@eaDir/x/THUMB.jpg")
    archive = zipped({**study, **dict.fromkeys(litter, b"junk")})
    home.drop("studies.zip", archive, old=True)
    done = home.run_once()
    assert done.returncode == 0, done.stderr
    assert_unpacked(home, archive, study)
    assert "outside" not in done.stderr  # a file's name may be a patient's
    assert done.stderr.count("action=unpacked") == 1
    listed = home.results()
    names = {row["source_name"].rpartition("/")[2] for row in listed}
    assert names == {
        "studies.zip",
        "chest",
        "chest-2",
        "leg.dcm.part_",
        "outside.png",
        "passwd.png",
        "DICOMDIR",
        "Röntgen vom 1.3.png",
    }
    (packed,) = [row for row in listed if row["reason"] == "unpacked"]
    assert (packed["status"], packed["label"], packed["delivery"]) == ("done", None, None)
    assert "rejected" not in packed["message"]
    counted = json.loads(home.command("results", "stats", "--json").stdout)
    assert counted["by_status"] == {"done": 6, "rejected": 2}


def test_an_archive_dropped_again_is_known_and_its_files_do_not_come_twice(make_home, study):
    home = make_home()
    archive = zipped(study)
    for name in ("first.zip", "second.zip"):
        home.drop(name, archive, old=True)
        assert home.run_once().returncode == 0
    assert home.row(archive).arrivals == 2
    assert {home.row(content).arrivals for content in study.values()} == {1}
    assert home.reconcile()[0] == 0


@pytest.mark.parametrize("point", ["unpacked", "recorded", "filed"])
def test_killed_around_the_unpacking_no_file_is_lost_or_comes_twice(make_home, study, point):
    home = make_home()
    archive = zipped(study)
    home.drop("studies.zip", archive, old=True)
    assert home.run_once(env={"CRASH_AT": point}).returncode == -signal.SIGKILL
    again = home.run_once()
    assert again.returncode == 0, again.stderr
    assert_unpacked(home, archive, study)


def test_nothing_unpacked_can_be_reached_by_those_who_drop_before_it_is_recorded(make_home, study):
    """Until then they could exchange what the record is about to name."""
    home = make_home()
    home.drop("studies.zip", zipped(study), old=True)
    assert home.run_once(env={"CRASH_AT": "unpacked"}).returncode == -signal.SIGKILL
    assert home.files("incoming") == []
    assert len(home.files(".unpacking")) == len(study)


def test_archives_that_cannot_be_trusted_are_refused_whole(make_home, picture):
    home = make_home()
    inner = zipped({"a.png": picture(3)})
    encrypted = bytearray(zipped({"secret.png": picture(4)}))
    for start in (encrypted.index(b"PK\x03\x04") + 6, encrypted.index(b"PK\x01\x02") + 8):
        encrypted[start] |= 1
    whole = zipped({"c.png": picture(5)})
    broken = bytearray(whole)
    broken[60] ^= 0xFF
    contents = {
        "bomb": (zipped({"bomb": bytes(80_000_000)}), "plausible"),
        "nested": (zipped({"b.png": picture(6), "inner.zip": inner}), "another archive"),
        "encrypted": (bytes(encrypted), "encrypted"),
        "broken": (bytes(broken), "damaged"),
        "cut off": (whole[:-30], "damaged"),
        "hidden": (zipped({"__MACOSX/x": b"junk"}), "no files"),
    }
    for name, (content, _) in contents.items():
        home.drop(f"{name}.zip", content, old=True)
    done = home.run_once()
    assert done.returncode == 0, done.stderr
    home.assert_settled([content for content, _ in contents.values()])
    for content, named in contents.values():
        row = home.row(content)
        assert (row.state, row.reason) == ("rejected", "bad_archive")
        assert named in (row.message or "")
    assert list(home.incoming.iterdir()) == []

"""Races against the claim: a user of the drop folder reaches no file outside of it."""

import os
from types import SimpleNamespace

import pytest

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake import watch
from lungwatch.daemon.intake.claims import Claimer, open_beneath
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.daemon.intake.watch import DropScan
from lungwatch.daemon.retry import Outages
from tests.support.clock import ManualClock


@pytest.fixture
def place(tmp_path):
    """A home, a claimer without a database, and a folder that is none of its business."""
    home = Home(tmp_path / "home")
    home.prepare()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(b"precious")
    context = SimpleNamespace(
        home=home,
        store=None,
        writer=SimpleNamespace(call=lambda _: pytest.fail("it was claimed")),
        outages=Outages(),
        clock=ManualClock(),
    )
    claimer = Claimer(
        context,
        None,
        model_id=1,
        is_known=lambda _: pytest.fail("nothing is known"),
        recorded_at=lambda _: None,
    )
    return SimpleNamespace(home=home, outside=outside, claimer=claimer)


def test_a_file_behind_a_link_in_its_folder_s_place_is_not_taken(place):
    """Between look and claim the folder becomes a link to where other files lie."""
    (place.home.incoming / "study").symlink_to(place.outside)
    with pytest.raises(FileNotFoundError):
        place.claimer.take(place.home.incoming / "study" / "x.png")
    assert (place.outside / "x.png").read_bytes() == b"precious"
    assert list(place.home.work.iterdir()) == []


@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "fifo"])
def test_what_is_no_file_any_more_is_neither_followed_nor_waited_for(place, kind):
    path = place.home.incoming / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(place.outside / ("x.png" if kind == "link to a file" else "nothing"))
    assert place.claimer.take(path) is None
    assert path.is_fifo() if kind == "fifo" else path.is_symlink()
    assert (place.outside / "x.png").read_bytes() == b"precious"
    assert list(place.home.work.iterdir()) == []


def test_a_file_is_not_given_back_through_a_link_in_its_folder_s_place(place):
    """Else the dropper would write a file of any name into the daemon's home."""
    taken = place.home.work / "0123456789" / "lungwatch.toml"
    taken.parent.mkdir()
    taken.symlink_to("nothing")
    (place.home.incoming / "study").symlink_to(place.outside)
    place.claimer._give_back(taken, "study/lungwatch.toml")
    assert {path.name for path in place.outside.iterdir()} == {"x.png"}
    assert (place.home.incoming / "lungwatch.toml").is_symlink()


def test_a_file_whose_other_name_is_open_for_writing_is_given_back(place):
    """It would be filed in a state that nobody meant it to have."""
    os.link(place.outside / "x.png", place.home.incoming / "x.png")
    with (place.outside / "x.png").open("r+b") as file:
        assert place.claimer.take(place.home.incoming / "x.png") is None
        file.write(b"changed ")
    assert (place.home.incoming / "x.png").read_bytes() == b"changed "
    assert list(place.home.work.iterdir()) == []


def test_no_way_out_of_a_folder_is_gone(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for way in ("..", "file", "loop", "missing"):
        with pytest.raises(FileNotFoundError), open_beneath(tmp_path, tmp_path.__class__(way)):
            pass


def test_a_file_too_large_to_read_keeps_no_other_waiting(place, monkeypatch):
    """A sparse file costs its dropper nothing, and would cost the daemon hours to hash."""
    said = []
    monkeypatch.setattr(watch, "event", lambda *_, **fields: said.append(fields["reason"]))
    found = DropScan(
        place.home.incoming,
        NameRules(),
        skip_log_s=30.0,
        clock=ManualClock(),
        beat=lambda: None,
    )
    (place.home.incoming / "normal").write_bytes(b"x")
    (place.home.incoming / "sparse").write_bytes(b"x")
    os.truncate(place.home.incoming / "sparse", 9 << 30)
    for _ in range(2):
        assert [path.name for path, _ in found.files()] == ["normal"]
    assert said == ["larger than 8 GiB"]
    assert len(found.unusable) == 1

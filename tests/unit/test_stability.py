"""Completeness of dropped files, tested without waiting."""

from dataclasses import replace
from pathlib import Path

import pytest

from lungwatch.daemon.intake.eligibility import CompletenessCheck, Hint, Snapshot, WriterState

PATH = Path("incoming/x.dcm")
YOUNG = Snapshot(size_bytes=100, mtime_ns=1, inode=7, age_s=0.0)


@pytest.fixture
def stability() -> CompletenessCheck:
    return CompletenessCheck(stability_s=1.0, open_timeout_s=30.0)


@pytest.mark.parametrize("hint", [Hint.CLOSED, Hint.COMPLETE])
def test_a_close_or_a_rename_makes_a_file_complete_at_once(stability, hint):
    stability.hint(PATH, hint)
    stability.observe(PATH, YOUNG, 0.0)
    assert stability.is_complete(PATH, WriterState.UNKNOWN, 0.0)


@pytest.mark.parametrize("hint", [Hint.CLOSED, Hint.APPEARED])
def test_a_writer_that_closes_between_chunks_is_waited_for(hint):
    """One that sets the modification time back, as copying programs do, is too."""
    stability = CompletenessCheck(stability_s=1.0, open_timeout_s=30.0, closes_often=True)
    for chunk in range(5):
        now_s = 0.9 * chunk
        seen = replace(YOUNG, size_bytes=100 * (chunk + 1), age_s=1e6, inode_age_s=0.0)
        stability.hint(PATH, hint)
        stability.observe(PATH, seen, now_s)
        assert not stability.is_complete(PATH, WriterState.NONE, now_s)
        assert not stability.is_complete(PATH, WriterState.NONE, now_s + 0.89)
    assert stability.is_complete(PATH, WriterState.NONE, 0.9 * 4 + 1.01)
    stability.hint(PATH, Hint.COMPLETE)
    assert stability.is_complete(PATH, WriterState.NONE, 0.9 * 4)


def test_a_file_that_somebody_holds_open_is_never_complete(stability):
    stability.hint(PATH, Hint.COMPLETE)
    stability.observe(PATH, replace(YOUNG, age_s=1e6), 0.0)
    assert not stability.is_complete(PATH, WriterState.PRESENT, 1e6)


def test_without_a_hint_a_file_must_be_unchanged_for_the_stability_time(stability):
    stability.observe(PATH, YOUNG, 0.0)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 0.9)
    stability.observe(PATH, replace(YOUNG, size_bytes=200), 0.9)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 1.5)
    assert stability.is_complete(PATH, WriterState.UNKNOWN, 1.95)


def test_an_old_file_that_nobody_has_open_is_complete_at_first_sight(stability):
    stability.observe(PATH, replace(YOUNG, age_s=60.0), 0.0)
    assert stability.is_complete(PATH, WriterState.NONE, 0.0)


def test_an_old_time_stamp_proves_nothing_where_the_kernel_does_not_tell(stability):
    stability.observe(PATH, replace(YOUNG, age_s=60.0), 0.0)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 0.5)


def test_a_stalled_writer_that_was_seen_writing_is_waited_for(stability):
    stability.hint(PATH, Hint.WRITING)
    stability.observe(PATH, YOUNG, 0.0)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 29.0)
    assert stability.is_complete(PATH, WriterState.UNKNOWN, 30.0)


def test_writing_after_a_close_withdraws_the_close(stability):
    stability.observe(PATH, YOUNG, 0.0)
    stability.hint(PATH, Hint.COMPLETE)
    stability.hint(PATH, Hint.WRITING)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 1.0)


def test_an_empty_file_gets_time_to_be_filled_even_when_closed(stability):
    stability.hint(PATH, Hint.COMPLETE)
    stability.observe(PATH, replace(YOUNG, size_bytes=0), 0.0)
    assert not stability.is_complete(PATH, WriterState.NONE, 0.5)
    assert stability.is_complete(PATH, WriterState.NONE, 1.0)


def test_a_vanished_file_is_forgotten_with_its_hints(stability):
    stability.observe(PATH, YOUNG, 0.0)
    stability.hint(PATH, Hint.COMPLETE)
    stability.keep_only([])
    stability.observe(PATH, YOUNG, 5.0)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 5.5)


def test_a_clock_that_jumped_back_does_not_make_a_file_complete(stability):
    stability.observe(PATH, replace(YOUNG, age_s=-3600.0), 0.0)
    assert not stability.is_complete(PATH, WriterState.NONE, 0.5)
    assert stability.is_complete(PATH, WriterState.NONE, 1.0)


def test_a_file_that_was_moved_in_is_complete_at_once_where_nobody_writes(stability):
    stability.hint(PATH, Hint.APPEARED)
    stability.observe(PATH, YOUNG, 0.0)
    assert not stability.is_complete(PATH, WriterState.UNKNOWN, 0.0)
    assert not stability.is_complete(PATH, WriterState.PRESENT, 0.0)
    assert stability.is_complete(PATH, WriterState.NONE, 0.0)

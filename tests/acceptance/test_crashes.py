"""Killed at any moment, the next start makes good: one result, one file, nothing between."""

import random
import signal
import time

import pytest

from lungwatch.daemon.crashpoint import CRASH_POINTS

SIGKILLED = -signal.SIGKILL
STREAM = 60
ROUNDS = 6


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_killed_at_a_durable_step_the_next_start_finishes(make_home, sample, point):
    """Of the X-ray and the leg, each has one result, one arrival, one file; `reconcile` agrees."""
    home = make_home()
    chest, leg = sample("RG1_UNCR.dcm"), sample("RG3_J2KI.dcm")
    home.drop("chest.dcm", chest, old=True)
    home.drop("leg.dcm", leg, old=True)
    assert home.run_once(env={"CRASH_AT": point}).returncode == SIGKILLED

    again = home.run_once()
    assert again.returncode == 0, again.stderr
    home.assert_settled([chest, leg])
    assert [home.row(content).state for content in (chest, leg)] == ["done", "rejected"]
    assert home.files("incoming") == []


def test_a_file_that_kills_the_process_every_time_is_given_up(make_home, picture):
    """After `max_attempts` starts it is in quarantine, and the next start does not die of it."""
    home = make_home(MAX_ATTEMPTS="3")
    poisoned = picture(1)
    home.drop("poisoned.png", poisoned, old=True)
    poison = {"CRASH_AT": "decoded"}
    for attempt in (1, 2, 3):
        assert home.run_once(env=poison).returncode == SIGKILLED
        assert home.row(poisoned).attempts == attempt
    for _ in range(2):
        assert home.run_once(env=poison).returncode == 0
        row = home.row(poisoned)
        assert (row.state, row.reason) == ("failed", "crashed_repeatedly")
    home.assert_settled([poisoned])

    retried = home.command("retry", "--failed")
    assert retried.returncode == 0, retried.stderr
    assert home.run_once().returncode == 0
    assert home.row(poisoned).state == "done"
    home.assert_settled([poisoned])


def test_given_up_is_only_what_kills(make_home, picture):
    """A crash takes its neighbours along; a restart finishes them all the same."""
    home = make_home(MAX_ATTEMPTS="3")
    contents = [picture(number) for number in range(5)]
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content, old=True)
    for _ in range(2):
        assert home.run_once(env={"CRASH_AT": "recorded"}).returncode == SIGKILLED
    assert home.run_once().returncode == 0
    assert {row.state for row in home.rows()} == {"done"}
    home.assert_settled(contents)


def test_killed_while_a_stream_comes_in_nothing_is_lost_or_doubled(make_home, picture):
    home = make_home(MAX_ATTEMPTS="100", MIN_FREE_MB="0")
    contents = [picture(number) for number in range(STREAM)]
    waiting = list(enumerate(contents))
    # The moments differ between machines anyway; the seed keeps them apart from each other.
    moments = random.Random(20260101)
    with home.daemon() as daemon:
        daemon.kill()  # the database is made: what is killed from here on is work
    for _ in range(ROUNDS):
        # Some starts are killed before they are ready, while they recover.
        daemon = home.daemon().launch()
        killed_s = time.monotonic() + moments.uniform(0.5, 4)
        while time.monotonic() < killed_s:
            if waiting and moments.random() < 0.2:
                number, content = waiting.pop()
                home.drop(f"{number}.png", content)
            time.sleep(0.01)
        assert daemon.kill() == SIGKILLED, daemon.stderr()
    for number, content in waiting:
        home.drop(f"{number}.png", content)
    last = home.run_once()
    assert last.returncode == 0, last.stderr
    assert {row.state for row in home.rows()} == {"done"}
    assert home.files("incoming") == []
    home.assert_settled(contents)

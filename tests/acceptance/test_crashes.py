"""Killed at any moment, the next start makes good: one result, one file, nothing between."""

import random
import signal
import time

import cv2
import numpy as np
import pytest

from lungwatch.daemon.stage import CRASH_POINTS

SIGKILLED = -signal.SIGKILL
STREAM = 60
ROUNDS = 6
INNOCENT = 8
# In archives, with what was sent by lungwatch, and in sending: crashed in the tests of those.
ELSEWHERE = ("unpacked", "own_object", "packed", "stored")


def large_png(upper, lower):
    pixels = np.full((8000, 8000), lower, np.uint8)
    pixels[:4000] = upper
    is_encoded, data = cv2.imencode(".png", pixels)
    assert is_encoded
    return data.tobytes()


@pytest.mark.parametrize("point", [point for point in CRASH_POINTS if point not in ELSEWHERE])
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
    assert home.run_once(env=poison).returncode == 0
    row = home.row(poisoned)
    assert (row.state, row.reason) == ("failed", "crashed_repeatedly")
    home.assert_settled([poisoned])

    retried = home.command("retry", "--failed")
    assert retried.returncode == 0, retried.stderr
    assert home.run_once().returncode == 0
    assert home.row(poisoned).state == "done"
    home.assert_settled([poisoned])


def test_given_up_is_only_what_kills_not_its_neighbours(make_home):
    """All that is in hand goes down with the process, and is finished by the next starts."""
    home = make_home(MAX_ATTEMPTS="3", DECODE_WORKERS="1")
    # Large, so that all are claimed by the time that the first has been decoded. Those of one
    # grey are refused before they get to the point that kills.
    killer = large_png(200, 100)
    innocent = [large_png(level, level) for level in range(INNOCENT)]
    home.drop("0.png", killer, old=True)
    for number, content in enumerate(innocent):
        home.drop(f"{number + 1}.png", content, old=True)
    while home.run_once(env={"CRASH_AT": "classified"}).returncode == SIGKILLED:
        assert home.row(killer).attempts <= 3
    assert home.row(killer).reason == "crashed_repeatedly"
    assert {home.row(content).reason for content in innocent} == {"no_contrast"}
    home.assert_settled([killer, *innocent])


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
        assert daemon.kill() == SIGKILLED, daemon.log()
    for number, content in waiting:
        home.drop(f"{number}.png", content)
    last = home.run_once()
    assert last.returncode == 0, last.stderr
    assert {row.state for row in home.rows()} == {"done"}
    assert home.files("incoming") == []
    home.assert_settled(contents)

"""Retries: refused and failed files are processed again, and end again."""

import pytest


@pytest.fixture
def home(make_home, sample, picture):
    """One file of each end but `failed`."""
    home = make_home()
    home.drop("leg.dcm", sample("RG3_J2KI.dcm"), old=True)
    home.drop("chest.png", picture(1), old=True)
    assert home.run_once().returncode == 0
    return home


def leg(home):
    (row,) = [row for row in home.rows() if row.state != "done"]
    return row


def test_a_rejected_file_is_rejected_again(home, sample, picture):
    before = leg(home)
    assert home.command("retry", str(before.id)).returncode == 0
    assert leg(home).state == "queued"
    assert home.run_once().returncode == 0
    assert leg(home) == before  # one more run, and neither a new arrival nor another attempt
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])


def test_what_the_policy_refused_is_scored_when_the_policy_has_changed(home, sample, picture):
    assert home.command("retry", leg(home).sha256[:12]).returncode == 0
    assert home.run_once(env={"BODY_PARTS": "CHEST,EXTREMITY"}).returncode == 0
    row = home.row(sample("RG3_J2KI.dcm"))
    assert (row.state, row.reason, row.arrivals) == ("done", None, 1)
    assert home.files("quarantine") == []
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])


def test_a_running_daemon_takes_a_retry_up(home, sample, picture):
    before = {result["id"]: result["finished_at"] for result in home.results()}
    with home.daemon() as daemon:
        assert home.command("retry", str(leg(home).id)).returncode == 0
        home.wait_until_ended([sample("RG3_J2KI.dcm")])
        assert daemon.stop() == 0
    after = {result["id"]: result["finished_at"] for result in home.results()}
    changed = {number for number in before if after[number] != before[number]}
    assert changed == {leg(home).id}
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])


def test_a_retry_that_is_killed_is_finished_by_the_next_start(home, sample, picture):
    before = leg(home)
    assert home.command("retry", str(before.id)).returncode == 0
    assert home.run_once(env={"CRASH_AT": "renamed"}).returncode < 0
    assert home.run_once(env={"CRASH_AT": "claimed"}).returncode < 0
    assert home.run_once(env={"CRASH_AT": "quarantined"}).returncode < 0
    assert home.run_once().returncode == 0
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])
    assert leg(home).state == "rejected"


def test_dropping_a_rejected_file_again_changes_nothing(home, sample, picture):
    before = leg(home)
    home.drop("leg again.dcm", sample("RG3_J2KI.dcm"), old=True)
    assert home.run_once().returncode == 0
    after = leg(home)
    assert (after.state, after.arrivals) == ("rejected", 2)
    assert after.path == before.path
    assert home.files("incoming", "work") == []


def test_a_retry_is_run_by_the_model_that_is_there(home, newer_bundle, sample, picture):
    assert home.command("retry", str(leg(home).id)).returncode == 0
    policy = {"MODEL": str(newer_bundle), "BODY_PARTS": "CHEST,EXTREMITY"}
    assert home.run_once(env=policy).returncode == 0
    home.assert_settled([sample("RG3_J2KI.dcm"), picture(1)])
    assert {row.state for row in home.rows()} == {"done"}


def test_a_retry_that_another_model_has_overtaken_does_not_keep_the_daemon_busy(
    home, newer_bundle, sample
):
    """The old model's row waits for the old model; the new one's is done and stays it."""
    old = leg(home)
    policy = {"MODEL": str(newer_bundle), "BODY_PARTS": "CHEST,EXTREMITY"}
    home.drop("leg again.dcm", sample("RG3_J2KI.dcm"), old=True)
    assert home.run_once(env=policy).returncode == 0
    assert home.command("retry", str(old.id)).returncode == 0
    assert home.run_once(env=policy).returncode == 0
    states = {row.id: row.state for row in home.rows() if row.sha256 == old.sha256}
    assert states.pop(old.id) == "queued"
    assert set(states.values()) == {"done"}
    assert home.kept()[old.sha256] == 1


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        ([], 2, "--failed"),
        (["1", "--failed"], 2, "--failed"),
        (["4711"], 1, "no result '4711'"),
    ],
)
def test_a_retry_of_nothing_says_what_is_wrong(home, args, status, said):
    refused = home.command("retry", *args)
    assert refused.returncode == status
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_is_done_is_not_put_through_again(home, picture):
    refused = home.command("retry", str(home.row(picture(1)).id))
    assert refused.returncode == 1
    assert "is done" in refused.stderr
    assert home.row(picture(1)).state == "done"

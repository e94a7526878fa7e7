"""The daemon as a monitoring system sees it, over its real port."""

import http.client
import json
import os
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lungwatch.daemon.config import Config
from lungwatch.daemon.monitor.health import run_checks
from tests.support.peers import free_port, is_listening
from tests.support.waits import PATIENCE_S, wait_for

_RUNNING = ("daemon", "health", "waiting", "last result")


@pytest.fixture
def port():
    return free_port()


def get(port, path, method="GET", host="127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def wait_until_listening(daemon, port):
    daemon.wait_for(lambda: is_listening(port) or not daemon.is_running)
    assert daemon.is_running, daemon.log()


def files_of(text):
    return {
        (sample.labels["end"], sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "lungwatch_files_total"
    }


def test_metrics_health_textfile_and_json_log_tell_the_truth(make_home, picture, port):
    home = make_home(METRICS_PORT=str(port), LOG_FORMAT="json")
    textfile = home.root.parent / "lungwatch.prom"
    home.env["METRICS_TEXTFILE"] = str(textfile)
    contents = [picture(1), b"no picture at all"]
    daemon = home.daemon().launch()
    try:
        wait_until_listening(daemon, port)
        for number, content in enumerate(contents):
            home.drop(f"DOE^JANE-{number}.png", content)
        home.wait_until_ended(contents)
        recorded = {(row.state, row.reason or ""): 1.0 for row in home.rows()}
        assert len(recorded) == 2
        status, text = get(port, "/metrics")
        assert status == 200
        assert files_of(text) == recorded
        assert 'lungwatch_stage_seconds_count{stage="decode"}' in text
        status, body = get(port, "/health")
        told = json.loads(body)
        assert (status, told["status"], told["reasons"]) == (200, "ok", [])
        assert told["database"]
        assert told["model"] in text
        assert get(port, "/ready")[0] == 200
        assert get(port, "/etc/passwd")[0] == 404
        assert get(port, "/metrics", method="POST")[0] == 501
        assert get(port, "/metrics", host="evil.example")[0] == 403
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert files_of(textfile.read_text()) == recorded
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    (stopped,) = [line for line in lines if line["action"] == "stopped"]
    assert (stopped["ended"], stopped["left"]) == (2, 0)
    assert {"ready", "stopped"} <= {line["action"] for line in lines}
    assert "DOE" not in daemon.log() + textfile.read_text() + text


def wait_for_reason(daemon, port, code):
    """Return what /health says once it gives a reason."""
    asked = []

    def has_come():
        status, body = get(port, "/health")
        asked[:] = status, json.loads(body)
        return code in {reason["code"] for reason in asked[1]["reasons"]}

    wait_for(has_come, lambda: f"{asked} {daemon.log()}")
    return asked


def wait_until_well(daemon, port):
    wait_for(lambda: get(port, "/health")[0] == 200, daemon.log)


def test_health_is_503_while_another_program_locks_the_database_and_during_the_drain(
    make_home, picture, port
):
    """What is left alone, a link here, has no end: it is not counted as ended."""
    home = make_home(METRICS_PORT=str(port), DRAIN_S="60", LOG_FORMAT="json")
    (home.incoming / "link.png").symlink_to("nowhere")
    daemon = home.daemon().launch()
    try:
        wait_until_listening(daemon, port)
        wait_for_reason(daemon, port, "left_alone")
        assert get(port, "/health")[0] == 200
        with closing(sqlite3.connect(home.root / "lungwatch.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert wait_for_reason(daemon, port, "database")[0] == 503
            assert "lungwatch_database_up 0.0" in get(port, "/metrics")[1]
            home.drop("x.png", picture(1), old=True)
            status, told = wait_for_reason(daemon, port, "outage_database")
            assert (status, told["outages"]) == (503, ["database"])
            assert get(port, "/ready")[0] == 200
            daemon.process.send_signal(signal.SIGTERM)
            assert wait_for_reason(daemon, port, "stopping")[0] == 503
            assert get(port, "/ready") == (503, "stopping\n")
            other.rollback()
        assert daemon.process.wait(PATIENCE_S) == 0, daemon.log()
    finally:
        daemon.kill()
    last = json.loads(daemon.log().splitlines()[-1])
    assert (last["action"], last["left"]) == ("stopped", 0)
    assert last["ended"] == len([row for row in home.rows() if row.has_ended])


@pytest.fixture
def small_disk(make_home, port):
    """A home on a file system of its own, of 64 MiB."""
    home = make_home(MIN_FREE_MB="30", METRICS_PORT=str(port))
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(home.root)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    home.incoming.mkdir()
    yield home
    subprocess.run(["umount", "--lazy", str(home.root)], check=True)


def test_health_is_503_below_the_watermark_and_without_the_drop_folder(small_disk, port):
    home = small_disk
    with home.daemon() as daemon:
        wait_until_well(daemon, port)
        ballast = home.root / "ballast"
        ballast.write_bytes(bytes(40 << 20))
        status, told = wait_for_reason(daemon, port, "disk")
        assert (status, told["min_free_mb"]) == (503, 30)
        assert told["disk_free_mb"] < 30
        ballast.unlink()
        wait_until_well(daemon, port)
        home.incoming.rename(home.root / "away")
        assert wait_for_reason(daemon, port, "folders")[0] == 503
        (home.root / "away").rename(home.incoming)
        wait_until_well(daemon, port)
        assert daemon.stop() == 0


def test_doctor_shows_the_running_daemon_and_one_that_hangs(make_home, picture, port):
    home = make_home(METRICS_PORT=str(port))
    config = Config(
        home=home.root, database_url=f"sqlite:///{home.root / 'lungwatch.db'}", metrics_port=port
    )

    def found():
        return {check.name: check for check in run_checks(config, _RUNNING)}

    with home.daemon() as daemon:
        home.drop("x.png", picture(1))
        home.wait_until_ended([picture(1)])
        checks = found()
        assert checks["daemon"].data["pid"] == daemon.process.pid
        assert checks["health"].ok, checks["health"]
        assert checks["health"].data["status"] == "ok"
        assert checks["last result"].data["last_done"] is not None
        assert checks["waiting"].data["files"] == 0
        assert checks["outbox"].data["waiting"] == 0
        daemon.suspend()
        home.drop("y.png", picture(2))
        said = home.command("doctor", "--json")
        daemon.resume()
        hung = {check["name"]: check for check in json.loads(said.stdout)}
        assert said.returncode == 1
        assert {n for n, check in hung.items() if check["ok"] is False} == {"daemon", "health"}
        assert hung["daemon"]["data"]["pid"] == daemon.process.pid
        assert hung["waiting"]["data"]["files"] == 1
        assert hung["waiting"]["data"]["oldest_s"] >= 0
        home.wait_until_ended([picture(2)])
        assert daemon.stop() == 0
    assert found()["daemon"].data is None


def test_the_commands_that_run_alone_log_in_the_configured_form(make_home):
    home = make_home(LOG_FORMAT="json")
    assert home.run_once().returncode == 0
    for command, action in ((("backup", "create"), "backup"), (("retention", "run"), "retention")):
        said = home.command(*command)
        assert said.returncode == 0, said.stderr
        assert [json.loads(line)["action"] for line in said.stderr.splitlines()] == [action]

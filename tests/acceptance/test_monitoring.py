"""The daemon as a monitoring system sees it, over its real port."""

import http.client
import json
import socket
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def get(port, path, method="GET", host="127.0.0.1"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(daemon, port):
    deadline = time.monotonic() + 60
    while not is_listening(port):
        assert daemon.process.poll() is None, daemon.stderr()
        assert time.monotonic() < deadline, daemon.stderr()
        time.sleep(0.05)


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
        assert (status, json.loads(body)) == (200, {"ok": True, "reasons": []})
        assert get(port, "/ready")[0] == 200
        assert get(port, "/etc/passwd")[0] == 404
        assert get(port, "/metrics", method="POST")[0] == 501
        assert get(port, "/metrics", host="evil.example")[0] == 403
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert files_of(textfile.read_text()) == recorded
    lines = [json.loads(line) for line in daemon.stderr().splitlines()]
    assert {"ready", "stopped"} <= {line["action"] for line in lines}
    assert "DOE" not in daemon.stderr() + textfile.read_text() + text

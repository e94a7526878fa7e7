"""What /health says, and that a server never started can be closed."""

import http.client
import json
import threading

from lungwatch.daemon.statusserver import StatusServer


def refuse_to_crash(name, error):
    raise AssertionError(name) from error


def test_health_is_503_with_reasons_when_something_is_wrong():
    problems = ["stuck: decode"]
    server = StatusServer(0, lambda: b"", lambda: problems, refuse_to_crash)
    server.start()
    try:
        for status in (503, 200):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            told = json.loads(answer.read())
            connection.close()
            assert (answer.status, told["ok"]) == (status, status == 200)
            assert told["reasons"] == problems
            problems.clear()
    finally:
        server.stop()


def test_a_server_that_was_not_started_can_be_closed():
    server = StatusServer(0, lambda: b"", list, refuse_to_crash)
    server.stop()
    assert server.port > 0


def test_the_death_of_its_thread_is_told(monkeypatch):
    told = threading.Event()
    server = StatusServer(0, lambda: b"", list, lambda *_: told.set())
    monkeypatch.setattr(server._server, "service_actions", lambda: 1 / 0)
    server.start()
    assert told.wait(30)
    server.stop()

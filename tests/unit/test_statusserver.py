"""Status port: /health, /ready, and closing a server that never started."""

import http.client
import json
import socket
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lungwatch.daemon.monitor.health import HealthCheck, Phase, Probes
from lungwatch.daemon.monitor.metrics import StatusServer
from lungwatch.daemon.retry import OutageKind, SystemClock, TimeLimited
from lungwatch.daemon.stage import Progress
from lungwatch.db.statistics import HealthCounts
from lungwatch.errors import DatabaseError
from tests.support.waits import PATIENCE_S, wait_for

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SIGNS = HealthCounts(
    queued=0,
    oldest_queued=None,
    outbox_waiting=0,
    oldest_delivery=None,
    outbox_ended=0,
    last_done=None,
)


class StandingClock:
    def now(self):
        return NOW

    def monotonic(self):
        return 100.0


def read(answer):
    return TimeLimited(lambda: answer, limit_s=30)


WELL = Probes(
    phase=lambda: Phase.READY,
    signs=read(SIGNS),
    free_mb=read(1000),
    waiting=lambda: 0,
    oldest_waiting=lambda: None,
    left_alone=lambda: 0,
    skipped=dict,
    in_hand=lambda: 0,
    queues=dict,
    outages=frozenset,
    stuck=dict,
)


def refuse_to_crash(name, error):
    raise AssertionError(name) from error


def check_of(probes):
    return HealthCheck(probes, model="m-1", min_free_mb=200, clock=StandingClock())


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def fail():
    raise DatabaseError("it is locked")


def away():
    raise FileNotFoundError


old = NOW - timedelta(days=1)
TROUBLES = {
    "database": ("failing", {"signs": TimeLimited(fail, limit_s=30)}),
    "disk": ("failing", {"free_mb": read(10)}),
    "folders": ("failing", {"free_mb": TimeLimited(away, limit_s=30)}),
    "stuck": ("failing", {"stuck": lambda: {"decode": 400.0}}),
    "outage_drop_folder": ("failing", {"outages": lambda: frozenset({OutageKind.DROP_FOLDER})}),
    "starting": ("failing", {"phase": lambda: Phase.STARTING}),
    "stopping": ("failing", {"phase": lambda: Phase.STOPPING}),
    "waiting_long": ("degraded", {"oldest_waiting": old.timestamp}),
    "outbox_old": ("degraded", {"signs": read(replace(SIGNS, oldest_delivery=old))}),
    "outbox_ended": ("degraded", {"signs": read(replace(SIGNS, outbox_ended=1))}),
    "left_alone": ("degraded", {"left_alone": lambda: 1}),
}


def serve(check, *, on_crash=refuse_to_crash, progress=None):
    return StatusServer(0, lambda: b"", check, on_crash, progress or Progress(SystemClock()))


@pytest.mark.parametrize("code", TROUBLES)
def test_each_trouble_is_named_and_tells_whether_files_are_being_screened(code):
    status, changes = TROUBLES[code]
    health = check_of(replace(WELL, **changes)).examine()
    assert [reason.code for reason in health.reasons] == [code]
    assert health.status == status


@pytest.mark.parametrize(
    ("code", "expected"),
    [("starting", (503, 503)), ("disk", (503, 200)), ("outbox_old", (200,) * 2)],
)
def test_failing_is_503_and_so_is_not_being_ready(code, expected):
    _, changes = TROUBLES[code]
    server = serve(check_of(replace(WELL, **changes)))
    server.start()
    try:
        status, body = get(server, "/health")
        assert (status, get(server, "/ready")[0]) == expected
        assert json.loads(body)["reasons"][0]["code"] == code
    finally:
        server.stop()


def test_what_hangs_is_not_asked_twice_and_delays_nobody_beyond_the_limit():
    release, asked = threading.Event(), []

    def hang():
        asked.append(1)
        release.wait(PATIENCE_S)
        return SIGNS

    bounded = TimeLimited(hang, limit_s=0.05)
    health = check_of(replace(WELL, signs=bounded)).examine()
    assert not health.database
    with pytest.raises(TimeoutError):
        bounded()
    assert len(asked) == 1
    release.set()


def test_a_server_that_was_not_started_can_be_closed():
    server = serve(check_of(WELL))
    server.stop()
    assert server.port > 0


def test_the_death_of_its_thread_is_told(monkeypatch):
    told = threading.Event()
    server = serve(check_of(WELL), on_crash=lambda *_: told.set())
    monkeypatch.setattr(server._server, "service_actions", lambda: 1 / 0)
    server.start()
    assert told.wait(PATIENCE_S)
    server.stop()


def test_a_server_that_answers_nobody_any_more_starves_the_watchdog(monkeypatch):
    release, asked = threading.Event(), threading.Event()
    progress = Progress(SystemClock(), 2.0)
    server = serve(check_of(WELL), progress=progress)

    def hang(*_):
        asked.set()
        assert release.wait(PATIENCE_S)
        return False

    def stuck():
        return list(progress.stuck(time.monotonic()))

    monkeypatch.setattr(server._server, "verify_request", hang)
    server.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), 30):
            assert asked.wait(PATIENCE_S)
            wait_for(lambda: stuck() == ["status"], stuck)
            release.set()
        wait_for(lambda: stuck() == [], stuck)
    finally:
        release.set()
        server.stop()

"""The metrics: what they count, and that the rules name none that is not there."""

import json
import logging
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lungwatch.attributes import RadiographMeta
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.monitor.drift import Drift, DriftTest, DriftWindow
from lungwatch.daemon.monitor.health import HealthCheck, Phase, Probes, free_mb_of
from lungwatch.daemon.monitor.metrics import Metrics, stability_index
from lungwatch.daemon.retention import disk_usage
from lungwatch.daemon.retry import SystemClock, TimeLimited
from lungwatch.daemon.stage import Progress
from lungwatch.db.maintenance import open_database
from lungwatch.db.results import Store
from lungwatch.db.statistics import health_counts, metric_counts
from tests.support.rows import drop, record

DOCS = Path(__file__).parents[2] / "docs" / "monitoring"
T0 = datetime(2026, 3, 1, tzinfo=UTC)
DRIFT = Drift(
    reference="site",
    false_alarm_rate=0.001,
    window=100,
    waiting_for=0,
    scopes=(
        DriftWindow(station="", reference="r", results=100),
        DriftWindow(station='ROOM "1"', reference="r", results=40),
    ),
    tests=tuple(
        DriftTest(
            station=station,
            what=what,
            statistic=0.5,
            p=1e-9,
            reference_count=300,
            window_count=40,
            told="AP 5% -> 55%",
            alarm=what == "view",
            since=T0 if what == "view" else None,
        )
        for station in ("", 'ROOM "1"')
        for what in ("view", "logit")
    ),
)


@pytest.fixture(scope="module")
def make_text(tmp_path_factory):
    """The metrics of a database with sixty results."""
    tmp_path = tmp_path_factory.mktemp("home")
    engine = open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    store = Store(engine)
    model = store.register_model(name="m", version="1", sha256="1" * 64, contract_json="{}", now=T0)
    meta = RadiographMeta(format="PNG", rows=1, columns=1, bits_stored=8, photometric="MONOCHROME2")
    for number in range(60):
        now = T0 + timedelta(seconds=number)
        claim = store.claim(
            drop(
                number,
                token=str(number),
                source_name="DOE^JANE.png",
                path=f"work/{number}",
                model_id=model,
                now=now,
            )
        )
        record(
            store,
            claim.result_id,
            meta=meta,
            label="normal",
            probability=0.25,
            logit=-1.1,
            overlay="o.png",
            now=now,
        )
        store.finish(result_id=claim.result_id, path=f"done/{number}", now=now)
    clock = SystemClock()
    progress = Progress(clock)
    home = Home(tmp_path)
    home.incoming.mkdir()
    home.backups.mkdir()
    (home.backups / "lungwatch-20260301T000000.000000Z.db").touch()
    read_signs = TimeLimited(lambda: health_counts(engine, writable=True), limit_s=30)

    def make(window):
        metrics = Metrics(
            health=check_of(read_signs, home),
            read_signs=read_signs,
            read_figures=TimeLimited(lambda: metric_counts(engine, model, window), limit_s=30),
            read_drift=TimeLimited(lambda: DRIFT, limit_s=30),
            read_disks=TimeLimited(lambda: disk_usage(home, str(engine.url)), limit_s=30),
            model="m-1",
            gate="refuse",
            progress=progress,
            clock=clock,
            window=window,
        )
        with progress.busy("decode"):
            pass
        metrics.observe("decode", 0.02)
        logging.getLogger("lungwatch").setLevel(logging.INFO)
        event("retry", error="x")
        event("decoder_replaced", reason="timed_out")
        event("cut_off", why="idle")
        text = metrics.text().decode()
        metrics.close()
        return text

    yield make
    engine.dispose()


@pytest.fixture(scope="module")
def text(make_text):
    return make_text(30)


def check_of(read_signs, home):
    probes = Probes(
        phase=lambda: Phase.READY,
        signs=read_signs,
        free_mb=TimeLimited(lambda: free_mb_of(home), limit_s=30),
        waiting=lambda: 3,
        oldest_waiting=T0.timestamp,
        left_alone=lambda: 0,
        lanes=lambda: {
            "ordinary": {"waiting": 3, "in_hand": 2},
            "slow": {"waiting": 1, "in_hand": 0},
        },
        skipped=lambda: {"@eaDir": 2},
        in_hand=lambda: 2,
        queues=dict,
        outages=frozenset,
        stuck=dict,
    )
    return HealthCheck(probes, model="m-1", min_free_mb=0, clock=SystemClock())


def test_metrics_are_the_databases_counts(text):
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["lungwatch_files_total", "", "done"] == 60
    assert samples["lungwatch_probability_mean",] == pytest.approx(0.25)
    assert samples["lungwatch_probability_psi",] == pytest.approx(0.0)
    assert samples["lungwatch_last_done_timestamp_seconds",] == T0.timestamp() + 59
    assert samples["lungwatch_stage_seconds_count", "decode"] == 1
    assert samples["lungwatch_attempts_total",] == 60
    assert samples["lungwatch_events_total", "retry"] == 1
    assert samples["lungwatch_decoder_replacements_total", "timed_out"] == 1
    assert samples["lungwatch_database_up",] == 1
    assert samples["lungwatch_content_gate", "refuse"] == 1
    assert samples["lungwatch_disk_free_bytes", "home"] > 0
    assert samples["lungwatch_oldest_waiting_seconds",] > 0
    assert samples["lungwatch_skipped_files", "@eaDir"] == 2
    assert samples["lungwatch_drift", 'ROOM "1"', "view"] == 1
    assert samples["lungwatch_drift", 'ROOM "1"', "logit"] == 0
    assert samples["lungwatch_drift", "", "view"] == 1
    assert samples["lungwatch_drift_distance", "", "view"] == 0.5
    assert samples["lungwatch_drift_window_results", 'ROOM "1"'] == 40
    assert "DOE" not in text


def test_there_is_no_drift_until_the_two_windows_share_no_result(make_text):
    """Sixty results fill two windows of thirty, and not of thirty-one."""
    assert "lungwatch_probability_psi" in make_text(30)
    assert "lungwatch_probability_psi" not in make_text(31)


def names_in(text):
    """Names without what a histogram appends."""
    found = set(re.findall(r"lungwatch_[a-z_]+", text))
    return {re.sub("_(bucket|sum|count|created)$", "", name) for name in found}


def test_every_metric_of_the_rules_and_the_dashboard_is_served_and_every_one_is_documented(text):
    panels = json.loads((DOCS / "dashboard.json").read_text())["panels"]
    written = (DOCS / "alerts.yml").read_text() + str([p["targets"] for p in panels])
    served = names_in("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    # Without an outbox there is nothing to count by destination.
    served |= {"lungwatch_deliveries", "lungwatch_delivery_attempts_total"}
    served |= {"lungwatch_commitments", "lungwatch_commitment_requests"}
    documented = set(
        re.findall(r"`(lungwatch_[a-z_]+)", (DOCS.parent / "monitoring.md").read_text())
    )
    assert len(names_in(written)) > 10
    assert names_in(written) <= served
    assert documented == served


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_prometheus_takes_the_rules_and_each_fires_on_what_it_names_alone(arguments):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    checked = subprocess.run(
        [promtool, *arguments], cwd=DOCS, check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_is_tested_both_ways():
    alerts = re.findall(r"alert: (\w+)", (DOCS / "alerts.yml").read_text())
    tested = (DOCS / "alerts_test.yml").read_text()
    assert set(re.findall(r"alertname: (\w+)", tested)) == set(alerts)
    for alert in alerts:
        blocks = re.findall(rf"alertname: {alert}\n((?:        .*\n)*)", tested)
        assert {"exp_alerts: []" in block for block in blocks} == {True, False}, alert


def test_the_index_tells_a_shift_from_none():
    low, high = [0.1] * 100, [0.9] * 100
    assert stability_index(low, low) == 0
    assert stability_index(low, high) > 0.25

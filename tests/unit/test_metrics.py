"""The metrics: what they count, and that the rules name none that is not there."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lungwatch.daemon.clock import SystemClock
from lungwatch.daemon.metrics import Metrics, stability_index
from lungwatch.daemon.vitals import Vitals
from lungwatch.db import Store, open_database
from lungwatch.imaging import RadiographMeta

DOCS = Path(__file__).parents[2] / "docs" / "monitoring"
T0 = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def text(tmp_path):
    """The metrics of a database with sixty results."""
    engine = open_database(f"sqlite:///{tmp_path / 'lungwatch.db'}")
    store = Store(engine)
    model = store.register_model(name="m", version="1", sha256="1" * 64, contract_json="{}", now=T0)
    meta = RadiographMeta(format="PNG", rows=1, columns=1, bits_stored=8, photometric="MONOCHROME2")
    for number in range(60):
        now = T0 + timedelta(seconds=number)
        claim = store.claim(
            token=str(number),
            sha256=f"{number:064x}",
            size_bytes=1,
            source_name="DOE^JANE.png",
            path=f"work/{number}",
            model_id=model,
            max_attempts=3,
            now=now,
            exists=lambda _: True,
        )
        store.record(
            result_id=claim.result_id,
            meta=meta,
            label="normal",
            probability=0.25,
            logit=-1.1,
            threshold=0.5,
            flags=[],
            overlay="o.png",
            duration_ms=1,
            now=now,
        )
        store.finish(result_id=claim.result_id, path=f"done/{number}", now=now)
    clock = SystemClock()
    vitals = Vitals(clock)
    metrics = Metrics(
        engine=engine,
        model_id=model,
        model="m-1",
        home=tmp_path,
        vitals=vitals,
        in_flight=lambda: 2,
        waiting=lambda: 3,
        clock=clock,
    )
    with vitals.busy("decode"):
        pass
    metrics.observe("decode", 0.02)
    yield metrics.text().decode()
    engine.dispose()


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
    assert "DOE" not in text


def test_every_metric_of_the_rules_and_the_dashboard_is_served(text):
    panels = json.loads((DOCS / "dashboard.json").read_text())["panels"]
    written = (DOCS / "alerts.yml").read_text() + str([p["targets"] for p in panels])
    named = set(re.findall(r"lungwatch_[a-z_]+", written))
    known = set(re.findall(r"^(?:# TYPE )?(lungwatch_[a-z_]+)", text, re.MULTILINE))
    assert len(named) > 10
    assert named <= known


def test_prometheus_takes_the_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    checked = subprocess.run(
        [promtool, "check", "rules", DOCS / "alerts.yml"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr


def test_the_index_tells_a_shift_from_none():
    low, high = [0.1] * 100, [0.9] * 100
    assert stability_index(low, low) == 0
    assert stability_index(low, high) > 0.25

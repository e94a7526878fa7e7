"""The chaos harness runs as documented, and finds nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = ("sigterm", "eio", "events-lost", "wrong-clock")


def test_some_faults_cost_no_file_and_double_none(tmp_path):
    """`python -m chaos` ends with status 0, and each fault was injected or says why not."""
    only = [word for fault in FAULTS for word in ("--only", fault)]
    findings = tmp_path / "findings.json"
    said = subprocess.run(
        [
            *(sys.executable, "-m", "chaos", "--quick", *only),
            *("--json", findings, "--dir", tmp_path / "homes"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    found = json.loads(findings.read_text())
    assert [finding["key"] for finding in found] == list(FAULTS)
    for finding in found:
        assert finding["skipped"] or (finding["runs"] and finding["injected"]), finding
        assert (finding["lost"], finding["duplicated"], finding["damaged"]) == (0, 0, [])

"""Network silence: nothing is sent unasked, onnxruntime's own reports included."""

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, home: Path) -> list[Path]:
    """Run code as on a server: not CI, where onnxruntime keeps quiet by itself."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "PYTEST_CURRENT_TEST")
    }
    environment["HOME"] = str(home)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=240)
    return [path for path in home.rglob("*") if path.is_file()]


def test_the_daemon_loads_onnxruntime_with_its_telemetry_off(tmp_path):
    """It would leave a device identifier and a queue of events in the user's cache."""
    assert run("import lungwatch.daemon.service", tmp_path) == []


def test_it_is_off_whichever_part_comes_first(tmp_path):
    code = "import lungwatch, os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    assert run(code, tmp_path) == []

"""The guard in `tests/support/leaks.py` fails a test that leaves something behind, and no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
from tests.support import leaks
from tests.support.leaks import leak_guard
leaks.GRACE_S = 0.2  # no waiting for what never ends by itself
"""

DESCRIPTOR = """
import os
kept = []
def test_it(tmp_path):
    kept.append(os.open(tmp_path, os.O_RDONLY))
"""
THREAD = """
import threading
end = threading.Event()
def test_it():
    threading.Thread(target=end.wait, name="stray", daemon=True).start()
"""
NOTHING = """
import threading
def test_it(tmp_path):
    (tmp_path / "x").write_text("x")
    thread = threading.Thread(target=print)
    thread.start()
    thread.join()
"""
CASES = {
    "descriptor": (DESCRIPTOR, "left behind: descriptor"),
    "thread": (THREAD, "left behind: thread 'stray'"),
    "nothing": (NOTHING, "1 passed"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_behind_fails_the_test(case, tmp_path):
    source, expected = CASES[case]
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_case.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_case.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert expected in done.stdout
    assert (done.returncode == 0) == (case == "nothing")

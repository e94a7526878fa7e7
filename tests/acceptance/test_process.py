"""The daemon's process: no TensorFlow in it, and no more memory than its limits allow."""

import re
import time
from pathlib import Path

HEAVY = ("tensorflow", "keras", "tf2onnx", "matplotlib", "sklearn", "torch")
MEMORY_LIMIT_MB = 1200
COUNT = 500


def test_no_module_of_the_training_side_is_imported(make_home, picture):
    home = make_home()
    home.drop("x.png", picture(1), old=True)
    said = home.run_once(env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert said.returncode == 0, said.stderr
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", said.stderr, re.MULTILINE))
    assert "onnxruntime" in imported
    assert "lungwatch.daemon.pipeline.pipeline" in imported
    assert not {name for name in imported if name.split(".")[0] in (*HEAVY, "onnx")}
    ours = {name for name in imported if name.startswith("lungwatch.")}
    assert not {name for name in ours if name.split(".")[1] in ("training", "export")}


# The daemon is not dumpable: only root reads its maps from outside, and it may read its own.
OWN_MAPS = """
import atexit, pathlib, sys
if "run" in sys.argv or "run" in sys.orig_argv:
    maps = pathlib.Path(__file__).with_name("maps")
    atexit.register(lambda: maps.write_bytes(pathlib.Path("/proc/self/maps").read_bytes()))
"""


def test_no_library_of_tensorflow_is_mapped_into_the_running_daemon(make_home, picture, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(OWN_MAPS)
    home = make_home()
    home.env["PYTHONPATH"] = str(tmp_path)
    with home.daemon() as daemon:
        home.drop("x.png", picture(1))
        home.wait_until_ended([picture(1)])
        assert daemon.stop() == 0, daemon.log()
    maps = (tmp_path / "maps").read_text()
    assert "onnxruntime" in maps
    assert "tensorflow" not in maps


def test_run_once_gives_500_files_their_end_in_bounded_memory(make_home, picture, record_property):
    home = make_home()
    contents = [picture(number) for number in range(COUNT)]
    for number, content in enumerate(contents):
        home.drop(f"{number}.png", content, old=True)
    start_s = time.monotonic()
    run = home.daemon("--once").launch()
    peak_mb = 0
    while run.process.poll() is None:
        peak_mb = max(peak_mb, peak_memory_mb(run.process.pid))
        time.sleep(0.1)
    elapsed_s = time.monotonic() - start_s
    record_property("peak_mb", peak_mb)
    record_property("elapsed_s", round(elapsed_s, 1))
    print(f"{COUNT} files in {elapsed_s:.1f} s, {peak_mb} MiB at most")
    assert run.process.returncode == 0, run.log()
    home.assert_settled(contents)
    assert {row.state for row in home.rows()} == {"done"}
    assert home.files("incoming") == []
    assert 0 < peak_mb < MEMORY_LIMIT_MB


def peak_memory_mb(pid):
    """The most memory that a process has had resident, as the kernel counts it."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) // 1024 if found else 0

"""A file that has taken over its decoding process gets nothing: each thing it tries fails."""

import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pydicom.data
import pytest

from lungwatch.daemon.pipeline import confinement
from lungwatch.daemon.pipeline.decode import Decoder, DecoderSetup, decode_file
from lungwatch.daemon.pipeline.sandbox import fault_mark
from lungwatch.errors import FileRejected
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.preprocess import PreprocessSpec
from tests.support.attacker import KILLED, REFUSED, SECRET, armed
from tests.support.processes import COMMAND, environment
from tests.support.waits import wait_for

MODALITIES = frozenset({"CR", "DX", "RG", "CT", "MR", "US", "OT", "SC", "XA", "ES", "NM", "PT"})


def skip_where_the_kernel_lacks_it():
    if missing := confinement.probe().missing:
        pytest.skip(f"this kernel does not give a decoder {', '.join(missing)}")


@pytest.fixture
def attacked(make_home, picture, tmp_path, monkeypatch):
    """A home in whose `done/` another patient's file lies, and whose decoders attack."""
    skip_where_the_kernel_lacks_it()
    monkeypatch.setenv(SECRET, "x")
    home = make_home(RETRIES="0", REQUIRE_SANDBOX="true", DECODE_WORKERS="2")
    home.drop("victim.png", picture(900), old=True)
    assert home.run_once().returncode == 0
    (victim,) = home.files("done")
    home.env["TEST_DECODER"] = str(armed(tmp_path / "attacker.py", home.root, victim))
    return home


def test_nothing_that_it_tries_succeeds(attacked, picture):
    """Files, database, memory, signals, programs: refused, and the daemon does not notice."""
    content, good = picture(1) + fault_mark("all"), picture(2)
    (victim,) = attacked.files("done")
    before = victim.read_bytes()
    with attacked.daemon() as daemon:
        attacked.drop("attack.png", content)
        attacked.wait_until_ended([content])
        attacked.drop("good.png", good)
        attacked.wait_until_ended([good])
        assert daemon.stop() == 0, daemon.log()
    row = attacked.row(content)
    assert (row.state, row.reason) == ("rejected", "not_an_image"), (row.state, row.reason)
    assert json.loads(row.message) == {"tried": len(REFUSED), "succeeded": []}
    assert attacked.row(good).state == "done"
    assert victim.read_bytes() == before
    assert "decoder_replaced" not in daemon.log()
    assert "action=sandbox" in daemon.log()


def test_calls_that_no_decoding_makes_have_the_process_killed(attacked, picture):
    """Programs, sockets, ptrace and the like: one process a file, and the next file is decoded."""
    contents = {name: picture(10 + n) + fault_mark(name) for n, name in enumerate(KILLED)}
    good = picture(3)
    for name, content in contents.items():
        attacked.drop(f"{name}.png", content, old=True)
    attacked.drop("good.png", good, old=True)
    done = attacked.run_once()
    assert done.returncode == 0
    said = {name: (attacked.row(content).reason, attacked.row(content).message)
            for name, content in contents.items()}  # fmt: skip
    killed = ("decoder_crashed", "the decoder died of SIGSYS")
    assert said == dict.fromkeys(KILLED, killed)
    assert attacked.row(good).state == "done"


def test_a_start_without_what_the_unit_requires_is_refused(make_home, monkeypatch, tmp_path):
    """A machine of another kind has no filter: one line, and a warning if not required."""
    (tmp_path / "sitecustomize.py").write_text(
        "import platform\nplatform.machine = lambda: 'vax'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert platform.machine() != "vax"
    home = make_home(REQUIRE_SANDBOX="true")
    refused = home.run_once()
    assert refused.returncode != 0
    assert "seccomp" in refused.stderr
    assert "Traceback" not in refused.stderr
    home.env["REQUIRE_SANDBOX"] = "false"
    accepted = home.run_once()
    assert accepted.returncode == 0
    assert accepted.stderr.count("action=sandbox") == 1
    assert "missing=seccomp" in accepted.stderr


def test_no_other_process_of_its_user_reads_the_daemon(make_home, tmp_path):
    """Neither memory nor environment; root without capabilities is a user like any other."""
    plain = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed")
        plain = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    home = make_home(OBSERVER="polling")
    log = tmp_path / "daemon.log"

    def can_read(pid, name):
        code = f"open('/proc/{pid}/{name}', 'rb').read(0)"
        done = subprocess.run(
            [*plain, sys.executable, "-I", "-S", "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
        return done.returncode == 0

    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [*plain, COMMAND, "run", "--home", str(home.root)],
            env=environment({"LUNGWATCH_OBSERVER": "polling"}),
            stderr=stderr,
        ) as daemon,
        subprocess.Popen([*plain, "sleep", "600"]) as other,
    ):
        try:
            wait_for(
                lambda: "action=ready" in log.read_text() or daemon.poll() is not None,
                log.read_text,
            )
            assert daemon.poll() is None, log.read_text()
            assert can_read(other.pid, "environ")
            assert not can_read(daemon.pid, "environ")
            assert not can_read(daemon.pid, "mem")
        finally:
            other.kill()
            daemon.terminate()
    assert daemon.returncode == 0, log.read_text()


def test_every_file_of_pydicoms_ends_as_it_does_without_confinement():
    """Every codec, character set and refusal: nothing is imported or opened too late."""
    skip_where_the_kernel_lacks_it()
    setup = DecoderSetup(
        policy=ReadPolicy(modalities=MODALITIES, min_side_px=16),
        spec=PreprocessSpec(size_px=64),
        overlay_side_px=128,
        memory_mb=4096,
        require_sandbox=True,
    )
    how = {"policy": setup.policy, "spec": setup.spec, "overlay_side_px": setup.overlay_side_px}
    paths = sorted(path for path in Path(pydicom.data.__file__).parent.rglob("*.dcm"))
    with closing(Decoder(setup, timeout_s=60.0)) as decoder:
        for path in paths:
            with path.open("rb") as file:
                free = outcome(partial(decode_file, path, **how))
                held = outcome(partial(decoder.decode, file.fileno()))
            assert held[0] == free[0], path.name
            # To the bit: the libraries choose the same instructions (OPENBLAS_CORETYPE and the
            # like reach the process), and confinement does not change which.
            assert np.array_equal(held[1], free[1]), path.name
    assert len(paths) > 50


def outcome(decode):
    """What is known of a file after decoding, and its pixels."""
    try:
        found = decode()
    except FileRejected as error:
        return (error.reason, str(error), error.meta), np.zeros(1)
    return (found.meta, found.shape, found.flags, found.orientation_known), found.tensor

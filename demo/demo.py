"""The main job on real input: a chest radiograph, and what is none, through the real daemon.

Run by `make demo`. Needs the base install and `pydicom-data` (extra `demo`), no TensorFlow.
Everything happens through the `lungwatch` command, as a clinic would use it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.data import get_testdata_file

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.imaging.reader import read_radiograph

COMMAND = str(Path(sys.executable).with_name("lungwatch"))
HOME = Path("demo-home")
MARKER = ".made-by-lungwatch-demo"
START_S = 120.0
END_S = 120.0
STOP_S = 60.0
ENDS = ("done", "rejected", "failed")
# As shipped: a clinic's own settings, its database above all, are none of the demo's business.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("LUNGWATCH_")}


class DemoError(Exception):
    """The demo cannot go on, or did not end as it should."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file to drop and the end it must have.

    Attributes
    ----------
    name
        What it is dropped as.
    what
        What it shows, for the table.
    data
        Its bytes.
    reason
        The reason code of its refusal; None if it is to be scored.
    tolerance
        Largest difference of its probability from the first sample's.
    """

    name: str
    what: str
    data: bytes
    reason: str | None = None
    tolerance: float = 0.0

    @property
    def status(self) -> str:
        """The state it must end in."""
        return "rejected" if self.reason else "done"


def make_samples() -> list[Sample]:
    """Collect the files from `pydicom-data`; PNGs and the broken file are made from them."""
    chest = _testdata("RG1_UNCR.dcm")
    pixels = read_radiograph(chest).pixels
    whole = chest.read_bytes()
    lossless, lossy = _testdata("RG1_J2KR.dcm"), _testdata("RG1_J2KI.dcm")
    leg, ct = _testdata("RG3_UNCR.dcm"), _testdata("693_UNCR.dcm")
    return [
        Sample(name=chest.name, what="chest, uncompressed", data=whole),
        Sample(
            name=lossless.name,
            what="chest, JPEG 2000 lossless",
            data=lossless.read_bytes(),
            tolerance=1e-6,
        ),
        Sample(
            name=lossy.name,
            what="chest, JPEG 2000 lossy",
            data=lossy.read_bytes(),
            tolerance=0.03,
        ),
        Sample(name="RG1.png", what="chest, 8-bit PNG", data=_png(pixels), tolerance=0.03),
        Sample(
            name="RG1_turned.png",
            what="chest, on its side",
            data=_png(np.rot90(pixels)),
            reason="rotated",
        ),
        Sample(
            name="RG1_negative.png",
            what="chest, grey values inverted",
            data=_png(1.0 - pixels),
            reason="inverted",
        ),
        Sample(
            name="RG3.png",
            what="lower leg, without a word",
            data=_png(_leg_pixels(leg)),
            reason="not_frontal_chest",
        ),
        Sample(name=leg.name, what="lower leg", data=leg.read_bytes(), reason="wrong_body_part"),
        Sample(name=ct.name, what="CT slice", data=ct.read_bytes(), reason="not_a_radiograph"),
        Sample(
            name="RG1_broken.dcm",
            what="chest, cut in half",
            data=whole[: len(whole) // 2],
            reason="truncated",
        ),
    ]


def _png(pixels: NDArray[np.float32]) -> bytes:
    """Return grey values, float32 (H, W), 0..1, as the bytes of an 8-bit PNG file."""
    is_written, data = cv2.imencode(".png", np.round(pixels * 255).astype(np.uint8))
    if not is_written:
        raise DemoError("OpenCV cannot write a PNG")
    return data.tobytes()


def _leg_pixels(leg: Path) -> NDArray[np.float32]:
    """Return the leg as a screen shows it: what its tags say would stop the reader."""
    stored = pydicom.dcmread(leg)
    values = stored.pixel_array.astype(np.float32)
    low, high = np.percentile(values, (0.5, 99.5))
    grey = np.clip((values - low) / (high - low), 0.0, 1.0)
    if stored.PhotometricInterpretation == "MONOCHROME1":
        grey = 1.0 - grey
    return np.asarray(grey, dtype=np.float32)


def new_home() -> None:
    """Make an empty home, in place of an earlier demo's and of nothing else.

    Raises
    ------
    DemoError
        If the folder is there and not a demo's.
    """
    if HOME.exists():
        if not (HOME / MARKER).is_file():
            raise DemoError(f"{HOME.absolute()} is not this demo's; move it away first")
        shutil.rmtree(HOME)
    HOME.mkdir()
    (HOME / MARKER).touch()


def start_daemon(log: Path) -> subprocess.Popen[bytes]:
    """Start `lungwatch run` and wait until it says that it is ready."""
    with log.open("wb") as stream:
        daemon = subprocess.Popen(
            [COMMAND, "run", "--home", str(HOME)], stderr=stream, env=ENVIRONMENT
        )
    deadline = time.monotonic() + START_S
    while "action=ready" not in log.read_text():
        if daemon.poll() is not None:
            raise DemoError(f"the daemon did not start:\n{_tail(log)}")
        if time.monotonic() > deadline:
            stop_daemon(daemon)
            raise DemoError(f"the daemon was not ready within {START_S:.0f} s:\n{_tail(log)}")
        time.sleep(0.1)
    return daemon


def wait_for_ends(samples: list[Sample], daemon: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """Ask `lungwatch results list` until every sample has an end; return the rows."""
    deadline = time.monotonic() + END_S
    while True:
        rows: list[dict[str, Any]] = json.loads(_lungwatch("results", "list", "--json").stdout)
        ended = {row["source_name"] for row in rows if row["status"] in ENDS}
        if ended == {sample.name for sample in samples}:
            return rows
        if daemon.poll() is not None:
            raise DemoError(f"the daemon ended by itself, with status {daemon.returncode}")
        if time.monotonic() > deadline:
            missing = ", ".join(sample.name for sample in samples if sample.name not in ended)
            raise DemoError(f"no end within {END_S:.0f} s for: {missing}")
        time.sleep(0.3)


def stop_daemon(daemon: subprocess.Popen[bytes]) -> int:
    """Stop the daemon as systemd would and return its exit status."""
    daemon.send_signal(signal.SIGTERM)
    try:
        return daemon.wait(STOP_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        return daemon.wait()


def differences(samples: list[Sample], rows: list[dict[str, Any]]) -> list[str]:
    """Say, a line each, what did not end as it should."""
    by_name = {row["source_name"]: row for row in rows}
    first = by_name[samples[0].name]["probability"]
    problems = []
    for sample in samples:
        row = by_name[sample.name]
        if (row["status"], row["reason"]) != (sample.status, sample.reason):
            problems.append(
                f"{sample.name} ended {row['status']} ({row['reason']}), "
                f"expected {sample.status} ({sample.reason})"
            )
        elif sample.reason is None and not Path(row["overlay"]).is_file():
            problems.append(f"{sample.name} has no overlay at {row['overlay']}")
        elif sample.reason is None and abs(row["probability"] - first) > sample.tolerance:
            problems.append(
                f"{sample.name} scored {row['probability']:.7f}, {samples[0].name} {first:.7f}: "
                f"further apart than {sample.tolerance}"
            )
    return problems


def table(samples: list[Sample], rows: list[dict[str, Any]]) -> str:
    """Lay out what became of each sample, in the order of their dropping.

    Two lines each: a path with a digest in it would make one line wider than a terminal.
    """
    by_name = {row["source_name"]: row for row in rows}
    layout = "{:<15} {:<26} {:<9} {:<10} {}"
    lines = [layout.format("file", "what", "status", "label", "probability")]
    lines.append("-" * len(lines[0]))
    for sample in samples:
        row = by_name[sample.name]
        is_scored = row["probability"] is not None
        probability = f"{row['probability']:.3f}" if is_scored else "-"
        lines.append(
            layout.format(sample.name, sample.what, row["status"], row["label"] or "-", probability)
        )
        overlay = row["overlay"] and _shortened(Path(row["overlay"]))
        lines.append(f"  {overlay or row['reason'] + ': ' + row['message']}")
    return "\n".join(lines)


def main() -> int:
    """Run the demo; 0 if everything ended as it should."""
    print(f"lungwatch demo. {RESEARCH_USE_ONLY}\n")
    samples = make_samples()
    new_home()
    log = HOME / "daemon.log"
    began_s = time.monotonic()
    daemon = start_daemon(log)
    try:
        print(f"the daemon is ready after {time.monotonic() - began_s:.1f} s, log in {log}")
        began_s = time.monotonic()
        for sample in samples:
            (HOME / "incoming" / sample.name).write_bytes(sample.data)
        print(f"{len(samples)} files dropped into {HOME / 'incoming'} while it runs")
        rows = wait_for_ends(samples, daemon)
        print(f"each has its end after {time.monotonic() - began_s:.1f} s\n")
    finally:
        status = stop_daemon(daemon)
    print(table(samples, rows))

    reconciled = _lungwatch("reconcile", check=False)
    print(f"\n$ lungwatch reconcile --home {HOME}\n{reconciled.stdout.strip()}")
    problems = differences(samples, rows)
    if status != 0:
        problems.append(f"the daemon ended with status {status}:\n{_tail(log)}")
    if reconciled.returncode != 0:
        problems.append("folders and database differ")
    if problems:
        raise DemoError("not as expected:\n  " + "\n  ".join(problems))
    print(
        f"""
Everything as expected. Where to look next:
  the overlays       {HOME / "overlays"}
  the originals      {HOME / "done"}, {HOME / "quarantine"}
  one result whole   {_shortened(Path(COMMAND))} results show 1 --home {HOME}
  the daemon         {_shortened(Path(COMMAND))} run --home {HOME}
{RESEARCH_USE_ONLY}"""
    )
    return 0


def _lungwatch(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *words, "--home", str(HOME)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    if check and done.returncode != 0:
        raise DemoError(f"`lungwatch {' '.join(words)}` failed: {done.stderr.strip()}")
    return done


def _testdata(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    if path is None:
        raise DemoError(f"{name} is not installed: pip install 'lungwatch[demo]'")
    return Path(str(path))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-10:])


def _shortened(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DemoError as error:
        sys.exit(f"demo: {error}")

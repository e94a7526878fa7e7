"""Time the stages of one X-ray's way, as ratios within this run.

Absolute times differ between machines and drift on one; what a stage costs beside the others
does not. Needs the base install and `pydicom-data` (extra `demo`).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from pydicom.data import get_testdata_file
from tabulate import tabulate

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.config import Config
from lungwatch.daemon.overlay.render import encode_png, make_preview, render_overlay
from lungwatch.daemon.overlay.text import OverlayText
from lungwatch.daemon.pipeline.decode import Decoder, DecoderSetup
from lungwatch.daemon.pipeline.model import Classifier, find_bundle
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import letters_in_line, preprocess

UNIT = "classify"


def stages(stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return each stage as a call on real input, the real chest radiograph's.

    The decoding process that one of them asks lives as long as the stack.
    """
    config = Config.model_validate({})  # every default
    classifier = Classifier.load(find_bundle(config.model))
    contract = classifier.contract
    files = {
        name: _testdata(f"RG1_{code}.dcm")
        for name, code in (("uncompressed", "UNCR"), ("JPEG 2000", "J2KR"))
    }
    pixels = read_radiograph(files["uncompressed"]).pixels
    tensor = preprocess(pixels, contract.preprocess)[np.newaxis]
    (scores,) = classifier.run(tensor)
    # The dearest picture, whatever the model says of this one: with a map, and two panels.
    text = OverlayText(
        label="COVID",
        probability=0.9,
        decision=contract.decision,
        model=contract.id,
        sha256="0" * 64,
    )
    preview = make_preview(pixels, config.overlay_side_px)
    cam = scores.cam[1]
    picture = render_overlay(preview=preview, cam=cam, text=text)
    gate = classifier.gate
    gating: dict[str, Callable[[], object]] = {}
    if gate is not None:
        seen = preprocess(pixels, gate.contract.preprocess)[np.newaxis]
        gating["content gate"] = lambda: gate.run(seen)
    setup = DecoderSetup(
        policy=config.read_policy,
        spec=contract.preprocess,
        overlay_side_px=config.overlay_side_px,
        memory_mb=config.decode_memory_mb,
        gate_spec=None if gate is None else gate.contract.preprocess,
    )
    decoder = stack.enter_context(closing(Decoder(setup, timeout_s=config.decode_timeout_s)))
    uncompressed = stack.enter_context(files["uncompressed"].open("rb"))
    decoding: dict[str, Callable[[], object]] = {
        f"decode, {name}": lambda path=path: read_radiograph(path)  # type: ignore[misc]
        for name, path in files.items()
    }
    return decoding | {
        "preprocess": lambda: preprocess(pixels, contract.preprocess),
        "preview": lambda: make_preview(pixels, config.overlay_side_px),
        "burnt-in text": lambda: letters_in_line(preview),
        # The daemon's way: the uncompressed file's first three stages, and back through a pipe.
        "these three, in a process": lambda: decoder.decode(uncompressed.fileno()),
        **gating,
        UNIT: lambda: classifier.run(tensor),
        "overlay, render": lambda: render_overlay(preview=preview, cam=cam, text=text),
        "overlay, encode": lambda: encode_png(picture),
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Time every stage once a round, in ms, so that a busy moment meets all of them alike."""
    with ExitStack() as stack:
        calls = stages(stack)
        for call in calls.values():
            call()
        times_ms: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times_ms[name].append((time.perf_counter() - began) * 1000)
    return times_ms


def main() -> int:
    """Print the table, or with `--json` the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="times each stage is run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    times_ms = measure(options.rounds)
    unit_ms = statistics.median(times_ms[UNIT])
    rows = [
        {
            "stage": name,
            "median_ms": round(statistics.median(values), 3),
            "slowest_ms": round(max(values), 3),
            f"times_{UNIT}": round(statistics.median(values) / unit_ms, 2),
        }
        for name, values in times_ms.items()
    ]
    if options.json:
        print(json.dumps({"rounds": options.rounds, "stages": rows}, indent=2))
        return 0
    print(tabulate(rows, headers="keys"))
    print(
        f"\n1955 x 1841 pixels; median of {options.rounds} rounds; trust the ratios, not the ms."
        f"\n{RESEARCH_USE_ONLY}"
    )
    return 0


def _testdata(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    if path is None:
        sys.exit(f"{name} is not installed: pip install 'lungwatch[demo]'")
    return Path(str(path))


if __name__ == "__main__":
    sys.exit(main())

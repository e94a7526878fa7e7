"""Fuzz what lungwatch reads, guided by coverage, and count: `make fuzz`.

Every target runs in a process of its own for a number of inputs or a time, whichever ends
first. What breaks a promise, takes more than ten seconds or two gigabytes stays as a file in
`fuzz/findings/`, and ends the run with status 1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import corpus
from seeds import seeds
from tabulate import tabulate
from targets import TARGETS

HERE = Path(__file__).parent
FINDINGS = HERE / "findings"
_SLOWEST_S, _MOST_MB, _MOST_BYTES = 10, 2048, 4096


def fuzz(target: str, runs: int, seconds: int) -> dict[str, object]:
    """Fuzz one target; what leads to new places is kept in the corpus.

    Returns
    -------
    dict
        Target, executions, executions a second, and the findings' file names.
    """
    FINDINGS.mkdir(exist_ok=True)
    grown = corpus.FOLDER / target
    grown.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        start = Path(place)
        for number, data in enumerate(seeds(target)):
            (start / str(number)).write_bytes(data)
        before = set(FINDINGS.iterdir())
        log = _atheris(
            target,
            [
                f"-runs={runs}",
                f"-max_total_time={seconds}",
                f"-timeout={_SLOWEST_S}",
                f"-rss_limit_mb={_MOST_MB}",
                f"-max_len={_MOST_BYTES}",
                f"-artifact_prefix={FINDINGS}/{target}-",
                "-print_final_stats=1",
                "-reduce_inputs=1",
                str(grown),
                str(start),
            ],
        )
    executed = re.search(r"number_of_executed_units:\s*(\d+)", log)
    rate = re.search(r"average_exec_per_sec:\s*(\d+)", log)
    return {
        "target": target,
        "executions": int(executed[1]) if executed else 0,
        "executions/s": int(rate[1]) if rate else 0,
        "corpus": len(list(grown.iterdir())),
        "findings": sorted(path.name for path in set(FINDINGS.iterdir()) - before),
        "end": "" if executed else log[-2000:],
    }


def _atheris(target: str, arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / "one.py"), target, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.stdout


def main() -> int:
    """Parse, fuzz, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="all by default")
    parser.add_argument("--runs", type=int, default=1_000_000_000, help="inputs a target")
    parser.add_argument("--seconds", type=int, default=60, help="a target (default: 60)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pack", action="store_true", help="keep the grown corpus in corpus.zip")
    arguments = parser.parse_args()
    corpus.unpack()
    reports = []
    for target in arguments.target or TARGETS:
        print(f"fuzzing {target}", file=sys.stderr)
        reports.append(fuzz(target, arguments.runs, arguments.seconds))
    if arguments.pack:
        corpus.pack()
    if arguments.json:
        print(json.dumps(reports, indent=2))
    else:
        print(tabulate(reports, headers="keys"))
    return int(any(report["findings"] or report["end"] for report in reports))


if __name__ == "__main__":
    sys.exit(main())

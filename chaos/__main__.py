"""``python -m chaos``: inject the faults, print the table, fail if anything was lost."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos.fault import Fault, Lab, Trial
from chaos.faults import FAULTS
from chaos.place import ChaosError
from chaos.report import Finding, as_json, as_table, from_json, write_into
from chaos.selftest import self_test

_DOCS = Path(__file__).parents[1] / "docs"
_KEPT = _DOCS / "reliability" / "findings.json"


def main() -> int:
    """Return 0 if nothing was lost, doubled or damaged by any fault that could be injected."""
    options = _options()
    if options.self_test:
        return self_test(options.dir or Path(tempfile.mkdtemp(prefix="lungwatch-chaos-")))
    findings = []
    root = options.dir or Path(tempfile.mkdtemp(prefix="lungwatch-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    for key in options.only or FAULTS:
        folder = root / key
        folder.mkdir(exist_ok=True)
        lab = Lab(folder.resolve(), is_long=options.long, is_quick=options.quick)
        began_s = time.monotonic()
        finding = examine(key, FAULTS[key], lab)
        findings.append(finding)
        said = finding.skipped or ("good" if finding.is_good else f"BAD: see {folder}")
        lab.say(f"{key}: {said} ({time.monotonic() - began_s:.0f} s)")
        if options.json:
            options.json.write_text(json.dumps(as_json(findings), indent=2) + "\n")
    print(as_table(findings))
    if options.markdown:
        publish(findings, root)
    return 0 if all(finding.is_good for finding in findings) else 1


def examine(key: str, fault: Fault, lab: Lab) -> Finding:
    """Make a fault's trials and put them together."""
    obstacle = fault.obstacle()
    if obstacle:
        return Finding(key=key, fault=fault.name, how=fault.how, commit=commit(), skipped=obstacle)
    trials: list[Trial] = []
    trouble = ""
    try:
        trials.extend(fault.trials(lab))
    except ChaosError as error:
        trouble = str(error)
    struck = [trial.injected for trial in trials if trial.injected is not None]
    return Finding(
        key=key,
        fault=fault.name,
        how=fault.how,
        runs=len(trials),
        files=sum(trial.audit.files for trial in trials),
        lost=sum(len(trial.audit.lost) for trial in trials),
        duplicated=sum(len(trial.audit.duplicated) for trial in trials),
        damaged=tuple(found for trial in trials for found in trial.audit.damaged),
        recovery_s=tuple(t.recovery_s for t in trials if t.recovery_s is not None),
        injected=sum(struck) if struck else None,
        commit=commit(),
        notes=tuple(dict.fromkeys(trial.note for trial in trials if trial.note)),
        trouble=trouble,
    )


def commit() -> str:
    """Name the tree: the commit's first digits, with a "+" if there are changes besides."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        said = subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=False
        )
        return said.stdout.strip()

    if shutil.which("git") is None:
        return ""
    head = git("rev-parse", "--short=7", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "-uno") else "")


def publish(findings: list[Finding], root: Path) -> None:
    """Put the findings into docs/, where those of faults that were not injected now stay."""
    _KEPT.parent.mkdir(exist_ok=True)
    kept = from_json(json.loads(_KEPT.read_text())) if _KEPT.exists() else []
    known = {finding.key: finding for finding in [*kept, *findings]}
    merged = [known[key] for key in FAULTS if key in known]
    _KEPT.write_text(json.dumps(as_json(merged), indent=2) + "\n")
    write_into(_DOCS / "reliability.md", merged)
    for name, folder in (("leaks.csv", "reliability"), ("leaks.png", "images")):
        if any(finding.key == "leaks" for finding in findings) and (root / "leaks" / name).exists():
            shutil.copy(root / "leaks" / name, _DOCS / folder / name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="each fault once")
    amount.add_argument("--long", action="store_true", help="many more runs and files: hours")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="show the harness forgotten fsyncs instead: each has to be found",
    )
    parser.add_argument(
        "--only", action="append", choices=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    parser.add_argument(
        "--markdown", action="store_true", help="put the table into docs/reliability.md"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="FOLDER", help="where the homes are made (a temporary folder)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

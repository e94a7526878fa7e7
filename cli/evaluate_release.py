"""`lungwatch evaluate --gate`: the release gate, every requirement with its verdict."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import cell_text, print_json, print_table, to_json
from lungwatch.errors import NotFoundError

if TYPE_CHECKING:
    from lungwatch.daemon.gate import ContentGate
    from lungwatch.training.bootstrap import Bootstrap
    from lungwatch.training.release_criteria import Check
    from lungwatch.training.release_gate import Tables
    from lungwatch.training.samples import Split
    from lungwatch.training.scorers import Scorer

RESULT_FILE = "release_gate.json"
_WORDS = {"pass": "pass", "fail": "FAIL", "not_measured": "not measured"}


def evaluate_release(
    model: Path,
    data: Sequence[Path],
    *,
    split: "Split | None",
    bootstrap: "Bootstrap",
    lesion_masks: Path | None,
    left_out: Sequence[Path],
    refuse: Sequence[Path],
    bounds: Path | None,
    out: Path | None,
    as_json: bool,
    on_total: Callable[[int], Callable[[int], None]],
) -> None:
    """Put a model through the release gate, and leave with exit code 1 unless it passes.

    Raises
    ------
    LungwatchError
        If something cannot be measured for a reason that is no verdict.
    """
    from lungwatch.cli.run_folder import begin_run
    from lungwatch.training.release_criteria import read_criteria
    from lungwatch.training.release_gate import ReleaseRequest, run_release_gate
    from lungwatch.training.score_cache import model_digest
    from lungwatch.training.scorers import load_scorer

    criteria = read_criteria(bounds)
    scorer = load_scorer(model)
    digest = model_digest(model)
    tables = _left_out(scorer, left_out)
    if out:
        from lungwatch.training.evaluation_plots import require_matplotlib

        require_matplotlib()
        config = {
            "command": "evaluate --gate",
            "model": scorer.judgement.name,
            "model_sha256": digest,
            "data": list(map(str, data)),
            "split": split or "all",
            "bootstrap": bootstrap.resamples,
            "seed": bootstrap.seed,
            "lesion_masks": str(lesion_masks) if lesion_masks else None,
            "left_out": list(map(str, left_out)),
            "gate_refuse": list(map(str, refuse)),
            "bounds": {one.name: one.bound for one in criteria.all},
        }
        begin_run(out, config, resume=False)
    result = run_release_gate(
        scorer,
        ReleaseRequest(
            data=data,
            split=split,
            lesion_masks=lesion_masks,
            left_out=tables,
            refuse=refuse,
            criteria=criteria,
            bootstrap=bootstrap,
        ),
        model_sha256=digest,
        gate=_content_gate(model),
        on_total=on_total,
    )
    told = result.to_dict()
    if out:
        from lungwatch.atomicfile import write_atomic
        from lungwatch.training.release_plots import draw_lesions, draw_release_gate

        text = (to_json(told) + "\n").encode("utf-8", "backslashreplace")
        write_atomic(out / RESULT_FILE, text)
        write_atomic(out / "release_gate.png", draw_release_gate(result.checks))
        if result.lesions:
            write_atomic(out / "lesions.png", draw_lesions(result.lesions))
    if as_json:
        print_json(told)
    else:
        _print(result.checks)
        counts = told["counts"]
        click.echo(
            f"\n{cell_text(result.model)}: release gate {_WORDS[result.verdict]} "
            f"({counts['pass']} pass, {counts['fail']} fail, {counts['not_measured']} not measured)"
        )
        click.echo(RESEARCH_USE_ONLY)
    if result.verdict != "pass":
        sys.exit(1)


def _content_gate(model: Path) -> "ContentGate | None":
    """Return the content gate of a bundle; None for a model that is none, or has none."""
    from lungwatch.bundle import ABOUT_FILE
    from lungwatch.daemon.model import Classifier, find_bundle

    try:
        folder = find_bundle(str(model))
    except NotFoundError:
        return None
    return Classifier.load(folder).gate if (folder / ABOUT_FILE).is_file() else None


def _left_out(scorer: "Scorer", places: Sequence[Path]) -> "Tables":
    """Collect figures of sources left out: of the bundle, of files, of run folders."""
    from lungwatch.export.figures import FIGURES, read_figures
    from lungwatch.training.release_tables import read_left_out_run
    from lungwatch.training.scorers import OnnxScorer

    tables: Tables = {}
    if isinstance(scorer, OnnxScorer):
        tables |= scorer.contract.metrics.get(FIGURES, {})
    for place in places:
        tables |= read_left_out_run(place) if place.is_dir() else read_figures(place)
    return tables


def _print(checks: "Sequence[Check]") -> None:
    print_table(
        ("check", "on", "value", "95 % interval", "bound", "verdict", "beside"),
        [
            (
                check.criterion.title,
                check.on,
                check.value,
                f"{check.interval[0]:.3f} to {check.interval[1]:.3f}" if check.interval else None,
                f"{'≥' if check.criterion.at_least else '≤'} {check.criterion.bound:g}"
                + (" (lower end)" if check.criterion.judged == "low" else ""),
                _WORDS[check.verdict] + (f": {check.reason}" if check.reason else ""),
                ", ".join(f"{name} {value:.3g}" for name, value in check.beside.items()),
            )
            for check in checks
        ],
    )

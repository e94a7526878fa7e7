"""`lungwatch evaluate --gate-images`: what a bundle's content gate keeps and refuses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import print_json, print_table, to_csv, to_json

if TYPE_CHECKING:
    from lungwatch.training.gate_rates import Looked, Rate


def evaluate_gate(
    model: Path,
    folders: Sequence[Path],
    *,
    turned: bool,
    out: Path | None,
    as_json: bool,
    on_total: Callable[[int], Callable[[int], None]],
) -> None:
    """Ask the gate of a bundle about every picture below the folders, and report the rates.

    Needs no TensorFlow, and matplotlib only to write plots into `out`.

    Raises
    ------
    LungwatchError
        If the model has no content gate, or a folder no pictures.
    """
    from lungwatch.cli.run_folder import begin_run
    from lungwatch.daemon.model import Classifier, find_bundle
    from lungwatch.errors import ModelError
    from lungwatch.training.gate_rates import AS_IS, VARIANTS, image_files, look_at, rates

    classifier = Classifier.load(find_bundle(str(model)))
    gate = classifier.gate
    if gate is None:
        raise ModelError(f"{classifier.contract.id} has no content gate")
    files = {folder: image_files(folder) for folder in folders}
    if out:
        from lungwatch.training.evaluation_plots import require_matplotlib

        require_matplotlib()
        config = {
            "command": "evaluate --gate-images",
            "model": classifier.contract.id,
            "model_sha256": classifier.sha256,
            "gate_images": list(map(str, folders)),
            "turned": turned,
        }
        begin_run(out, config, resume=False)
    progress = on_total(sum(map(len, files.values())))
    variants = tuple(VARIANTS) if turned else (AS_IS,)
    looked = [
        one
        for folder, paths in files.items()
        for one in look_at(gate, folder, paths, variants=variants, progress=progress)
    ]
    found = rates(looked)
    result = {
        "model": classifier.contract.id,
        "checks": {check.name: check.threshold for check in gate.contract.checks},
        "rates": [rate.to_dict() for rate in found],
    }
    if out:
        _write(out, result, looked, found)
    if as_json:
        print_json(result)
        return
    print_table(
        ("folder", "copies", "pictures", "kept", "refused", "by the gate", "by the reader"),
        [
            (
                rate.folder,
                rate.variant,
                rate.pictures,
                f"{rate.kept_share:.1%}",
                f"{1 - rate.kept_share:.1%}",
                _counts(rate.refused_by_gate),
                _counts(rate.refused_by_reader),
            )
            for rate in found
        ],
    )
    click.echo(f"\n{RESEARCH_USE_ONLY}")


def _write(
    out: Path, result: dict[str, Any], looked: "Sequence[Looked]", found: "Sequence[Rate]"
) -> None:
    from dataclasses import asdict

    from lungwatch.atomicfile import write_atomic
    from lungwatch.training.evaluation_plots import draw_gate_rates

    rows = [asdict(one) for one in looked]
    told = {"note": RESEARCH_USE_ONLY, **result}
    for name, text in (
        ("gate.json", to_json(told) + "\n"),
        ("gate.csv", to_csv(list(rows[0]), rows)),
    ):
        write_atomic(out / name, text.encode("utf-8", "backslashreplace"))
    write_atomic(out / "gate.png", draw_gate_rates(found))


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"

"""`lungwatch evaluate`: measure a model on data sets."""

import json
from pathlib import Path
from typing import Any, cast

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.options import json_option

_SHOWN = ("roc_auc", "pr_auc", "accuracy", "sensitivity", "specificity", "f1", "ece", "brier")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    default="test",
    show_default=True,
    help="Part of each data set; one that is not split is taken whole.",
)
@json_option
def evaluate(*, model: Path, data: tuple[Path, ...], split: str, as_json: bool) -> None:
    """Measure MODEL on each DATA: overall, and of one finding against another.

    MODEL is a bundle's folder or the name of a shipped one, an .onnx file, a run folder or a
    .keras file. DATA is a folder CLASS/
    or SPLIT/CLASS/, or a manifest CSV or a folder with one.
    """
    from lungwatch.training.dataset import dataset_name
    from lungwatch.training.evaluate import evaluate as measure
    from lungwatch.training.samples import Split
    from lungwatch.training.scorers import load_scorer

    scorer = load_scorer(model)
    chosen = None if split == "all" else cast(Split, split)
    results = [
        {
            "model": scorer.judgement.name,
            "data": dataset_name(path),
            "split": split,
            "threshold": scorer.judgement.decision.threshold,
            **measure(scorer, path, chosen),
        }
        for path in data
    ]
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        _print(result)
    click.echo(RESEARCH_USE_ONLY)


def _print(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['model']} on {result['data']}, split {result['split']}: "
        f"{result['positives']} COVID, {result['negatives']} others, "
        f"threshold {result['threshold']:.4f}"
    )
    for name in _SHOWN:
        click.echo(f"  {name:<12} {result[name]:.3f}")
    click.echo(f"  {'uncertain':<12} {result['uncertain']:.3f}")
    click.echo(f"  tp {result['tp']}  fp {result['fp']}  tn {result['tn']}  fn {result['fn']}")
    for name, probe in result["probes"].items():
        click.echo(
            f"  ROC-AUC {probe['roc_auc']:.3f}  {name} "
            f"({probe['positives']} vs {probe['negatives']})"
        )

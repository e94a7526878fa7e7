"""`lungwatch evaluate`: figures of a model on data sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.evaluate_forms import ProgressBar, other_form
from lungwatch.cli.options import foreign_options, json_option, label_map_option
from lungwatch.cli.output import cell_text, print_json

if TYPE_CHECKING:
    from lungwatch.training.data.dataset import LabelMap, Split
    from lungwatch.training.evaluation.evaluation import ThresholdSource


_SHOWN = ("roc_auc", "pr_auc", "accuracy", "sensitivity", "specificity", "f1", "ece", "brier")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    default="test",
    show_default=True,
    help="Part of each data set; one that is not split is taken whole.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="OTHER_MODEL",
    help="Compare with this model on the same images: DeLong's test, paired bootstrap.",
)
@click.option(
    "--threshold-aim",
    metavar="AIM",
    help="Choose the threshold anew, on --threshold-data: youden, balanced (the smaller of "
    "sensitivity and specificity as large as it can be), sensitivity=0.95 (at least) or "
    "specificity=0.95. Youden if only the data are given.",
)
@click.option(
    "--threshold-data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Validation data that choose the threshold; none of it may be evaluated.",
)
@click.option(
    "--threshold-split",
    type=click.Choice(["train", "val", "all"]),
    default="val",
    show_default=True,
    help="Part of the threshold data.",
)
@click.option(
    "--bootstrap",
    type=click.IntRange(0, 100_000),
    default=1000,
    show_default=True,
    help="Resamples for the 95 % intervals; 0 for none.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Of the resampling behind the intervals.",
)
@click.option(
    "--lung-masks",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with images/ and masks/NAME.png: how much of the map for COVID lies on lungs.",
)
@click.option(
    "--lesion-masks",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder with images/, opacity/NAME.png and perhaps lung/NAME.png: how much of the map for "
    "COVID lies on drawn opacities. Without DATA or with --gate.",
)
@click.option(
    "--gate",
    is_flag=True,
    help="The release gate: every requirement with its bound, and pass or fail; exit code 1 "
    "unless it passes (docs/release-gate.md).",
)
@click.option(
    "--left-out",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    metavar="RUN_OR_FILE",
    help="With --gate: run folder of a network trained without a source, or tables of such figures "
    "in JSON, besides those that the bundle carries; repeatable.",
)
@click.option(
    "--gate-refuse",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="With --gate: pictures of something else, which the content gate must refuse; repeatable.",
)
@click.option(
    "--gate-bounds",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='With --gate: other bounds, JSON {"auc": 0.85}.',
)
@click.option(
    "--gate-images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Instead of DATA: what the bundle's content gate keeps and refuses of all DICOM, PNG and "
    "JPEG files below DIR, by folder and reason. Can be given more than once; needs no TensorFlow.",
)
@click.option(
    "--turned",
    is_flag=True,
    help="With --gate-images: copies turned by 90, 180 and 270 degrees and inverted ones, too.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="OUT_DIR",
    help="New run folder: configuration, environment, metrics.json, scores.csv, plots, gallery, "
    "report.html. It shows X-rays and names files.",
)
@click.option(
    "--resume", is_flag=True, help="Go on in a run folder that was begun: what is scored stays."
)
@click.option(
    "--gallery",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Cases in the gallery of each of true and false positives and negatives.",
)
@label_map_option
@foreign_options
@json_option
def evaluate(
    *,
    model: Path,
    data: tuple[Path, ...],
    split: str,
    compare: Path | None,
    threshold_aim: str | None,
    threshold_data: Path | None,
    threshold_split: str,
    bootstrap: int,
    seed: int,
    lung_masks: Path | None,
    out: Path | None,
    resume: bool,
    gallery: int,
    labels: "LabelMap | None",
    output: str | None,
    input_range: str | None,
    channels: int | None,
    as_json: bool,
    **_: object,
) -> None:
    """Measure MODEL on each DATA: overall, by source, and of one finding against another.

    MODEL is a bundle's folder or the name of a shipped one, an .onnx file, a run folder or a
    .keras file. DATA is a folder CLASS/
    or SPLIT/CLASS/, or a manifest CSV or a folder with one.
    """
    if other_form(click.get_current_context().params):
        return
    if not data:
        raise click.UsageError("give DATA to measure on")
    from lungwatch.cli.dataset import begin_run
    from lungwatch.cli.evaluate_forms import write_evaluation
    from lungwatch.training.data.splits import learnt_of
    from lungwatch.training.evaluation.evaluation import EvaluationRequest, run_evaluation
    from lungwatch.training.evaluation.evaluation_plots import require_matplotlib
    from lungwatch.training.evaluation.foreign import Declaration
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.scorers import (
        ScoreCache,
        load_scorer,
        model_digest,
        place_of,
    )

    request = EvaluationRequest(
        data=data,
        split=_split(split),
        threshold=_threshold(threshold_aim, threshold_data, threshold_split),
        bootstrap=Bootstrap(resamples=bootstrap, seed=seed),
        lung_masks=lung_masks,
        labels=labels,
    )
    if resume and out is None:
        raise click.UsageError("--resume needs --out")
    declared = Declaration.parse(output, input_range, channels)
    scorer = load_scorer(model, declared)
    other = load_scorer(compare) if compare else None
    caches = None
    if out:
        require_matplotlib()
        digests = [model_digest(path) for path in (model, compare) if path]
        config = {
            "command": "evaluate",
            "model": scorer.judgement.name,
            "compare": other.judgement.name if other else None,
            "model_sha256": digests,
            "data": list(map(str, data)),
            "split": split,
            "threshold": [threshold_aim, str(threshold_data or ""), threshold_split],
            "bootstrap": bootstrap,
            "seed": seed,
            "lung_masks": str(lung_masks) if lung_masks else None,
            "gallery": gallery,
            **({"declared": declared.to_dict()} if declared else {}),
            **({"label_map": labels.to_dict()} if labels else {}),
        }
        begin_run(out, config, resume=resume)
        caches = [ScoreCache(folder=out / "logits", digest=digest) for digest in digests]
    with ProgressBar() as bar:
        evaluations = run_evaluation(
            scorer,
            request,
            other=other,
            learnt=learnt_of(place_of(model)),
            caches=caches,
            on_total=bar.start,
        )
    if out:
        write_evaluation(out, scorer, evaluations, per_group=gallery, seed=seed)
    results = [evaluation.result for evaluation in evaluations]
    if as_json:
        print_json(results)
        return
    for result in results:
        _print(result)
    if out:
        _say(f"report: {out / 'report.html'}")
    click.echo(RESEARCH_USE_ONLY)


def _split(text: str) -> "Split | None":
    return None if text == "all" else cast("Split", text)


def _threshold(aim: str | None, data: Path | None, split: str) -> "ThresholdSource | None":
    from lungwatch.training.evaluation.calibration import Aim
    from lungwatch.training.evaluation.evaluation import ThresholdSource

    if data is None:
        if aim is not None:
            raise click.UsageError(
                "--threshold-aim needs --threshold-data: the test images may not choose it"
            )
        return None
    return ThresholdSource(aim=Aim.parse(aim or "youden"), data=data, split=_split(split))


def _print(result: dict[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import FEWEST

    _say(
        f"{result['model']} on {result['data']}, split {result['split']}: "
        f"{result['positives']} COVID, {result['negatives']} others, "
        f"threshold {result['threshold']:.4f}"
    )
    _print_learnt(result["learnt"], result["positives"] + result["negatives"])
    for what, counts in result.get("labels", {}).items():
        for label, count in counts.items():
            _say(f"  label {label!r} {what}: {count} images")
    if choice := result.get("threshold_choice"):
        _say(
            f"  threshold chosen for {choice['aim']} on {choice['data']}, split "
            f"{choice['split']}: sensitivity {choice['sensitivity']:.3f}, specificity "
            f"{choice['specificity']:.3f} there; abstention off"
        )
        if choice["learnt_from"]:
            _say(
                f"  of the {choice['images']} images that chose it, the model had learnt from "
                f"{choice['learnt_from']}: it is too favourable"
            )
    if patients := result["patients"]:
        _say(
            f"  patients: {patients['positives']} with COVID, {patients['negatives']} others; "
            "intervals over patients"
        )
    for name in _SHOWN:
        _say(
            f"  {name:<12} {result[name]:.3f}{_interval(result['intervals'].get(name))}"
            f"{_few(name, result['too_few'])}"
        )
    _say(f"  {'uncertain':<12} {result['uncertain']:.3f}")
    _say(f"  tp {result['tp']}  fp {result['fp']}  tn {result['tn']}  fn {result['fn']}")
    for name, probe in result["probes"].items():
        _say(
            f"  ROC-AUC {probe['roc_auc']:.3f}{_interval(result['probe_intervals'].get(name))}  "
            f"{name} ({probe['positives']} vs {probe['negatives']})"
            f"{_few(name, result['probe_too_few'])}"
        )
    for name, found in result["sources"].items():
        figures = ", ".join(
            f"{figure} {found[figure]:.3f}{_interval(found['intervals'].get(figure))}"
            f"{_few(figure, found['too_few'])}"
            for figure in ("accuracy", "sensitivity", "specificity", "roc_auc")
            if found[figure] is not None
        )
        _say(
            f"  source {name} ({found['positives']} COVID, {found['negatives']} others): {figures}"
        )
    if lungs := result.get("lungs"):
        _print_lungs(lungs)
    if comparison := result.get("comparison"):
        _print_comparison(comparison, result["too_few"])
    few = [result["too_few"], result["probe_too_few"]]
    if any(few) or any(found["too_few"] for found in result["sources"].values()):
        _say(
            f"  too few: behind the figure stand fewer than {FEWEST} patients of a class (images, "
            "where patients are unknown)"
        )


def _print_learnt(found: dict[str, Any] | None, images: int) -> None:
    if found is None:
        _say("  learnt from: not known, the model carries no record of its training images")
        return
    if not found["images"]:
        _say(f"  learnt from: none of the {images} images, byte for byte")
        return
    more = found["images"] - len(found["names"])
    _say(
        f"  learnt from: {found['images']} of the {images} images "
        f"({', '.join(found['names'])}{f' and {more} more' if more else ''})"
    )
    without = found["without"]
    if without is None:
        _say("  without them: no figures, both classes are needed")
        return
    _say(f"  without them: {without['positives']} COVID, {without['negatives']} others")
    for name in _SHOWN:
        _say(
            f"    {name:<12} {without[name]:.3f}{_interval(without['intervals'].get(name))}"
            f"{_few(name, without['too_few'])}"
        )


def _print_lungs(found: dict[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import FEWEST

    few = ["all"] if found["images"] - found["without_map"] < FEWEST else []
    _say(
        f"  the map for COVID against drawn lungs ({found['images']} images, "
        f"{found['without_map']} without a map):"
    )
    for name in ("map_in_lungs", "strongest_point_in_lungs", "lung_area"):
        if found[name] is not None:
            interval = _interval(found["intervals"].get(name)) + _few("all", few)
            _say(f"    {name:<26} {found[name]:.3f}{interval}")


def _print_comparison(found: dict[str, Any], few: list[str]) -> None:
    _say(f"  against {found['model']}, this less that:")
    for name in _SHOWN:
        _say(
            f"    {name:<12} {found['differences'][name]:+.3f}"
            f"{_interval(found['intervals'].get(name))}{_few(name, few)}"
        )
    if test := found["delong"]:
        _say(
            f"    DeLong: ROC-AUC {test['difference']:+.4f} "
            f"[{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p_value']:.2g}"
        )


def _say(line: str) -> None:
    """Print a line that names data sets, sources or models, whatever they are called."""
    click.echo(cell_text(line))


def _few(name: str, names: list[str]) -> str:
    return " (too few)" if name in names else ""


def _interval(pair: list[float] | None) -> str:
    return f" [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else ""

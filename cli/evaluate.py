"""`lungwatch evaluate`: figures of a model on data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.evaluate_forms import evaluate_other_form, write_result, write_text
from lungwatch.cli.options import (
    any_path,
    existing_file,
    existing_folder,
    folder_path,
    foreign_options,
    json_option,
    label_map_option,
    setting,
)
from lungwatch.cli.output import ProgressBar, cell_text, print_json, to_csv
from lungwatch.errors import ModelError
from lungwatch.files import make_dirs, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lungwatch.training.data.dataset import Split
    from lungwatch.training.evaluation.evaluation import SetEvaluation, ThresholdSource
    from lungwatch.training.evaluation.report import ReportSection
    from lungwatch.training.evaluation.scorers import Scorer

_SHOWN = ("roc_auc", "pr_auc", "accuracy", "sensitivity", "specificity", "f1", "ece", "brier")

_GALLERY_SIDE_PX = 320

_MAP_OPACITY = 0.4

# A file name has at most 255 bytes.
_NAME_BYTES = 200


@click.command()
@click.argument("model", type=any_path)
@click.argument("data", type=any_path, nargs=-1)
@setting(
    "--split",
    "test",
    click.Choice(["train", "val", "test", "all"]),
    "Split to evaluate; a data set without splits is used whole.",
)
@click.option(
    "--compare",
    type=any_path,
    metavar="OTHER_MODEL",
    help="Compare with this model on the same images: DeLong's test, paired bootstrap.",
)
@click.option(
    "--threshold-aim",
    metavar="AIM",
    help="Choose the threshold on --threshold-data: youden, balanced (maximises the smaller of "
    "sensitivity and specificity), sensitivity=0.95 (at least) or specificity=0.95; youden if not "
    "given.",
)
@click.option(
    "--threshold-data",
    type=any_path,
    metavar="DIR",
    help="Validation data that choose the threshold; they must not be among DATA.",
)
@setting(
    "--threshold-split",
    "val",
    click.Choice(["train", "val", "all"]),
    "Split of the threshold data.",
)
@setting(
    "--bootstrap",
    1000,
    click.IntRange(0, 100_000),
    "Bootstrap resamples for the 95 % intervals; 0 for none.",
)
@setting("--seed", 1, click.IntRange(0), "Random seed of the bootstrap and the gallery.")
@click.option(
    "--lung-masks",
    type=any_path,
    metavar="DIR",
    help="Folder with images/ and masks/NAME.png: measures the share of the COVID map on lungs.",
)
@click.option(
    "--lesion-masks",
    type=existing_folder,
    metavar="DIR",
    help="Folder with images/, opacity/NAME.png and optionally lung/NAME.png: measures the share "
    "of the COVID map on drawn opacities. Without DATA or with --gate.",
)
@click.option(
    "--gate",
    is_flag=True,
    help="Release gate: every criterion with its bound and verdict; exit code 1 unless all pass "
    "(docs/release-gate.md).",
)
@click.option(
    "--left-out",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    metavar="RUN_OR_FILE",
    help="With --gate: run folder of a network trained without a source, or JSON tables of such "
    "figures, besides those in the bundle. Repeatable.",
)
@click.option(
    "--gate-refuse",
    type=existing_folder,
    multiple=True,
    metavar="DIR",
    help="With --gate: other pictures, which the content gate must refuse. Repeatable.",
)
@click.option(
    "--gate-bounds",
    type=existing_file,
    metavar="FILE",
    help='With --gate: other bounds, JSON {"auc": 0.85}.',
)
@click.option(
    "--gate-images",
    type=existing_folder,
    multiple=True,
    metavar="DIR",
    help="Instead of DATA: counts what the bundle's content gate keeps and refuses of all DICOM, "
    "PNG and JPEG files below DIR, by folder and reason; needs no TensorFlow. Repeatable.",
)
@click.option(
    "--turned",
    is_flag=True,
    help="With --gate-images: also copies rotated by 90, 180 and 270 degrees, and inverted.",
)
@click.option(
    "-o",
    "--out",
    type=folder_path,
    metavar="OUT_DIR",
    help="New run folder: configuration, environment, metrics.json, scores.csv, plots, gallery, "
    "report.html. It shows X-rays and names files.",
)
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted evaluation; scored images are kept."
)
@setting(
    "--gallery",
    4,
    click.IntRange(0, 100),
    "Gallery: cases of each of true and false positives and negatives.",
)
@label_map_option
@foreign_options
@json_option
def evaluate(**options: Any) -> None:  # noqa: ANN401 - click's options by name
    """Evaluate MODEL on each DATA: overall, by source, and between pairs of classes.

    MODEL is the folder of a bundle or the name of a shipped one, an .onnx file, a run folder or a
    .keras file. DATA is a folder CLASS/ or SPLIT/CLASS/, or a manifest CSV or a folder with one.
    """
    if evaluate_other_form(options):
        return
    if not options["data"]:
        raise click.UsageError("give DATA to evaluate on")
    if options["resume"] and options["out"] is None:
        raise click.UsageError("--resume needs --out")
    results = _evaluate_data_sets(options)
    if options["as_json"]:
        print_json(results)
        return
    for result in results:
        _print_result(result)
    if options["out"]:
        _print_line(f"report: {options['out'] / 'report.html'}")
    click.echo(RESEARCH_USE_ONLY)


def _evaluate_data_sets(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluate on each data set, fill the run folder if one is asked for, return the results."""
    from lungwatch.training.data.splits import learnt_of
    from lungwatch.training.evaluation.evaluation import EvaluationRequest, run_evaluation
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.plots import require_matplotlib
    from lungwatch.training.evaluation.scorers import (
        Declaration,
        ScoreCache,
        load_scorer,
        model_digest,
        place_of,
    )
    from lungwatch.training.fitting.run import begin_run

    model, compare, out = options["model"], options["compare"], options["out"]
    request = EvaluationRequest(
        data=options["data"],
        split=_split(options["split"]),
        threshold=_threshold(options),
        bootstrap=Bootstrap(resamples=options["bootstrap"], seed=options["seed"]),
        lung_masks=options["lung_masks"],
        labels=options["labels"],
    )
    declared = Declaration.parse(options["output"], options["input_range"], options["channels"])
    scorer = load_scorer(model, declared)
    other = load_scorer(compare) if compare else None
    caches = None
    if out:
        require_matplotlib()
        digests = [model_digest(path) for path in (model, compare) if path]
        aim, threshold_data = options["threshold_aim"], options["threshold_data"]
        config = {
            "command": "evaluate",
            "model": scorer.judgement.name,
            "compare": other.judgement.name if other else None,
            "model_sha256": digests,
            "data": list(map(str, options["data"])),
            "split": options["split"],
            "threshold": [aim, str(threshold_data or ""), options["threshold_split"]],
            "bootstrap": options["bootstrap"],
            "seed": options["seed"],
            "lung_masks": str(options["lung_masks"]) if options["lung_masks"] else None,
            "gallery": options["gallery"],
            **({"declared": declared.to_dict()} if declared else {}),
            **({"label_map": options["labels"].to_dict()} if options["labels"] else {}),
        }
        begin_run(out, config, resume=options["resume"])
        caches = [ScoreCache(folder=out / "logits", digest=digest) for digest in digests]
    with ProgressBar("reading images") as bar:
        evaluations = run_evaluation(
            scorer,
            request,
            other=other,
            learnt=learnt_of(place_of(model)),
            caches=caches,
            on_total=bar.start,
        )
    if out:
        _write_evaluation(
            out, scorer, evaluations, per_group=options["gallery"], seed=options["seed"]
        )
    return [evaluation.result for evaluation in evaluations]


def _write_evaluation(
    folder: Path,
    scorer: "Scorer",
    evaluations: Sequence["SetEvaluation"],
    *,
    per_group: int,
    seed: int,
) -> None:
    """Write metrics.json, scores.csv, report.html, and plots in a folder for each data set.

    Parameters
    ----------
    folder
        Run folder, which exists.
    scorer
        The model; makes the maps of the gallery.
    evaluations
        Evaluation of each data set.
    per_group
        Cases of each group in the gallery; 0 for none.
    seed
        Selects the cases.
    """
    from lungwatch.training.evaluation.evaluation import rows
    from lungwatch.training.evaluation.report import write_report

    results = [evaluation.result for evaluation in evaluations]
    write_result(folder / "metrics.json", {"results": results})
    table = [
        {"data": evaluation.result["data"], **row}
        for evaluation in evaluations
        for row in rows(evaluation.scored, evaluation.location, evaluation.other)
    ]
    write_text(folder / "scores.csv", to_csv(list(table[0]), table))
    sections = []
    for number, evaluation in enumerate(evaluations, start=1):
        # Two data sets may have the same name.
        place = folder / f"{number:02d}-{_folder_name(evaluation.result['data'])}"
        make_dirs(place)
        section = _section(scorer, evaluation, per_group=per_group, seed=seed)
        for name, data in section.plots.items():
            write_atomic(place / f"{name}.png", data)
        _write_gallery(place, section)
        sections.append(section)
    write_text(folder / "report.html", write_report(scorer.judgement.name, sections))


def _render_case(
    pixels: "NDArray[np.float32]", maps: "NDArray[np.float32]"
) -> "list[NDArray[np.uint8]]":
    """Draw an X-ray as the daemon does: plain, with the map for COVID, with NEGATIVE's.

    Parameters
    ----------
    pixels
        float32, shape (H, W), 0..1, air dark.
    maps
        float32, shape (2, h, w), 0..1: NEGATIVE and COVID.

    Returns
    -------
    list of numpy.ndarray
        uint8 RGB, shape (h, w, 3).
    """
    import numpy as np

    from lungwatch.daemon.overlay.render import blend, make_preview, upsample

    preview = make_preview(pixels, _GALLERY_SIDE_PX)
    height, width = preview.shape
    plain = np.repeat(preview[:, :, np.newaxis], 3, axis=2)
    negative, covid = (
        blend(preview, upsample(one, height, width), _MAP_OPACITY) for one in (maps[0], maps[1])
    )
    return [plain, covid, negative]


def _folder_name(name: str) -> str:
    """Return a data set's name as a part of a folder name."""
    plain = "".join(char if char.isprintable() and char != "/" else "-" for char in name)
    return plain.encode()[:_NAME_BYTES].decode(errors="ignore")


def _section(
    scorer: "Scorer", evaluation: "SetEvaluation", *, per_group: int, seed: int
) -> "ReportSection":
    from lungwatch.training.evaluation.plots import draw_plots
    from lungwatch.training.evaluation.report import ReportSection, make_gallery

    note = ""
    try:
        gallery = make_gallery(
            scorer, evaluation.scored, _render_case, per_group=per_group, seed=seed
        )
    except ModelError as error:
        # The figures do not need maps; the report gives the reason.
        gallery, note = [], f"No gallery: {error}"
    return ReportSection(
        result=evaluation.result,
        plots=draw_plots(evaluation.scored, evaluation.other),
        gallery=gallery,
        note=note,
    )


def _write_gallery(place: Path, section: "ReportSection") -> None:
    from lungwatch.training.evaluation.plots import draw_gallery
    from lungwatch.training.evaluation.report import GROUPS

    for group in GROUPS:
        strips = [
            (f"{case.sample.finding}, p = {case.probability:.3f}", case.pictures)
            for case in section.gallery
            if case.group == group
        ]
        if strips:
            write_atomic(place / f"gallery-{group}.png", draw_gallery(strips))


def _split(text: str) -> "Split | None":
    return None if text == "all" else cast("Split", text)


def _threshold(options: dict[str, Any]) -> "ThresholdSource | None":
    from lungwatch.training.evaluation.calibration import Aim
    from lungwatch.training.evaluation.evaluation import ThresholdSource

    aim, data = options["threshold_aim"], options["threshold_data"]
    if data is None:
        if aim is not None:
            raise click.UsageError(
                "--threshold-aim needs --threshold-data: test images must not choose the threshold"
            )
        return None
    split = _split(options["threshold_split"])
    return ThresholdSource(aim=Aim.parse(aim or "youden"), data=data, split=split)


def _print_result(result: dict[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import FEWEST

    _print_line(
        f"{result['model']} on {result['data']}, split {result['split']}: "
        f"{result['positives']} COVID, {result['negatives']} others, "
        f"threshold {result['threshold']:.4f}"
    )
    _print_learnt(result["learnt"], result["positives"] + result["negatives"])
    for what, counts in result.get("labels", {}).items():
        for label, count in counts.items():
            _print_line(f"  label {label!r} {what}: {count} images")
    if choice := result.get("threshold_choice"):
        _print_line(
            f"  threshold chosen for {choice['aim']} on {choice['data']}, split "
            f"{choice['split']}: sensitivity {choice['sensitivity']:.3f}, specificity "
            f"{choice['specificity']:.3f} there; abstention off"
        )
        if choice["learnt_from"]:
            _print_line(
                f"  {choice['learnt_from']} of the {choice['images']} images that chose it are "
                "training images of the model: it is too favourable"
            )
    if patients := result["patients"]:
        _print_line(
            f"  patients: {patients['positives']} with COVID, {patients['negatives']} others; "
            "intervals over patients"
        )
    for name in _SHOWN:
        _print_line(
            f"  {name:<12} {result[name]:.3f}{_interval(result['intervals'].get(name))}"
            f"{_few(name, result['too_few'])}"
        )
    _print_line(f"  {'uncertain':<12} {result['uncertain']:.3f}")
    _print_line(f"  tp {result['tp']}  fp {result['fp']}  tn {result['tn']}  fn {result['fn']}")
    for name, probe in result["probes"].items():
        _print_line(
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
        _print_line(
            f"  source {name} ({found['positives']} COVID, {found['negatives']} others): {figures}"
        )
    if lungs := result.get("lungs"):
        _print_lungs(lungs)
    if comparison := result.get("comparison"):
        _print_comparison(comparison, result["too_few"])
    few = [result["too_few"], result["probe_too_few"]]
    if any(few) or any(found["too_few"] for found in result["sources"].values()):
        _print_line(
            f"  too few: fewer than {FEWEST} patients of a class (images, where patients are "
            "unknown)"
        )


def _print_learnt(found: dict[str, Any] | None, images: int) -> None:
    if found is None:
        _print_line("  training images: unknown, the model has no record of them")
        return
    if not found["images"]:
        _print_line(f"  training images: none of the {images} images, byte for byte")
        return
    more = found["images"] - len(found["names"])
    _print_line(
        f"  training images: {found['images']} of the {images} images "
        f"({', '.join(found['names'])}{f' and {more} more' if more else ''})"
    )
    without = found["without"]
    if without is None:
        _print_line("  without them: no figures, a class is missing")
        return
    _print_line(f"  without them: {without['positives']} COVID, {without['negatives']} others")
    for name in _SHOWN:
        _print_line(
            f"    {name:<12} {without[name]:.3f}{_interval(without['intervals'].get(name))}"
            f"{_few(name, without['too_few'])}"
        )


def _print_lungs(found: dict[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import FEWEST

    few = ["all"] if found["images"] - found["without_map"] < FEWEST else []
    _print_line(
        f"  COVID map on drawn lungs ({found['images']} images, "
        f"{found['without_map']} without a map):"
    )
    for name in ("map_in_lungs", "strongest_point_in_lungs", "lung_area"):
        if found[name] is not None:
            interval = _interval(found["intervals"].get(name)) + _few("all", few)
            _print_line(f"    {name:<26} {found[name]:.3f}{interval}")


def _print_comparison(found: dict[str, Any], few: list[str]) -> None:
    _print_line(f"  difference (this model - {found['model']}):")
    for name in _SHOWN:
        _print_line(
            f"    {name:<12} {found['differences'][name]:+.3f}"
            f"{_interval(found['intervals'].get(name))}{_few(name, few)}"
        )
    if test := found["delong"]:
        _print_line(
            f"    DeLong: ROC-AUC {test['difference']:+.4f} "
            f"[{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p_value']:.2g}"
        )


def _print_line(line: str) -> None:
    """Print a line that quotes names of data sets, sources or models."""
    click.echo(cell_text(line))


def _few(name: str, names: list[str]) -> str:
    return " (too few)" if name in names else ""


def _interval(pair: list[float] | None) -> str:
    return f" [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else ""

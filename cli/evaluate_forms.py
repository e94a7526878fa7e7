"""Other forms of `lungwatch evaluate`: content gate, release gate, drawn opacities."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import ProgressBar, cell_text, print_json, print_table, to_csv, to_json
from lungwatch.errors import ModelError, NotFoundError
from lungwatch.files import write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lungwatch.daemon.pipeline.gate import ContentGate
    from lungwatch.training.data.pixels import LesionImage
    from lungwatch.training.evaluation.gate_rates import GateOutcome, Rate
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.release_data import CriterionCheck
    from lungwatch.training.evaluation.release_gate import Tables
    from lungwatch.training.evaluation.scorers import Scorer

_DATA_OPTIONS = ("resume", "turned", "lung_masks", "threshold_aim", "threshold_data")
_GATE_OPTIONS = ("left_out", "gate_refuse", "gate_bounds")


def evaluate_other_form(options: Mapping[str, Any]) -> bool:
    """Evaluate a content gate, a release gate or maps on opacities, if that was asked for.

    Parameters
    ----------
    options
        The command's parameters, by name.

    Returns
    -------
    bool
        False if none of them was asked for.

    Raises
    ------
    click.UsageError
        If options do not go together.
    """
    if not options["gate"]:
        _refuse(options, _GATE_OPTIONS, "needs --gate")
    if options["gate_images"]:
        _refuse(
            options, ("data", "resume", "gate", "lesion_masks"), "does not go with --gate-images"
        )
        _evaluate_content_gate(options)
        return True
    _refuse(options, ("turned",), "needs --gate-images")
    if options["gate"]:
        _refuse(options, (*_DATA_OPTIONS, "compare"), "does not go with --gate")
        if not options["data"]:
            raise click.UsageError("give DATA to evaluate on: --gate needs some")
        _evaluate_release_gate(options)
        return True
    if options["lesion_masks"]:
        _refuse(options, (*_DATA_OPTIONS, "data"), "goes with --lesion-masks only under --gate")
        _evaluate_lesions(options)
        return True
    return False


def _refuse(options: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if options[name]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} {why}")


def _begin(out: Path | None, config: Mapping[str, object]) -> None:
    """Create the run folder, if one is asked for; the settings are plain values or paths."""
    if out:
        from lungwatch.training.evaluation.plots import require_matplotlib
        from lungwatch.training.fitting.run import begin_run

        require_matplotlib()
        begin_run(out, dict(config), resume=False)


def write_text(path: Path, text: str) -> None:
    """Write a file of a run folder; lone surrogates, as of file names, are escaped."""
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_result(path: Path, result: Mapping[str, object]) -> None:
    """Write results as JSON, with the note on research use."""
    write_text(path, to_json({"note": RESEARCH_USE_ONLY, **result}) + "\n")


def _evaluate_content_gate(options: Mapping[str, Any]) -> None:
    """Print what the content gate of a bundle keeps and refuses, by folder.

    Needs no TensorFlow, and matplotlib only for the plots of a run folder.
    """
    from lungwatch.daemon.pipeline.model import Classifier, find_bundle
    from lungwatch.training.evaluation.gate_rates import (
        AS_IS,
        VARIANTS,
        gate_outcomes,
        image_files,
        rates,
    )

    folders, turned, out = options["gate_images"], options["turned"], options["out"]
    classifier = Classifier.load(find_bundle(str(options["model"])))
    gate = classifier.gate
    if gate is None:
        raise ModelError(f"{classifier.contract.id} has no content gate")
    files = {folder: image_files(folder) for folder in folders}
    _begin(
        out,
        {
            "command": "evaluate --gate-images",
            "model": classifier.contract.id,
            "model_sha256": classifier.sha256,
            "gate_images": list(map(str, folders)),
            "turned": turned,
        },
    )
    with ProgressBar("reading images", sum(map(len, files.values()))) as bar:
        outcomes = [
            outcome
            for folder, paths in files.items()
            for outcome in gate_outcomes(
                gate,
                folder,
                paths,
                variants=tuple(VARIANTS) if turned else (AS_IS,),
                progress=bar.advance,
            )
        ]
    found = rates(outcomes)
    result = {
        "model": classifier.contract.id,
        "checks": {check.name: check.threshold for check in gate.contract.checks},
        "rates": [rate.to_dict() for rate in found],
    }
    if out:
        _write_content_gate(out, result, outcomes, found)
    if options["as_json"]:
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


def _write_content_gate(
    out: Path, result: dict[str, Any], outcomes: "Sequence[GateOutcome]", found: "Sequence[Rate]"
) -> None:
    from lungwatch.training.evaluation.plots import draw_gate_rates

    rows = [asdict(one) for one in outcomes]
    write_result(out / "gate.json", result)
    write_text(out / "gate.csv", to_csv(list(rows[0]), rows))
    write_atomic(out / "gate.png", draw_gate_rates(found))


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"


_LESION_ROWS = (
    ("peak of the map on an opacity", "peak_on_lesion"),
    ("a random point of the lungs", "random_point_of_lungs"),
    ("a random point of the image", "random_point_of_image"),
    ("peak of another patient's map", "other_map_peak"),
    ("peak above a random point of the lungs", "peak_above_random_point"),
    ("peak above another patient's map", "peak_above_other_map"),
    ("share of the map on opacities", "map_on_lesion"),
    ("share of another patient's map", "other_map_share"),
    ("share above another patient's map", "share_above_other_map"),
    ("correlation of different patients' maps", "likeness_of_maps"),
)

_SHUFFLED = {
    "head": "head with shuffled weights",
    "half": "half of the layers with shuffled weights",
    "all": "all layers with shuffled weights",
}


def _evaluate_lesions(options: Mapping[str, Any]) -> None:
    """Print where a model's maps lie on X-rays with drawn opacities."""
    from lungwatch.training.evaluation.maps import measure_lesions
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.scorers import load_scorer, model_digest

    model, folder, compare = options["model"], options["lesion_masks"], options["compare"]
    bootstrap = Bootstrap(resamples=options["bootstrap"], seed=options["seed"])
    scorer = load_scorer(model)
    other = load_scorer(compare) if compare else None
    if other and other.judgement.preprocess != scorer.judgement.preprocess:
        raise ModelError(
            f"{other.judgement.name} and {scorer.judgement.name} preprocess images differently: "
            "their maps cannot be compared"
        )
    out = options["out"]
    _begin(
        out,
        {
            "command": "evaluate --lesion-masks",
            "model": scorer.judgement.name,
            "model_sha256": model_digest(model),
            "lesion_masks": str(folder),
            "compare": str(compare) if compare else None,
            "bootstrap": bootstrap.resamples,
            "seed": bootstrap.seed,
        },
    )
    with ProgressBar("reading images") as bar:
        found, maps, images = measure_lesions(scorer, folder, bootstrap, progress=bar.advance)
    result = {
        "model": scorer.judgement.name,
        **found,
        **_compare_maps(scorer, other, images, maps, bootstrap),
    }
    if out:
        from lungwatch.training.evaluation.plots import draw_lesion_cases, draw_lesions

        write_result(out / "lesions.json", result)
        write_atomic(out / "lesions.png", draw_lesions(found))
        cases = draw_lesion_cases(images, maps, scorer.judgement.preprocess)
        write_atomic(out / "lesion-maps.png", cases)
    if options["as_json"]:
        print_json(result)
    else:
        _print_lesions(result)


def _compare_maps(
    scorer: "Scorer",
    other: "Scorer | None",
    images: "Sequence[LesionImage]",
    maps: "NDArray[np.float32]",
    bootstrap: "Bootstrap",
) -> dict[str, Any]:
    """Compare a model's maps with those of its shuffled weights, and with another model's."""
    import numpy as np

    from lungwatch.training.evaluation.maps import compare_maps, compare_randomised, covid_maps

    pixels = np.stack([image.pixels for image in images])
    compared: dict[str, Any] = {"shuffled": compare_randomised(scorer, pixels, maps, bootstrap)}
    if other:
        others = covid_maps(other.maps, pixels)
        if others.shape != maps.shape:
            raise ModelError(
                f"maps of {other.judgement.name} have {others.shape[1:]} cells, those of "
                f"{scorer.judgement.name} {maps.shape[1:]}: they cannot be compared"
            )
        likeness = compare_maps(maps, [others], bootstrap)
        compared["compared"] = {"model": other.judgement.name, **likeness}
    return compared


def _print_lesions(result: dict[str, Any]) -> None:
    click.echo(
        cell_text(
            f"{result['model']} on {result['data']}: {result['images']} images with drawn "
            f"opacities ({result['without_opacity']} without any, {result['without_map']} without "
            "a map)"
        )
    )
    print_table(
        ("COVID map", "mean", "95 % interval"),
        [(title, result[key], _interval(result, key)) for title, key in _LESION_ROWS],
    )
    click.echo("")
    tables = [(title, result["shuffled"][depth]) for depth, title in _SHUFFLED.items()]
    if "compared" in result:
        tables.append((result["compared"]["model"], result["compared"]))
    print_table(
        ("maps of the same images by", "correlation", "95 % interval", "SSIM"),
        [
            (title, table["correlation"], _interval(table, "correlation"), table["similarity"])
            for title, table in tables
        ],
    )
    click.echo(f"\n{RESEARCH_USE_ONLY}")


def _interval(found: dict[str, Any], key: str) -> str:
    ends = found["intervals"].get(key)
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""


_VERDICTS = {"pass": "pass", "fail": "FAIL", "not_measured": "not measured"}


def _evaluate_release_gate(options: Mapping[str, Any]) -> None:
    """Put a model through the release gate; exit code 1 unless it passes."""
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.release_data import read_criteria
    from lungwatch.training.evaluation.release_gate import ReleaseRequest, run_release_gate
    from lungwatch.training.evaluation.scorers import load_scorer, model_digest

    model, out = options["model"], options["out"]
    criteria = read_criteria(options["gate_bounds"])
    scorer = load_scorer(model)
    digest = model_digest(model)
    request = ReleaseRequest(
        data=options["data"],
        split=None if options["split"] == "all" else options["split"],
        lesion_masks=options["lesion_masks"],
        left_out=_left_out_tables(scorer, options["left_out"]),
        refuse=options["gate_refuse"],
        criteria=criteria,
        bootstrap=Bootstrap(resamples=options["bootstrap"], seed=options["seed"]),
    )
    _begin(
        out,
        {
            "command": "evaluate --gate",
            "model": scorer.judgement.name,
            "model_sha256": digest,
            "data": list(map(str, request.data)),
            "split": options["split"],
            "bootstrap": request.bootstrap.resamples,
            "seed": request.bootstrap.seed,
            "lesion_masks": str(request.lesion_masks) if request.lesion_masks else None,
            "left_out": list(map(str, options["left_out"])),
            "gate_refuse": list(map(str, request.refuse)),
            "bounds": {one.name: one.bound for one in criteria.all},
        },
    )
    with ProgressBar("reading images") as bar:
        result = run_release_gate(
            scorer, request, model_sha256=digest, gate=_content_gate(model), on_total=bar.start
        )
    values = result.to_dict()
    if out:
        from lungwatch.training.evaluation.plots import draw_lesions, draw_release_gate

        write_text(out / "release_gate.json", to_json(values) + "\n")
        write_atomic(out / "release_gate.png", draw_release_gate(result.checks))
        if result.lesions:
            write_atomic(out / "lesions.png", draw_lesions(result.lesions))
    if options["as_json"]:
        print_json(values)
    else:
        _print_checks(result.checks)
        counts = values["counts"]
        click.echo(
            f"\n{cell_text(result.model)}: release gate {_VERDICTS[result.verdict]} "
            f"({counts['pass']} pass, {counts['fail']} fail, {counts['not_measured']} not measured)"
        )
        click.echo(RESEARCH_USE_ONLY)
    if result.verdict != "pass":
        sys.exit(1)


def _content_gate(model: Path) -> "ContentGate | None":
    """Return the content gate of a bundle; None for other models, or without one."""
    from lungwatch.bundle import ABOUT_FILE
    from lungwatch.daemon.pipeline.model import Classifier, find_bundle

    try:
        folder = find_bundle(str(model))
    except NotFoundError:
        return None
    return Classifier.load(folder).gate if (folder / ABOUT_FILE).is_file() else None


def _left_out_tables(scorer: "Scorer", places: Sequence[Path]) -> "Tables":
    """Collect figures of sources left out from the bundle, files and run folders."""
    from lungwatch.export.card import FIGURES, read_figures
    from lungwatch.training.evaluation.release_gate import read_left_out_run
    from lungwatch.training.evaluation.scorers import OnnxScorer

    tables: Tables = {}
    if isinstance(scorer, OnnxScorer):
        tables |= scorer.contract.metrics.get(FIGURES, {})
    for place in places:
        tables |= read_left_out_run(place) if place.is_dir() else read_figures(place)
    return tables


def _print_checks(checks: "Sequence[CriterionCheck]") -> None:
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
                _VERDICTS[check.verdict] + (f": {check.reason}" if check.reason else ""),
                ", ".join(f"{name} {value:.3g}" for name, value in check.beside.items()),
            )
            for check in checks
        ],
    )

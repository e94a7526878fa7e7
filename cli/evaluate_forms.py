"""Other forms of `lungwatch evaluate`: content gate, release gate, drawn opacities."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import click
import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import cell_text, print_json, print_table, to_csv, to_json
from lungwatch.errors import ModelError, NotFoundError
from lungwatch.files import make_dirs, write_atomic

if TYPE_CHECKING:
    from lungwatch.daemon.pipeline.gate import ContentGate
    from lungwatch.training.data.dataset import Split
    from lungwatch.training.evaluation.evaluation import SetEvaluation
    from lungwatch.training.evaluation.gate_rates import GateOutcome, Rate
    from lungwatch.training.evaluation.metrics import Bootstrap
    from lungwatch.training.evaluation.release_criteria import Check
    from lungwatch.training.evaluation.release_gate import Tables
    from lungwatch.training.evaluation.report import ReportSection
    from lungwatch.training.evaluation.scorers import Scorer


_OF_DATA = ("resume", "turned", "lung_masks", "threshold_aim", "threshold_data")

_OF_GATE = ("left_out", "gate_refuse", "gate_bounds")


def other_form(given: Mapping[str, Any]) -> bool:
    """Measure a content gate, a release gate or maps on opacities, if that was asked for.

    Parameters
    ----------
    given
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
    if not given["gate"]:
        _refuse(given, _OF_GATE, "needs --gate")
    if given["gate_images"]:
        _refuse(given, ("data", "resume", "gate", "lesion_masks"), "does not go with --gate-images")
        _content_gate(given)
        return True
    _refuse(given, ("turned",), "needs --gate-images")
    if given["gate"]:
        _refuse(given, (*_OF_DATA, "compare"), "does not go with --gate")
        if not given["data"]:
            raise click.UsageError("give DATA to measure on: --gate needs some")
        _release_gate(given)
        return True
    if given["lesion_masks"]:
        _refuse(given, (*_OF_DATA, "data"), "goes with --lesion-masks only under --gate")
        _lesions(given)
        return True
    return False


class ProgressBar:
    """A progress bar on stderr, drawn on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def start(self, total: int) -> Callable[[int], None]:
        """Draw the bar for so many images; what is returned is told of each."""
        hidden = not sys.stderr.isatty()
        self._bar = click.progressbar(length=total, label="reading", file=sys.stderr, hidden=hidden)
        self._bar.__enter__()
        return cast(Callable[[int], None], self._bar.update)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if given[name]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} {why}")


def _content_gate(given: Mapping[str, Any]) -> None:

    with ProgressBar() as bar:
        evaluate_gate(
            given["model"],
            given["gate_images"],
            turned=given["turned"],
            out=given["out"],
            as_json=given["as_json"],
            on_total=bar.start,
        )


def _release_gate(given: Mapping[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import Bootstrap

    with ProgressBar() as bar:
        evaluate_release(
            given["model"],
            given["data"],
            split=None if given["split"] == "all" else given["split"],
            bootstrap=Bootstrap(resamples=given["bootstrap"], seed=given["seed"]),
            lesion_masks=given["lesion_masks"],
            left_out=given["left_out"],
            refuse=given["gate_refuse"],
            bounds=given["gate_bounds"],
            out=given["out"],
            as_json=given["as_json"],
            on_total=bar.start,
        )


def _lesions(given: Mapping[str, Any]) -> None:
    from lungwatch.training.evaluation.metrics import Bootstrap

    evaluate_lesions(
        given["model"],
        given["lesion_masks"],
        Bootstrap(resamples=given["bootstrap"], seed=given["seed"]),
        compare=given["compare"],
        out=given["out"],
        as_json=given["as_json"],
    )


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
    from lungwatch.cli.dataset import begin_run
    from lungwatch.daemon.pipeline.model import Classifier, find_bundle
    from lungwatch.errors import ModelError
    from lungwatch.training.evaluation.gate_rates import (
        AS_IS,
        VARIANTS,
        gate_outcomes,
        image_files,
        rates,
    )

    classifier = Classifier.load(find_bundle(str(model)))
    gate = classifier.gate
    if gate is None:
        raise ModelError(f"{classifier.contract.id} has no content gate")
    files = {folder: image_files(folder) for folder in folders}
    if out:
        from lungwatch.training.evaluation.evaluation_plots import require_matplotlib

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
        for one in gate_outcomes(gate, folder, paths, variants=variants, progress=progress)
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
    out: Path, result: dict[str, Any], looked: "Sequence[GateOutcome]", found: "Sequence[Rate]"
) -> None:
    from dataclasses import asdict

    from lungwatch.files import write_atomic
    from lungwatch.training.evaluation.evaluation_plots import draw_gate_rates

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


_ROWS = (
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

_DEPTHS = {
    "head": "head with shuffled weights",
    "half": "half of the layers with shuffled weights",
    "all": "all layers with shuffled weights",
}


def evaluate_lesions(
    model: Path,
    folder: Path,
    bootstrap: "Bootstrap",
    *,
    compare: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Report where a model's maps lie on X-rays whose opacities are drawn.

    Raises
    ------
    LungwatchError
        If the model has no maps, or the masks cannot be used.
    """
    import numpy as np

    from lungwatch.cli.dataset import begin_run
    from lungwatch.errors import ModelError
    from lungwatch.training.evaluation.maps import (
        compare_maps,
        compare_randomised,
        covid_maps,
        measure_lesions,
    )
    from lungwatch.training.evaluation.scorers import load_scorer, model_digest

    scorer = load_scorer(model)
    other = load_scorer(compare) if compare else None
    if other and other.judgement.preprocess != scorer.judgement.preprocess:
        raise ModelError(
            f"{other.judgement.name} prepares its images otherwise than {scorer.judgement.name}: "
            "their maps cannot be compared"
        )
    if out:
        from lungwatch.training.evaluation.evaluation_plots import require_matplotlib

        require_matplotlib()
        config = {
            "command": "evaluate --lesion-masks",
            "model": scorer.judgement.name,
            "model_sha256": model_digest(model),
            "lesion_masks": str(folder),
            "compare": str(compare) if compare else None,
            "bootstrap": bootstrap.resamples,
            "seed": bootstrap.seed,
        }
        begin_run(out, config, resume=False)
    found, maps, images = measure_lesions(scorer, folder, bootstrap)
    pixels = np.stack([image.pixels for image in images])
    result: dict[str, Any] = {
        "model": scorer.judgement.name,
        **found,
        "shuffled": compare_randomised(scorer, pixels, maps, bootstrap),
    }
    if other:
        theirs = covid_maps(other, images)
        if theirs.shape != maps.shape:
            raise ModelError(
                f"maps of {other.judgement.name} have {theirs.shape[1:]} cells, those of "
                f"{scorer.judgement.name} {maps.shape[1:]}: they cannot be compared"
            )
        likeness = compare_maps(maps, [theirs], bootstrap)
        result["compared"] = {"model": other.judgement.name, **likeness}
    if out:
        from lungwatch.files import write_atomic
        from lungwatch.training.evaluation.evaluation_plots import draw_lesion_cases, draw_lesions

        told = {"note": RESEARCH_USE_ONLY, **result}
        text = (to_json(told) + "\n").encode("utf-8", "backslashreplace")
        write_atomic(out / "lesions.json", text)
        write_atomic(out / "lesions.png", draw_lesions(found))
        cases = draw_lesion_cases(images, maps, scorer.judgement.preprocess)
        write_atomic(out / "lesion-maps.png", cases)
    if as_json:
        print_json(result)
        return
    click.echo(
        cell_text(
            f"{result['model']} on {found['data']}: {found['images']} images with drawn opacities "
            f"({found['without_opacity']} without any, {found['without_map']} without a map)"
        )
    )
    print_table(
        ("the map for COVID", "mean", "95 % interval"),
        [(title, found[key], _ends(found, key)) for title, key in _ROWS],
    )
    click.echo("")
    rows = [
        (title, table["correlation"], _ends(table, "correlation"), table["similarity"])
        for title, table in (
            *((title, result["shuffled"][depth]) for depth, title in _DEPTHS.items()),
            *((one["model"], one) for one in [result.get("compared")] if one),
        )
    ]
    print_table(("the same images' maps by a", "correlation", "95 % interval", "SSIM"), rows)
    click.echo(f"\n{RESEARCH_USE_ONLY}")


def _ends(found: dict[str, Any], key: str) -> str:
    ends = found["intervals"].get(key)
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""


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
    from lungwatch.cli.dataset import begin_run
    from lungwatch.training.evaluation.release_criteria import read_criteria
    from lungwatch.training.evaluation.release_gate import ReleaseRequest, run_release_gate
    from lungwatch.training.evaluation.scorers import load_scorer, model_digest

    criteria = read_criteria(bounds)
    scorer = load_scorer(model)
    digest = model_digest(model)
    tables = _left_out(scorer, left_out)
    if out:
        from lungwatch.training.evaluation.evaluation_plots import require_matplotlib

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
        gate=_gate_of(model),
        on_total=on_total,
    )
    told = result.to_dict()
    if out:
        from lungwatch.files import write_atomic
        from lungwatch.training.evaluation.evaluation_plots import draw_lesions, draw_release_gate

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


def _gate_of(model: Path) -> "ContentGate | None":
    """Return the content gate of a bundle; None for a model that is none, or has none."""
    from lungwatch.bundle import ABOUT_FILE
    from lungwatch.daemon.pipeline.model import Classifier, find_bundle

    try:
        folder = find_bundle(str(model))
    except NotFoundError:
        return None
    return Classifier.load(folder).gate if (folder / ABOUT_FILE).is_file() else None


def _left_out(scorer: "Scorer", places: Sequence[Path]) -> "Tables":
    """Collect figures of sources left out: of the bundle, of files, of run folders."""
    from lungwatch.export.card import FIGURES, read_figures
    from lungwatch.training.evaluation.release_gate import read_left_out_run
    from lungwatch.training.evaluation.scorers import OnnxScorer

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


_GALLERY_SIDE_PX = 320

_MAP_OPACITY = 0.4

# File systems take 255 bytes.
_NAME_BYTES = 200


def write_evaluation(
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
        Exists.
    scorer
        The model, which explains the gallery.
    evaluations
        What came out.
    per_group
        Cases of each group in the gallery; 0 for none.
    seed
        Draws them.
    """
    from lungwatch.training.evaluation.evaluation import rows
    from lungwatch.training.evaluation.report import write_report

    results = [evaluation.result for evaluation in evaluations]
    metrics = {"note": RESEARCH_USE_ONLY, "results": results}
    write_atomic(
        folder / "metrics.json", (to_json(metrics) + "\n").encode("utf-8", "backslashreplace")
    )
    table = [
        {"data": evaluation.result["data"], **row}
        for evaluation in evaluations
        for row in rows(evaluation.scored, evaluation.location, evaluation.other)
    ]
    write_atomic(
        folder / "scores.csv", to_csv(list(table[0]), table).encode("utf-8", "backslashreplace")
    )
    sections = []
    for number, evaluation in enumerate(evaluations, start=1):
        # Two data sets may have one name.
        place = folder / f"{number:02d}-{_folder_name(evaluation.result['data'])}"
        make_dirs(place)
        section = _section(scorer, evaluation, per_group=per_group, seed=seed)
        for name, data in section.plots.items():
            write_atomic(place / f"{name}.png", data)
        _write_gallery(place, section)
        sections.append(section)
    report = write_report(scorer.judgement.name, sections)
    write_atomic(folder / "report.html", report.encode("utf-8", "backslashreplace"))


def render_case(pixels: NDArray[np.float32], maps: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    """Draw an X-ray as the daemon does: plain, under the map for COVID, under NEGATIVE's.

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
    from lungwatch.daemon.overlay.render import blend, make_preview, upsample

    preview = make_preview(pixels, _GALLERY_SIDE_PX)
    height, width = preview.shape
    plain = np.repeat(preview[:, :, np.newaxis], 3, axis=2)
    negative, covid = (
        blend(preview, upsample(one, height, width), _MAP_OPACITY) for one in (maps[0], maps[1])
    )
    return [plain, covid, negative]


def _folder_name(name: str) -> str:
    """Return a data set's name as part of a folder's: short enough, on one line."""
    plain = "".join(char if char.isprintable() and char != "/" else "-" for char in name)
    return plain.encode()[:_NAME_BYTES].decode(errors="ignore")


def _section(
    scorer: "Scorer", evaluation: "SetEvaluation", *, per_group: int, seed: int
) -> "ReportSection":
    from lungwatch.training.evaluation.evaluation_plots import draw_plots
    from lungwatch.training.evaluation.report import ReportSection, make_gallery

    note = ""
    try:
        gallery = make_gallery(
            scorer, evaluation.scored, render_case, per_group=per_group, seed=seed
        )
    except ModelError as error:
        # The figures stand without maps; the report says why there are none.
        gallery, note = [], f"No gallery: {error}"
    return ReportSection(
        result=evaluation.result,
        plots=draw_plots(evaluation.scored, evaluation.other),
        gallery=gallery,
        note=note,
    )


def _write_gallery(place: Path, section: "ReportSection") -> None:
    from lungwatch.training.evaluation.evaluation_plots import draw_gallery
    from lungwatch.training.evaluation.report import GROUPS

    for group in GROUPS:
        strips = [
            (f"{case.sample.finding}, p = {case.probability:.3f}", case.pictures)
            for case in section.gallery
            if case.group == group
        ]
        if strips:
            write_atomic(place / f"gallery-{group}.png", draw_gallery(strips))

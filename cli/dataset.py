"""`lungwatch dataset`: explore, check and split a data set."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.options import (
    any_path,
    apply_all,
    folder_path,
    json_option,
    label_map_option,
    setting,
)
from lungwatch.cli.output import ProgressBar, cell_text, print_json, print_table, to_csv, to_json
from lungwatch.errors import DatasetError
from lungwatch.files import make_dirs, write_atomic

if TYPE_CHECKING:
    from lungwatch.training.data.check import DatasetCheck
    from lungwatch.training.data.dataset import LabelMap, Sample
    from lungwatch.training.data.scan import ScannedImage, Unreadable
    from lungwatch.training.fitting.run import RunFolder


_LISTED = 20


def _dataset_options(*, out_help: str, out_required: bool = False) -> Callable[[Any], Any]:
    """Add DATA and the options of all `dataset` commands."""
    options = [
        click.argument("data", type=any_path),
        click.option(
            "-o", "--out", type=folder_path, metavar="RUN_DIR", required=out_required, help=out_help
        ),
        click.option(
            "--resume", is_flag=True, help="Continue an interrupted run; read images are kept."
        ),
        setting("--seed", 1, click.IntRange(0), "Random seed."),
        label_map_option,
        json_option,
    ]
    return lambda command: apply_all(options, command)


_run_folder_option = _dataset_options(
    out_help="New run folder: configuration, environment, results.json, plots, and a "
    "self-contained report.html."
)


@click.group()
def dataset() -> None:
    """Explore, check and split a data set (extra 'train').

    DATA is a folder CLASS/ or SPLIT/CLASS/ (splits train, val, test; classes COVID, NORMAL,
    OTHER_PNEUMONIA), or a manifest CSV or a folder with one (columns file, label, and
    optionally split, source, patient, licence).
    """


@dataset.command()
@_run_folder_option
def explore(
    *,
    data: Path,
    out: Path | None,
    resume: bool,
    seed: int,
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Summarise sizes, formats, classes, grey values, outliers and unreadable files.

    The run folder shows images of patients: protect it like the data set.
    """
    from lungwatch.training.data.dataset import list_dataset
    from lungwatch.training.data.scan import explore as sum_up
    from lungwatch.training.data.scan import per_image
    from lungwatch.training.evaluation.plots import draw_exploration
    from lungwatch.training.evaluation.report import exploration_html

    run = _begin("explore", data, out, resume=resume, seed=seed, labels=labels)
    listing = list_dataset(data, labels)
    scans, unreadable = _scan(listing.samples, run)
    found = sum_up(data, listing.samples, scans, unreadable, listing.labels)
    if run:
        pictures = draw_exploration(scans, seed=seed) if scans else {}
        _write_results(run, found, exploration_html(found, pictures), pictures)
        table = per_image(scans)
        if table:
            text = to_csv(list(table[0]), table)
            write_atomic(run.root / "images.csv", text.encode("utf-8", "backslashreplace"))
    if as_json:
        print_json(found)
        return
    print_table(
        ("split", "class", "images", "mean", "std", "std of means"),
        [(s.split, s.finding, s.images, s.mean, s.std, s.std_of_means) for s in found.statistics],
    )
    click.echo()
    formats = ", ".join(f"{count} {name}" for name, count in found.formats.items())
    span = found.size_range
    click.echo(
        f"{found.files} files ({formats or 'none readable'}), {len(found.unreadable)} unreadable, "
        f"{len(found.outliers)} intensity outliers; width {span['width_min_px']} to "
        f"{span['width_max_px']} px, height {span['height_min_px']} to {span['height_max_px']} px"
    )
    _list("labels", found.unused_labels)
    _list("unreadable", [f"{file}: {reason}" for file, reason in found.unreadable.items()])
    if run:
        click.echo(f"report: {cell_text(run.root / 'report.html')}")
    click.echo(RESEARCH_USE_ONLY)


@dataset.command()
@_run_folder_option
def check(
    *,
    data: Path,
    out: Path | None,
    resume: bool,
    seed: int,
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Find leaks, duplicates, label conflicts, unreadable files and confounders.

    Exit code 1 if there is a problem: an unreadable file, an empty split, a split with a single
    class, one X-ray or patient in two splits, or one X-ray under two labels.
    """
    from lungwatch.training.data.check import check_dataset
    from lungwatch.training.data.dataset import list_dataset

    run = _begin("check", data, out, resume=resume, seed=seed, labels=labels)
    listing = list_dataset(data, labels)
    scans, unreadable = _scan(listing.samples, run)
    found = check_dataset(
        data, listing.samples, scans, unreadable, labels=listing.labels, seed=seed
    )
    if run:
        from lungwatch.training.evaluation.plots import draw_check
        from lungwatch.training.evaluation.report import check_html

        pictures = draw_check(found, scans)
        _write_results(run, found, check_html(str(data), found, pictures), pictures)
    if as_json:
        print_json(found)
    else:
        _print_check(found)
    if found.problems:
        raise click.exceptions.Exit(1)


@dataset.command()
@_dataset_options(
    out_required=True,
    out_help="New run folder: manifest.csv (with paths relative to it), configuration, "
    "environment, results.json, plot and report.html. It is a data set for the other commands.",
)
@setting("--val", 0.15, float, "Share of the validation split.")
@setting("--test", 0.15, float, "Share of the test split.")
def split(
    *,
    data: Path,
    out: Path,
    resume: bool,
    val: float,
    test: float,
    seed: int,
    labels: "LabelMap | None",
    as_json: bool,
) -> None:
    """Split by patient and X-ray, stratified by class and source, into a manifest CSV.

    Existing splits of DATA are ignored. The same seed gives the same manifest.
    """
    from lungwatch.training.data.dataset import MANIFEST, load_dataset
    from lungwatch.training.data.duplicates import find_duplicates, together
    from lungwatch.training.data.scan import require_readable
    from lungwatch.training.data.splits import split_groups, split_table, write_manifest
    from lungwatch.training.evaluation.plots import draw_split
    from lungwatch.training.evaluation.report import split_html

    run = _begin("split", data, out, resume=resume, seed=seed, labels=labels, val=val, test=test)
    assert run is not None
    scans, unreadable = _scan(load_dataset(data, labels), run)
    require_readable(unreadable)
    groups = together(scans, find_duplicates(scans))
    splits = split_groups(scans, groups, val=val, test=test, seed=seed)
    write_manifest(run.root / MANIFEST, data, scans, splits)
    table = split_table(scans, groups, splits)
    pictures = {"Images by class, source and split": draw_split(table)}
    _write_results(run, table, split_html(str(data), table, pictures), pictures)
    if as_json:
        print_json({"manifest": run.root / MANIFEST, **asdict(table)})
        return
    print_table(
        ("label", "source", "train", "val", "test"), list(map(astuple, [*table.strata, table.all]))
    )
    click.echo(
        f"\n{table.images} images in {table.groups} groups, each within one split\n"
        f"manifest: {cell_text(run.root / MANIFEST)}"
    )


def _begin(
    command: str,
    data: Path,
    out: Path | None,
    *,
    resume: bool,
    seed: int,
    labels: "LabelMap | None",
    **settings: float,
) -> "RunFolder | None":
    from lungwatch.training.fitting.run import begin_run

    if out is None:
        if resume:
            raise click.UsageError("--resume needs --out")
        return None
    config: dict[str, Any] = {
        "command": f"dataset {command}",
        "data": str(data),
        "seed": seed,
        **settings,
    }
    if labels:
        config["label_map"] = labels.to_dict()
    return begin_run(out, config, resume=resume)


def _scan(
    samples: "Sequence[Sample]", run: "RunFolder | None" = None
) -> "tuple[list[ScannedImage], list[Unreadable]]":
    from lungwatch.training.data.scan import ScanCache, scan

    cache = ScanCache(run.root / "scan") if run else None
    with ProgressBar("reading images", len(samples)) as bar:
        return scan(samples, progress=bar.advance, cache=cache)


def _print_check(found: "DatasetCheck") -> None:
    across = sum(pair.leak for pair in found.duplicates)
    identical = sum(pair.identical for pair in found.duplicates)
    click.echo(
        f"{found.files} files; {len(found.duplicates)} pairs show the same X-ray "
        f"({identical} identical byte for byte, {across} across splits)"
    )
    _list(
        "same X-ray",
        [f"{p.first} and {p.second} (correlation {p.correlation:.3f})" for p in found.duplicates],
    )
    _list("mostly border (heuristic)", list(map(str, found.mostly_border)))
    _list("burnt-in text candidate (heuristic)", list(map(str, found.text_candidates)))
    click.echo("\nClass predicted without the lungs (cross-validated ROC-AUC):")
    print_table(
        ("among", "COVID against", "by", "ROC-AUC", "std over folds"),
        [(c.among, c.against, c.feature, c.roc_auc, c.fold_std) for c in found.confounds],
    )
    click.echo(found.verdict)
    _list("labels", found.left_out)
    click.echo()
    _list("problem", found.problems)
    click.echo(f"{len(found.problems)} problems; {RESEARCH_USE_ONLY}")


def _list(title: str, lines: Sequence[str]) -> None:
    for line in lines[:_LISTED]:
        click.echo(f"{title}: {cell_text(line)}")
    if len(lines) > _LISTED:
        click.echo(f"{title}: {len(lines) - _LISTED} more; --json lists all")


def _write_results(
    run: "RunFolder", results: object, report: str, pictures: Mapping[str, bytes]
) -> None:
    """Write results.json, plots and report.html.

    Raises
    ------
    DatasetError
        If they cannot be written.
    """
    files = {"results.json": (to_json(results) + "\n").encode("utf-8", "backslashreplace")}
    for number, (caption, data) in enumerate(pictures.items(), start=1):
        name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60]
        files[f"plots/{number:02d}-{name}.png"] = data
    files["report.html"] = report.encode("utf-8", "replace")
    try:
        make_dirs(run.root / "plots")
        for name, data in files.items():
            write_atomic(run.root / name, data)
    except OSError as error:
        raise DatasetError(f"{run.root} cannot be written: {error.strerror}") from error

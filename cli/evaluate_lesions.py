"""`lungwatch evaluate --lesion-masks`: whether a model's map lies on drawn opacities."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.cli.output import cell_text, print_json, print_table, to_json

if TYPE_CHECKING:
    from lungwatch.training.bootstrap import Bootstrap

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

    from lungwatch.cli.run_folder import begin_run
    from lungwatch.errors import ModelError
    from lungwatch.training.lesions import covid_maps, measure_lesions
    from lungwatch.training.randomised import compare_maps, compare_randomised
    from lungwatch.training.score_cache import model_digest
    from lungwatch.training.scorers import load_scorer

    scorer = load_scorer(model)
    other = load_scorer(compare) if compare else None
    if other and other.judgement.preprocess != scorer.judgement.preprocess:
        raise ModelError(
            f"{other.judgement.name} prepares its images otherwise than {scorer.judgement.name}: "
            "their maps cannot be compared"
        )
    if out:
        from lungwatch.training.evaluation_plots import require_matplotlib

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
        from lungwatch.atomicfile import write_atomic
        from lungwatch.training.release_plots import draw_lesion_cases, draw_lesions

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

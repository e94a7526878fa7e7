"""The folder that an evaluation leaves: figures, scores, plots, gallery, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.atomicfile import make_dirs, write_atomic
from lungwatch.cli.output import to_csv, to_json
from lungwatch.errors import ModelError

if TYPE_CHECKING:
    from lungwatch.training.evaluation import SetEvaluation
    from lungwatch.training.evaluation_report import Section
    from lungwatch.training.scorers import Scorer

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
    from lungwatch.training.assess import rows
    from lungwatch.training.evaluation_report import write_report

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
    from lungwatch.daemon.overlay import make_preview
    from lungwatch.daemon.overlay.colormap import blend
    from lungwatch.daemon.overlay.render import upsample

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
) -> "Section":
    from lungwatch.training.evaluation_plots import draw_plots
    from lungwatch.training.evaluation_report import Section
    from lungwatch.training.gallery import make_gallery

    note = ""
    try:
        gallery = make_gallery(
            scorer, evaluation.scored, render_case, per_group=per_group, seed=seed
        )
    except ModelError as error:
        # The figures stand without maps; the report says why there are none.
        gallery, note = [], f"No gallery: {error}"
    return Section(
        result=evaluation.result,
        plots=draw_plots(evaluation.scored, evaluation.other),
        gallery=gallery,
        note=note,
    )


def _write_gallery(place: Path, section: "Section") -> None:
    from lungwatch.training.evaluation_plots import draw_gallery
    from lungwatch.training.gallery import GROUPS

    for group in GROUPS:
        strips = [
            (f"{case.sample.finding}, p = {case.probability:.3f}", case.pictures)
            for case in section.gallery
            if case.group == group
        ]
        if strips:
            write_atomic(place / f"gallery-{group}.png", draw_gallery(strips))

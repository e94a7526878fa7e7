"""HTML reports of evaluations and data sets, each in one file, and the gallery of cases."""

import base64
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import MissingExtraError, visible
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.preprocess import PreprocessSpec, content_box
from lungwatch.training.data.check import Confound, DatasetCheck, Duplicate
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray, read_image, read_pixels
from lungwatch.training.data.scan import Exploration, Outlier, PixelStatistics
from lungwatch.training.data.splits import SplitRow, SplitTable
from lungwatch.training.evaluation.evaluation import Scored
from lungwatch.training.evaluation.metrics import FEWEST
from lungwatch.training.evaluation.scorers import Scorer

if TYPE_CHECKING:
    from jinja2 import Environment

# From the radiograph, float32 (H, W), and the maps of NEGATIVE and COVID over it, float32
# (2, h, w), to the X-ray, the X-ray under COVID's map and under NEGATIVE's, uint8.
Renderer = Callable[[FloatImage, FloatArray], Sequence[NDArray[np.uint8]]]
GROUPS = {
    "tp": "True positives",
    "fn": "False negatives",
    "fp": "False positives",
    "tn": "True negatives",
}
_MAX_LISTED = 100
_NAMES = {
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "ece": "ECE",
    "brier": "Brier",
}
_PLOTS = {
    "roc": "ROC curve",
    "pr": "Precision-recall curve",
    "reliability": "Reliability",
    "confusion": "Confusion matrix",
    "scores": "Scores",
}
_LUNGS = {
    "map_in_lungs": "Share of the COVID map inside the lungs",
    "strongest_point_in_lungs": "Images whose strongest point lies inside (pointing game)",
    "lung_area": "Share of the image that is lung, for comparison",
}
# A heading, a text, and the columns and rows of a table; "" and () for none.
_Block = tuple[str, str, Sequence[str], Sequence[Sequence[object]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class GalleryCase:
    """One case of the gallery.

    Attributes
    ----------
    group
        A key of `GROUPS`.
    sample
        The case.
    probability
        Calibrated, 0..1.
    pictures
        As the renderer made them.
    """

    group: str
    sample: Sample
    probability: float
    pictures: Sequence[NDArray[np.uint8]]


def choose_cases(scored: Scored, per_group: int, seed: int) -> list[tuple[str, int]]:
    """Choose cases of each group: the most certain errors, and a random draw of what was right.

    Returns
    -------
    list of tuple
        A key of `GROUPS` and the index of the case.
    """
    rng = np.random.default_rng(seed)
    said, true, p = scored.called, scored.targets > 0.5, scored.probabilities
    members = {
        "tp": said & true,
        "fn": ~said & true,
        "fp": said & ~true,
        "tn": ~said & ~true,
    }
    chosen = []
    for group in GROUPS:
        indices = np.flatnonzero(members[group])
        if group in ("tp", "tn"):
            picked = np.sort(rng.permutation(indices)[:per_group])
        else:
            certainty = -p[indices] if group == "fp" else p[indices]
            picked = indices[np.argsort(certainty, kind="stable")][:per_group]
        chosen += [(group, int(index)) for index in picked]
    return chosen


def make_gallery(
    scorer: Scorer, scored: Scored, render: Renderer, *, per_group: int = 4, seed: int = 1
) -> list[GalleryCase]:
    """Read the chosen cases again, explain them and draw them.

    Raises
    ------
    DatasetError
        If a file is unreadable.
    ModelError
        If the network has no feature map to explain.
    """
    cases = choose_cases(scored, per_group, seed)
    if not cases:
        return []
    samples = [scored.samples[index] for _, index in cases]
    spec = scored.judgement.preprocess
    maps = scorer.maps(read_pixels(samples, spec))
    cases_shown = []
    for (group, index), sample, pair in zip(cases, samples, maps, strict=True):
        pixels = read_image(sample.path).pixels
        rows, columns = pixels.shape
        cases_shown.append(
            GalleryCase(
                group=group,
                sample=sample,
                probability=float(scored.probabilities[index]),
                pictures=render(pixels, over_image(pair, (rows, columns), spec)),
            )
        )
    return cases_shown


def over_image(maps: FloatArray, shape: tuple[int, int], spec: PreprocessSpec) -> FloatArray:
    """Cut out of maps, (2, h, w), what lies over the image and not over padding.

    Parameters
    ----------
    maps
        float32, over the network's whole square input.
    shape
        (rows, columns) of the radiograph.
    spec
        How it became the input.
    """
    if spec.fit == "stretch":
        return maps
    top, left, height, width = content_box(shape, spec)
    side = (spec.size_px, spec.size_px)
    wide = [cv2.resize(one, side, interpolation=cv2.INTER_LINEAR) for one in maps]
    return np.stack(wide)[:, top : top + height, left : left + width].astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """Section of the report on one data set.

    Attributes
    ----------
    result
        The figures, as `evaluate_scored` gives them, with `data`, `split` and `threshold`, and
        where there is one the `comparison` and the `threshold_choice`.
    plots
        Name -> bytes of a PNG file.
    gallery
        Cases to look at.
    note
        Remark on what is missing; "" if nothing is.
    """

    result: Mapping[str, Any]
    plots: Mapping[str, bytes]
    gallery: Sequence[GalleryCase] = field(default=())
    note: str = ""


def write_report(model: str, sections: Sequence[ReportSection]) -> str:
    """Write an evaluation's report; text from outside is escaped, and no script runs in it."""
    return _page(
        "evaluation.html.j2",
        title=f"Evaluation of {model}",
        sections=sections,
        names=_NAMES,
        plots=_PLOTS,
        lungs=_LUNGS,
        groups=GROUPS,
        fewest=FEWEST,
    )


def exploration_html(exploration: Exploration, pictures: Mapping[str, bytes]) -> str:
    """Write the report of an exploration.

    Parameters
    ----------
    exploration
        The numbers.
    pictures
        Caption -> the bytes of a PNG file.
    """
    size = exploration.size_range
    summary = (
        f"{exploration.files} files, {len(exploration.unreadable)} unreadable; width "
        f"{size['width_min_px']} to {size['width_max_px']} px, height "
        f"{size['height_min_px']} to {size['height_max_px']} px."
    )
    distribution = [
        (split, finding, count)
        for split, counts in exploration.distribution.items()
        for finding, count in counts.items()
    ]
    outliers, unreadable = exploration.outliers, exploration.unreadable
    blocks: list[_Block] = [
        ("", summary, (), ()),
        ("", "", ("labels that are not used",), [(line,) for line in exploration.unused_labels]),
        ("Distribution", "", ("split", "class", "files"), distribution),
        ("Sources", "", ("source/class", "files"), list(exploration.sources.items())),
        (
            "Formats and commonest sizes",
            "",
            ("format", "images"),
            list(exploration.formats.items()),
        ),
        ("", "", ("width x height", "images"), list(exploration.sizes.items())),
        (
            "Pixel statistics (grey values 0..1)",
            "",
            _columns(PixelStatistics),
            [astuple(one) for one in exploration.statistics],
        ),
        (
            f"Intensity outliers ({len(outliers)})",
            "Modified z-score beyond 3.5 in mean, standard deviation or a percentile.",
            _columns(Outlier),
            [astuple(one) for one in outliers[:_MAX_LISTED]],
        ),
        (
            f"Unreadable files ({len(unreadable)})",
            "",
            ("file", "reason"),
            list(unreadable.items()),
        ),
    ]
    return _dataset_page(f"Data set {exploration.location}", blocks, pictures)


def check_html(name: str, found: DatasetCheck, pictures: Mapping[str, bytes]) -> str:
    """Write the report of a data set's check.

    Parameters
    ----------
    name
        Of the data set.
    found
        The findings.
    pictures
        Caption -> the bytes of a PNG file.
    """
    blocks: list[_Block] = [
        (
            f"Problems ({len(found.problems)} in {found.files} files)",
            "",
            ("problem",),
            [(problem,) for problem in found.problems],
        ),
        ("", "", ("labels left out",), [(line,) for line in found.left_out]),
        (
            f"Pairs that show the same X-ray ({len(found.duplicates)})",
            "",
            _columns(Duplicate),
            [astuple(one) for one in found.duplicates[:_MAX_LISTED]],
        ),
        (
            "Prediction of the class without the lungs",
            found.verdict,
            _columns(Confound),
            [astuple(one) for one in found.confounds],
        ),
    ]
    listed = {
        "Mostly border (heuristic)": found.mostly_border,
        "Burnt-in text candidates (heuristic)": found.text_candidates,
    }
    for heading, paths in listed.items():
        rows = [(path,) for path in paths[:_MAX_LISTED]]
        blocks.append((f"{heading} ({len(paths)})", "", ("file",), rows))
    return _dataset_page(f"Check of data set {name}", blocks, pictures)


def split_html(name: str, table: SplitTable, pictures: Mapping[str, bytes]) -> str:
    """Write the report of a split; parameters as of `check_html`."""
    text = f"{table.images} images in {table.groups} groups of one patient or X-ray."
    rows = [astuple(one) for one in (*table.strata, table.all)]
    return _dataset_page(
        f"Split of data set {name}", [("", text, _columns(SplitRow), rows)], pictures
    )


def template_environment(package: str, *, html: bool) -> "Environment":
    """Return the Jinja2 environment of a package's folder `templates`.

    Parameters
    ----------
    package
        Where the folder is.
    html
        Whether what is shown is escaped: neither markup nor control characters get through.

    Raises
    ------
    MissingExtraError
        If Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("writing reports", "train") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
        undefined=jinja2.StrictUndefined,
        # Not for `Markup`, which is a string already escaped.
        finalize=(lambda value: visible(value) if type(value) is str else value) if html else None,
    )


@functools.cache
def _environment() -> "Environment":
    environment = template_environment("lungwatch.training.evaluation", html=True)
    environment.filters |= {"data_uri": _data_uri, "jpeg": _jpeg}
    return environment


def _page(template: str, **values: object) -> str:
    return _environment().get_template(template).render(notice=RESEARCH_USE_ONLY, **values)


def _dataset_page(title: str, blocks: Sequence[_Block], pictures: Mapping[str, bytes]) -> str:
    return _page("dataset.html.j2", title=title, blocks=blocks, pictures=pictures)


def _columns(row: type) -> list[str]:
    return [column.name for column in fields(row)]


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    ordered = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    # Pictures to look at: as PNG a report of two data sets takes 15 MB.
    _, data = cv2.imencode(".jpg", ordered, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return data.tobytes()


def _data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

"""HTML reports of evaluations and data sets, and the gallery of cases.

Each one file that needs nothing else.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from html import escape
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.errors import visible
from lungwatch.imaging.radiograph import FloatImage
from lungwatch.imaging.reader import read_radiograph
from lungwatch.preprocess import PreprocessSpec, content_box
from lungwatch.training.data.check import Confound, DatasetCheck, Duplicate
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.pixels import FloatArray, read_pixels
from lungwatch.training.data.scan import Exploration, Outlier, PixelStatistics
from lungwatch.training.data.splits import SplitRow, SplitTable
from lungwatch.training.evaluation.evaluation import Scored
from lungwatch.training.evaluation.metrics import FEWEST, FIGURES
from lungwatch.training.evaluation.scorers import Scorer

# From the radiograph, float32 (H, W), and the maps of NEGATIVE and COVID over it, float32
# (2, h, w), to the X-ray, the X-ray under COVID's map and under NEGATIVE's, uint8.
Renderer = Callable[[FloatImage, FloatArray], Sequence[NDArray[np.uint8]]]


GROUPS = {
    "tp": "True positives",
    "fn": "False negatives",
    "fp": "False positives",
    "tn": "True negatives",
}


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
    """Choose cases of each group: the surest errors, and a random draw of what was right.

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
            surest = -p[indices] if group == "fp" else p[indices]
            picked = indices[np.argsort(surest, kind="stable")][:per_group]
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
    exhibits = []
    for (group, index), sample, pair in zip(cases, samples, maps, strict=True):
        pixels = read_radiograph(sample.path).pixels
        rows, columns = pixels.shape
        exhibits.append(
            GalleryCase(
                group=group,
                sample=sample,
                probability=float(scored.probabilities[index]),
                pictures=render(pixels, over_image(pair, (rows, columns), spec)),
            )
        )
    return exhibits


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


_MAX_LISTED = 100

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #ccc; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; }}
.notice {{ border: 1px solid #a60; padding: .5rem; }}
</style></head><body>
"""


def exploration_html(exploration: Exploration, pictures: Mapping[str, bytes]) -> str:
    """Return the report; names from outside are escaped, pictures are inside.

    Parameters
    ----------
    exploration
        The numbers.
    pictures
        Caption -> the bytes of a PNG file.
    """
    title = _text(f"Data set {exploration.location}")
    found = exploration.size_range
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="notice">{_text(RESEARCH_USE_ONLY)}</p>',
        (
            f"<p>{exploration.files} files, {len(exploration.unreadable)} unreadable; width "
            f"{found['width_min_px']} to {found['width_max_px']} px, height "
            f"{found['height_min_px']} to {found['height_max_px']} px.</p>"
        ),
        _table(("labels that are not used",), [(line,) for line in exploration.unused_labels]),
        "<h2>Distribution</h2>",
        _table(
            ("split", "class", "files"),
            [
                (split, finding, count)
                for split, counts in exploration.distribution.items()
                for finding, count in counts.items()
            ],
        ),
        "<h2>Sources</h2>",
        _table(("source/class", "files"), exploration.sources.items()),
        "<h2>Formats and commonest sizes</h2>",
        _table(("format", "images"), exploration.formats.items()),
        _table(("width x height", "images"), exploration.sizes.items()),
        "<h2>Pixel statistics (grey values 0..1)</h2>",
        _table([f.name for f in fields(PixelStatistics)], map(astuple, exploration.statistics)),
        f"<h2>Intensity outliers ({len(exploration.outliers)})</h2>",
        "<p>Modified z-score beyond 3.5 in mean, standard deviation or a percentile.</p>",
        _table([f.name for f in fields(Outlier)], map(astuple, exploration.outliers[:_MAX_LISTED])),
        f"<h2>Unreadable files ({len(exploration.unreadable)})</h2>",
        _table(("file", "reason"), exploration.unreadable.items()),
        "<h2>Pictures</h2>",
        *(_figure(caption, data) for caption, data in pictures.items()),
    ]
    return _HEAD.format(title=title) + "\n".join(sections) + "\n</body></html>\n"


def check_html(name: str, found: DatasetCheck, pictures: Mapping[str, bytes]) -> str:
    """Return the report of a check; names from outside are escaped, pictures are inside.

    Parameters
    ----------
    name
        Of the data set.
    found
        The findings.
    pictures
        Caption -> the bytes of a PNG file.
    """
    title = _text(f"Check of data set {name}")
    looked_at = {
        "Mostly border (heuristic)": found.mostly_border,
        "Burnt-in text candidates (heuristic)": found.text_candidates,
    }
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="notice">{_text(RESEARCH_USE_ONLY)}</p>',
        f"<h2>To be mended ({len(found.problems)} in {found.files} files)</h2>",
        _table(("problem",), [(problem,) for problem in found.problems]),
        _table(("labels left out",), [(line,) for line in found.left_out]),
        f"<h2>Pairs that show the same X-ray ({len(found.duplicates)})</h2>",
        _table([f.name for f in fields(Duplicate)], map(astuple, found.duplicates[:_MAX_LISTED])),
        "<h2>How well the class is told without the lungs</h2>",
        f"<p>{_text(found.verdict)}</p>",
        _table([f.name for f in fields(Confound)], map(astuple, found.confounds)),
    ]
    for heading, paths in looked_at.items():
        sections.append(f"<h2>{heading} ({len(paths)})</h2>")
        sections.append(_table(("file",), [(path,) for path in paths[:_MAX_LISTED]]))
    sections.append("<h2>Pictures</h2>")
    sections += [_figure(caption, data) for caption, data in pictures.items()]
    return _HEAD.format(title=title) + "\n".join(sections) + "\n</body></html>\n"


def split_html(name: str, table: SplitTable, pictures: Mapping[str, bytes]) -> str:
    """Return the report of a split; names from outside are escaped, pictures are inside."""
    title = _text(f"Split of data set {name}")
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="notice">{_text(RESEARCH_USE_ONLY)}</p>',
        f"<p>{table.images} images in {table.groups} groups of one patient or X-ray.</p>",
        _table([f.name for f in fields(SplitRow)], map(astuple, [*table.strata, table.all])),
        *(_figure(caption, data) for caption, data in pictures.items()),
    ]
    return _HEAD.format(title=title) + "\n".join(sections) + "\n</body></html>\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(header)}</th>" for header in headers)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(_cell(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>" if body else "<p>None.</p>"


def _text(text: str) -> str:
    """Return text from outside as HTML shows it: neither markup nor turned around."""
    return escape(visible(text))


def _cell(value: object) -> str:
    return format(value, ".3f") if isinstance(value, float) else str(value)


def _figure(caption: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode("ascii")
    text = _text(caption)
    return (
        f"<figure><figcaption>{text}</figcaption>"
        f'<img alt="{text}" src="data:image/png;base64,{encoded}"></figure>'
    )


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

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
       color: #1c1c1f; }
.note { background: #fff3cd; border-left: 4px solid #b58900; padding: .5em 1em; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.plots img { max-width: 23em; width: 100%; vertical-align: top; }
figure { display: inline-block; margin: .5em 1em 1em 0; }
figure img { height: 11em; }
figcaption { max-width: 36em; overflow-wrap: anywhere; font-size: .85em; color: #444; }
"""


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """What the report shows of one data set.

    Attributes
    ----------
    result
        The figures, as `evaluation.evaluate_scored` gives them, with `data`, `split`
        and `threshold`, and where there is one the `comparison` and the `threshold_choice`.
    plots
        Name -> bytes of a PNG file.
    gallery
        Cases to look at.
    note
        What is missing, and why; "" if nothing is.
    """

    result: Mapping[str, Any]
    plots: Mapping[str, bytes]
    gallery: Sequence[GalleryCase] = field(default=())
    note: str = ""


def write_report(model: str, sections: Sequence[ReportSection]) -> str:
    """Write the report; whatever comes from outside is escaped, and no script runs in it."""
    title = f"Evaluation of {_visible_text(model)}"
    body = "".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note"><strong>{RESEARCH_USE_ONLY}</strong> Figures hold for these images alone: from
other hospitals, machines or years they differ, mostly for the worse.</p>
{body}</body>
</html>
"""


def _section(section: ReportSection) -> str:
    found = section.result
    plots = "".join(
        f'<img alt="{_visible_text(_PLOTS.get(name, name))}" src="{_uri(data)}">\n'
        for name, data in section.plots.items()
    )
    parts = [
        f"<h2>{_visible_text(found['data'])}, split {_visible_text(found['split'])}</h2>",
        _counts(found),
        _choice(found.get("threshold_choice")),
        _learnt(found.get("learnt")),
        _figures(found),
        _comparison(found.get("comparison")),
        "<h3>Curves</h3>",
        f'<div class="plots">{plots}</div>',
        "<h3>One finding against another</h3>",
        "<p>ROC-AUC of the score for COVID. Within one source the source gives no hint.</p>",
        _probes(found),
        "<h3>By source</h3>",
        _sources(found["sources"]),
        _lungs(found.get("lungs")),
        f"<p>{_visible_text(section.note)}</p>" if section.note else "",
        _gallery(section.gallery),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _counts(found: Mapping[str, Any]) -> str:
    patients = found["patients"]
    of = f" of {patients['positives']} and {patients['negatives']} patients" if patients else ""
    return (
        f"<p>{found['positives']} images with COVID, {found['negatives']} without{of}; threshold "
        f"{found['threshold']:.4f}, {found['uncertain']:.1%} uncertain.</p>"
    )


def _choice(choice: Mapping[str, Any] | None) -> str:
    if choice is None:
        return ""
    return (
        f"<p>The threshold was chosen for {_visible_text(choice['aim'])} on "
        f"{_visible_text(choice['data'])}, "
        f"split {_visible_text(choice['split'])} ({choice['images']} images), "
        f"where it has sensitivity "
        f"{choice['sensitivity']:.3f} and specificity {choice['specificity']:.3f}; abstention is "
        "off.</p>"
    )


def _learnt(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "<p>Which images the model learnt from is not known: it carries no record.</p>"
    if not found["images"]:
        return "<p>The model learnt from none of these images, byte for byte.</p>"
    named = ", ".join(found["names"])
    told = (
        f"<p>The model learnt from {found['images']} of these images ({_visible_text(named)} ...)."
    )
    without = found["without"]
    if without is None:
        return told + " Without them there are no figures: both classes are needed.</p>"
    rows = [
        [
            _NAMES[name],
            _number(without[name]),
            _interval(without["intervals"].get(name)) + _few(name, without["too_few"]),
        ]
        for name in FIGURES
    ]
    return (
        f"{told} Without them, {without['positives']} with COVID and {without['negatives']} "
        "without:</p>" + _metrics_table(["", "value", "95 % interval"], rows)
    )


def _figures(found: Mapping[str, Any]) -> str:
    rows = [
        [
            _NAMES[name],
            _number(found[name]),
            _interval(found["intervals"].get(name)) + _few(name, found["too_few"]),
        ]
        for name in FIGURES
    ]
    drawn = found["bootstrap"]["resamples"]
    how = (
        f"<p>95 % intervals: percentiles of {drawn} stratified bootstrap resamples of "
        f"{found['bootstrap']['over']}, seed {found['bootstrap']['seed']}. Too few: fewer than "
        f"{FEWEST} patients of a class (images, where patients are unknown). One "
        "without width, at 0 or 1, tells of few errors and not of certainty.</p>"
        if drawn
        else ""
    )
    return _metrics_table(["", "value", "95 % interval"], rows) + how


def _comparison(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [
        [
            _NAMES[name],
            _number(found["figures"][name]),
            f"{found['differences'][name]:+.3f}",
            _interval(found["intervals"].get(name)),
        ]
        for name in FIGURES
    ]
    test = found["delong"]
    line = (
        f"<p>DeLong's test of the areas under the ROC curve: difference "
        f"{test['difference']:+.4f} ({test['low']:+.4f} to {test['high']:+.4f}), "
        f"p = {test['p_value']:.2g}.</p>"
        if test
        else ""
    )
    heads = ["", "the other", "difference (this less that)", "95 % interval"]
    return f"<h3>Against {_visible_text(found['model'])}</h3>" + _metrics_table(heads, rows) + line


def _probes(found: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            _number(probe["roc_auc"]),
            _interval(found["probe_intervals"].get(name)) + _few(name, found["probe_too_few"]),
            f"{probe['positives']} vs {probe['negatives']}",
        ]
        for name, probe in found["probes"].items()
    ]
    return _metrics_table(["", "ROC-AUC", "95 % interval", "images"], rows)


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name, str(found["positives"]), str(found["negatives"])]
        + [
            _number(found[figure])
            + _bracketed(found["intervals"].get(figure))
            + _few(figure, found["too_few"])
            for figure in FIGURES
        ]
        for name, found in sources.items()
    ]
    return _metrics_table(["", "COVID", "others", *(_NAMES[name] for name in FIGURES)], rows)


def _lungs(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    names = {
        "map_in_lungs": "Share of the COVID map inside the lungs",
        "strongest_point_in_lungs": "Images whose strongest point lies inside (pointing game)",
        "lung_area": "Share of the image that is lung, for comparison",
    }
    rows = [
        [title, _number(found[name]), _interval(found["intervals"].get(name))]
        for name, title in names.items()
    ]
    about = (
        f"<p>{found['images']} images of {_visible_text(found['data'])} with lungs drawn by "
        f"hand; in "
        f"{found['without_map']} nothing speaks for COVID, and they are left out.</p>"
    )
    return (
        "<h3>Whether the maps lie on the lungs</h3>"
        + about
        + _metrics_table(["", "mean", "95 % interval"], rows)
    )


def _gallery(exhibits: Sequence[GalleryCase]) -> str:
    if not exhibits:
        return ""
    about = (
        "<p>The X-ray, the Grad-CAM map for COVID, and the one for NEGATIVE, each relative to its "
        "own maximum. Of the errors the surest, of the rest a random draw.</p>"
    )
    parts = ["<h3>Cases</h3>", about]
    for group, title in GROUPS.items():
        members = [exhibit for exhibit in exhibits if exhibit.group == group]
        if members:
            parts.append(f"<h4>{title}</h4>")
            parts += [_exhibit(member) for member in members]
    return "\n".join(parts)


def _exhibit(exhibit: GalleryCase) -> str:
    sample = exhibit.sample
    told = f"{sample.path.name}: {sample.finding}, probability {exhibit.probability:.3f}"
    if sample.source:
        told += f", {sample.source}"
    pictures = "".join(f'<img alt="" src="{_uri(_jpeg(p), "jpeg")}">\n' for p in exhibit.pictures)
    return f"<figure>{pictures}<figcaption>{_visible_text(told)}</figcaption></figure>"


def _metrics_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_visible_text(head)}</th>" for head in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_visible_text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table><tr>{top}</tr>\n{lines}</table>\n"


def _visible_text(text: str) -> str:
    """Return text from outside as HTML shows it: neither markup nor turned around."""
    return escape(visible(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"


def _bracketed(pair: Sequence[float] | None) -> str:
    return "" if pair is None else f" ({_interval(pair)})"


def _few(name: str, names: Sequence[str]) -> str:
    return ", too few" if name in names else ""


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    ordered = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    # Pictures to look at: as PNG a report of two data sets takes 15 MB.
    _, data = cv2.imencode(".jpg", ordered, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return data.tobytes()


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

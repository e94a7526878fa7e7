"""The report of an evaluation: one HTML file that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.plaintext import visible
from lungwatch.training.bootstrap import FEWEST, FIGURES
from lungwatch.training.gallery import GROUPS, Exhibit

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
class Section:
    """What the report shows of one data set.

    Attributes
    ----------
    result
        The figures, as `lungwatch.training.assess.assess` gives them, with `data`, `split`
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
    gallery: Sequence[Exhibit] = field(default=())
    note: str = ""


def write_report(model: str, sections: Sequence[Section]) -> str:
    """Write the report; whatever comes from outside is escaped, and no script runs in it."""
    title = f"Evaluation of {_text(model)}"
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


def _section(section: Section) -> str:
    found = section.result
    plots = "".join(
        f'<img alt="{_text(_PLOTS.get(name, name))}" src="{_uri(data)}">\n'
        for name, data in section.plots.items()
    )
    parts = [
        f"<h2>{_text(found['data'])}, split {_text(found['split'])}</h2>",
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
        f"<p>{_text(section.note)}</p>" if section.note else "",
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
        f"<p>The threshold was chosen for {_text(choice['aim'])} on {_text(choice['data'])}, "
        f"split {_text(choice['split'])} ({choice['images']} images), where it has sensitivity "
        f"{choice['sensitivity']:.3f} and specificity {choice['specificity']:.3f}; abstention is "
        "off.</p>"
    )


def _learnt(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "<p>Which images the model learnt from is not known: it carries no record.</p>"
    if not found["images"]:
        return "<p>The model learnt from none of these images, byte for byte.</p>"
    named = ", ".join(found["names"])
    told = f"<p>The model learnt from {found['images']} of these images ({_text(named)} ...)."
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
        "without:</p>" + _table(["", "value", "95 % interval"], rows)
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
    return _table(["", "value", "95 % interval"], rows) + how


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
    return f"<h3>Against {_text(found['model'])}</h3>" + _table(heads, rows) + line


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
    return _table(["", "ROC-AUC", "95 % interval", "images"], rows)


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
    return _table(["", "COVID", "others", *(_NAMES[name] for name in FIGURES)], rows)


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
        f"<p>{found['images']} images of {_text(found['data'])} with lungs drawn by hand; in "
        f"{found['without_map']} nothing speaks for COVID, and they are left out.</p>"
    )
    return (
        "<h3>Whether the maps lie on the lungs</h3>"
        + about
        + _table(["", "mean", "95 % interval"], rows)
    )


def _gallery(exhibits: Sequence[Exhibit]) -> str:
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


def _exhibit(exhibit: Exhibit) -> str:
    sample = exhibit.sample
    told = f"{sample.path.name}: {sample.finding}, probability {exhibit.probability:.3f}"
    if sample.source:
        told += f", {sample.source}"
    pictures = "".join(f'<img alt="" src="{_uri(_jpeg(p), "jpeg")}">\n' for p in exhibit.pictures)
    return f"<figure>{pictures}<figcaption>{_text(told)}</figcaption></figure>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f"<table><tr>{top}</tr>\n{lines}</table>\n"


def _text(text: str) -> str:
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

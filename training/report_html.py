"""An exploration, or a check, as one HTML file that needs nothing else."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from html import escape

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.plaintext import visible
from lungwatch.training.confounds import Confound
from lungwatch.training.dataset_check import DatasetCheck, Duplicate
from lungwatch.training.exploration import Exploration, Outlier, PixelStatistics
from lungwatch.training.split_table import SplitTable, Stratum

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
        _table([f.name for f in fields(Stratum)], map(astuple, [*table.strata, table.all])),
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

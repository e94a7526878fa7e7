"""`lungwatch evaluate` on data of hostile names: text stays text, and files in their folder."""

import csv
import io
import json
import os
import shutil
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.cli.main import main
from lungwatch.errors import visible
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.preprocess import golden_pixels

pytest.importorskip("matplotlib", reason="needs matplotlib (extra 'train')")

pytestmark = pytest.mark.slow

NAMES = [
    "=cmd|' C calc'!A0.png",
    "+1+1.png",
    "@SUM(1).png",
    "..%2f..%2fetc%2fpasswd.png",
    "<img src=x onerror=alert(1)>.png",
    "\"'><script>alert(1)<.png",
    "<!--<iframe src=javascript:x>.png",
    "new\nline.png",
    "clear\x1b[2J\x9b31m.png",
    "\u202egnp.exe",
    "zero\u200bwidth\u2028.png",
    "$\\frac{1}{$.png",
    "n" * 251 + ".png",
]
SOURCES = [
    "../../../outside",
    "a/b",
    "/etc/passwd",
    "<b onclick=x>bold</b>",
    '"><svg onload=alert(1)>',
    "=1+1",
    "\x1b[2Jred\u202e",
    "two\nlines, as if: accuracy 1.000",
]
PATIENT = "Zzyzxson"
# What the report is made of; no script, no frame, no link, no form.
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4", "p", "strong"),
    *("div", "img", "table", "tr", "th", "td", "figure", "figcaption"),
}
ATTRIBUTES = {
    *(("html", "lang"), ("meta", "charset"), ("meta", "http-equiv"), ("meta", "content")),
    *(("p", "class"), ("div", "class"), ("img", "alt"), ("img", "src")),
}


class Page(HTMLParser):
    """The tags, attributes and texts of a report."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells = set(), Counter(), []
        self.sources = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update((tag, name) for name, _ in attrs)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.cells.append(data)


def assert_harmless(text):
    unseen = {char for char in text if not char.isprintable() and char != "\n"}
    assert {char for char in unseen if unicodedata.category(char) != "Zs"} == set()


def draw(path, number):
    noise = np.random.default_rng(number).normal(10, 5, (96, 96))
    pixels = cv2.resize(golden_pixels(), (96, 96), interpolation=cv2.INTER_AREA) * 220 + noise
    path.write_bytes(cv2.imencode(".png", np.clip(pixels, 0, 255).astype(np.uint8))[1].tobytes())


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The run folder, what was said, and what lies beside the run folder before and after."""
    root = tmp_path_factory.mktemp("place")
    data = root / os.fsdecode("=<b>\x1b[2J\u202e\n..%2f".encode() + b"\xff" + b"n" * 237)
    data.mkdir()
    table = [["file", "label", "source", "patient"]]
    for number, name in enumerate(NAMES):
        draw(data / name, number)
        label = "NORMAL" if number % 2 else "COVID"
        table.append([name, label, SOURCES[number % len(SOURCES)], f"<i>{PATIENT}{number}"])
    with (data / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    model = root / "$x^$<u>=1.onnx"
    shipped = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT
    shutil.copyfile(shipped / "model.onnx", model)
    out = root / "out"
    before = snapshot(root)
    arguments = ["evaluate", SHIPPED_DEFAULT, str(data), "--compare", str(model)]
    arguments += ["--split", "all", "--bootstrap", "5", "--gallery", "20", "-o", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    after = {path: at for path, at in snapshot(root).items() if not path.is_relative_to(out)}
    return out, done, before, after


def test_what_is_said_is_a_line_each_and_steers_no_terminal(evaluated):
    _, done, _, _ = evaluated
    text = done.stdout_bytes.decode("utf-8")
    assert_harmless(text)
    assert_harmless(done.stderr_bytes.decode("utf-8"))
    said = [line for line in text.split("\n") if line.startswith("  source ")]
    assert [line.partition(" (")[0] for line in said] == [
        f"  source {visible(source)}" for source in sorted(SOURCES)
    ]


def test_the_report_has_no_tag_and_no_attribute_but_its_own(evaluated):
    out, *_ = evaluated
    text = (out / "report.html").read_bytes().decode("utf-8")
    assert_harmless(text)
    page = Page(text)
    assert page.tags <= TAGS
    assert set(page.attributes) <= ATTRIBUTES
    assert all(source.startswith("data:image/") for source in page.sources)
    assert page.attributes["img", "src"] == 5 + 3 * len(NAMES)
    shown = "".join(page.cells)
    for name in NAMES:
        assert visible(name) in shown
    for source in SOURCES:
        assert visible(source) in shown
    assert PATIENT not in text


def test_nothing_is_written_outside_of_the_run_folder(evaluated):
    out, _, before, after = evaluated
    beside = {path: at for path, at in after.items() if path != out.parent}
    assert beside == {path: at for path, at in before.items() if path != out.parent}
    names = {path.name for path in out.iterdir()}
    (place,) = names - {
        *("config.json", "environment.json", "metrics.json", "scores.csv", "report.html"),
        "logits",
    }
    assert place.startswith("01-=<b>-[2J--..%2f-nnn")
    assert_harmless(place)
    assert "\n" not in place
    assert {path.suffix for path in (out / place).iterdir()} == {".png"}
    assert all(path.is_file() and not path.is_symlink() for path in (out / place).iterdir())


def test_the_tables_hold_no_formula_and_the_figures_every_name(evaluated):
    out, *_ = evaluated
    text = (out / "scores.csv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert text.count("\n") == len(rows) + 1 == len(NAMES) + 1
    assert_harmless(text)
    for row in rows:
        for name, value in row.items():
            assert not value.startswith(tuple("=+-@\t\r\n")), (name, value)
    assert PATIENT not in text
    found = json.loads((out / "metrics.json").read_bytes().decode("utf-8"))["results"]
    assert set(found[0]["sources"]) == set(SOURCES)
    assert PATIENT not in json.dumps(found)


def test_a_file_that_cannot_be_read_is_named_in_one_harmless_line(tmp_path):
    for label in ("COVID", "NORMAL"):
        (tmp_path / label).mkdir()
        draw(tmp_path / label / "a.png", 1)
    (tmp_path / "COVID" / os.fsdecode(b"\x1b[2J\n\xff\xe2\x80\xaegnp.exe")).write_bytes(
        b"\x89PNG\r\n\x1a\nnothing"
    )
    done = CliRunner().invoke(main, ["evaluate", SHIPPED_DEFAULT, str(tmp_path)])
    assert done.exit_code == 1
    assert "gnp.exe" in done.stderr
    assert done.stderr.count("\n") == 1
    assert_harmless(done.stderr)

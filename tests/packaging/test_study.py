"""The study's report says what the runs' own files say."""

import importlib.util
import json
from pathlib import Path

STUDY = Path(__file__).parents[2] / "docs" / "study"
IMAGES = {".png"}
# Curves and matrices only: a run folder's other pictures show X-rays.
DRAWN = {
    "group_weights.png",
    "history.png",
    "search.png",
    "confusion.png",
    "roc.png",
    "pr.png",
    "reliability.png",
    "release_gate.png",
    "lesions.png",
}


def tables():
    spec = importlib.util.spec_from_file_location("tables", STUDY / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_what_the_runs_files_give():
    """Rendering the report again changes nothing, and every table is in it."""
    module = tables()
    text = module.REPORT.read_text(encoding="utf-8")
    assert module.render(text) == text
    for name in module.TABLES:
        assert f"<!-- table {name} -->" in text


def test_every_picture_of_the_report_is_there():
    """Links to pictures and runs lead somewhere."""
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [link for link in links if "://" not in link and not link.startswith("#")]
    assert local
    assert [link for link in local if not (STUDY / link).exists()] == []


def test_no_x_ray_is_committed():
    """What is committed of a run are numbers and drawn curves."""
    pictures = [path for path in STUDY.rglob("*") if path.suffix in IMAGES]
    assert {path.name for path in pictures} <= DRAWN


def test_every_run_says_how_it_was_made():
    """Configuration, environment and metrics of each run are valid JSON without local paths."""
    runs = sorted(path for path in (STUDY / "runs").iterdir() if path.is_dir())
    assert runs
    for run in runs:
        for name in ("config.json", "environment.json", "metrics.json"):
            text = (run / name).read_text(encoding="utf-8")
            json.loads(text)
            assert "/root" not in text
            assert "/home" not in text

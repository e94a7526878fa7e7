"""Write the study's tables from the runs' own files: `python docs/study/tables.py`.

Each table stands in README.md between `<!-- table NAME -->` and `<!-- end -->`. A test checks
that they are what this script would write.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = HERE / "runs"
REPORT = HERE / "README.md"

COLUMNS = ("accuracy", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc", "ece")
MODELS = {
    "initial baseline": "baseline-initial",
    "tuned baseline": "baseline-tuned",
    "ResNet50V2": "resnet-transfer",
    "EfficientNet-Lite0": "lite0-transfer",
    "EfficientNet-Lite0, 224 px": "lite0-transfer-224",
}
# Trained without ieee8023; each is held against the plain one of the same epochs.
WITHOUT_IEEE8023 = {
    "guided-1": "guided-1-without-ieee8023",
    "guided-4": "guided-4-without-ieee8023",
    "guided-4, another seed": "guided-4-seed-3-without-ieee8023",
    "guided-1 joined with guided-4": "guided-joined-without-ieee8023",
    "guided-1, 3 epochs": "short-plain-without-ieee8023",
    "the same, histograms exchanged (0.5)": "short-histograms-without-ieee8023",
    "the same, group DRO (step 0.05)": "short-robust-without-ieee8023",
    "the same, domain-adversarial (weight 0.3)": "short-adversarial-without-ieee8023",
}
# The same without what surrounds the lungs.
LUNGS_ALONE = {
    "guided-1": "guided-1-without-ieee8023",
    "guided-1, every image cropped in training": "guided-1-cropped-without-ieee8023",
    "guided-4": "guided-4-without-ieee8023",
    "guided-4, every image cropped in training": "guided-4-cropped-without-ieee8023",
    "guided-1 joined with guided-4": "guided-joined-without-ieee8023",
    "both cropped, joined, seeing the lungs' box alone": "lungs-alone-without-ieee8023",
}
# Title, part of the metrics, comparison.
PROBES = (
    ("ieee8023 left out", "left_out", "COVID vs NORMAL"),
    ("against other pneumonias", "left_out", "COVID vs OTHER_PNEUMONIA"),
    (
        "ieee8023 unseen: COVID vs other",
        "left_out",
        "COVID vs OTHER_PNEUMONIA within ieee8023",
    ),
    ("nih: other vs normal", "test", "OTHER_PNEUMONIA vs NORMAL within nih"),
    ("kermany: other vs normal", "test", "OTHER_PNEUMONIA vs NORMAL within kermany"),
)
TITLES = ("accuracy", "sensitivity", "specificity", "F1", "ROC-AUC", "PR-AUC", "ECE")


def read(name: str) -> dict[str, Any]:
    """Read one of the runs' JSON files, as "baseline-tuned/metrics.json"."""
    values: dict[str, Any] = json.loads((RUNS / name).read_text(encoding="utf-8"))
    return values


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Write a figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def models() -> list[tuple[str, dict[str, Any]]]:
    """Label and metrics of each model; the initial one was never tested."""
    return [
        (label, read(f"{run}/metrics.json"))
        for label, run in MODELS.items()
        if (RUNS / run / "metrics.json").exists()
    ]


def study() -> str:
    """The final models on covid-xray/test."""
    rows = [
        [
            label,
            f"{metrics['parameters']:,}",
            number(metrics["validation"]["roc_auc"]),
            *(number(metrics.get("test", {}).get(name)) for name in COLUMNS),
        ]
        for label, metrics in models()
    ]
    return markdown(["model", "parameters", "validation ROC-AUC", *TITLES], rows)


def confusion() -> str:
    """The confusion matrices on covid-xray/test."""
    rows = [
        [label, *(str(metrics["test"][name]) for name in ("tp", "fn", "tn", "fp"))]
        for label, metrics in models()
        if "test" in metrics
    ]
    head = ["model", "true positive", "false negative", "true negative", "false positive"]
    return markdown(head, rows)


def search(run: str, parameters: Sequence[str]) -> Callable[[], str]:
    """Make a table of the five best trials of a search."""

    def table() -> str:
        with (RUNS / run / "search.csv").open(newline="", encoding="utf-8") as file:
            trials = [row for row in csv.DictReader(file) if row["value"]]
        trials.sort(key=lambda row: float(row["value"]))
        rows = [
            [
                row["number"],
                *(f"{float(row[name]):.3g}" for name in parameters),
                row["epochs"],
                number(float(row["value"]), 4),
            ]
            for row in trials[:5]
        ]
        return markdown(["trial", *parameters, "epochs", "validation loss"], rows)

    return table


def probes(runs: Mapping[str, str]) -> Callable[[], str]:
    """Make a table of what runs that were trained without ieee8023 do on it."""

    def table() -> str:
        rows = []
        for label, run in runs.items():
            metrics = read(f"{run}/metrics.json")
            areas = [metrics[part]["probes"][name]["roc_auc"] for _, part, name in PROBES]
            rows.append([label, str(metrics["epochs"]), *map(number, areas)])
        return markdown(["recipe", "epochs", *(title for title, _, _ in PROBES)], rows)

    return table


def table_of(name: str) -> Callable[[], str]:
    """Make a table of a CSV file beside this script."""

    def table() -> str:
        with (HERE / name).open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        return markdown(head, [[cell or "-" for cell in row] for row in rows])

    return table


TABLES: dict[str, Callable[[], str]] = {
    "study": study,
    "confusion": confusion,
    "tuning": search("baseline-tuned", ("learning_rate", "width", "dense_units", "dropout")),
    "grid": search("resnet-transfer", ("batch_size", "learning_rate", "dropout")),
    "groups": table_of("groups.csv"),
    "recipes": table_of("recipes.csv"),
    "candidates": table_of("candidates.csv"),
    "shortcuts": probes(WITHOUT_IEEE8023),
    "view": probes(LUNGS_ALONE),
    "thresholds": table_of("thresholds.csv"),
}


def render(text: str) -> str:
    """Put the tables into the report's text."""
    for name, make in TABLES.items():
        start, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
        if start in text:
            before, _, rest = text.partition(start)
            after = rest[rest.index(end) :]
            text = before + start + make() + after
    return text


if __name__ == "__main__":
    REPORT.write_text(render(REPORT.read_text(encoding="utf-8")), encoding="utf-8")

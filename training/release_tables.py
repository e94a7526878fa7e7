"""Figures of a run that was trained without a source, as a table for the release gate."""

from pathlib import Path

from lungwatch.errors import ConfigError
from lungwatch.training.run import RunFolder

_ROWS = {
    "COVID vs NORMAL": "against NORMAL",
    "COVID vs OTHER_PNEUMONIA": "against other pneumonias",
}


def read_left_out_run(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Read what `lungwatch train guided --leave-out SOURCE` measured on the source left out.

    Returns
    -------
    dict
        Title -> row -> column -> number; see `lungwatch.export.figures`.

    Raises
    ------
    ConfigError
        If the folder is no such run.
    """
    run = RunFolder(root=folder)
    if not (folder / "metrics.json").is_file() or not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no finished run: it has no metrics.json")
    measured = run.read("metrics.json").get("left_out")
    source = run.read("config.json").get("data", {}).get("left_out")
    if not measured or not source:
        raise ConfigError(f"{folder} was not trained without a source (--leave-out)")
    rows = {}
    for probe, found in measured["probes"].items():
        if probe in _ROWS:
            rows[_ROWS[probe]] = {"ROC-AUC": float(found["roc_auc"])}
        elif probe == f"COVID vs OTHER_PNEUMONIA within {source}":
            rows[f"against other pneumonias of {source} itself"] = {
                "ROC-AUC": float(found["roc_auc"])
            }
    if not rows:
        raise ConfigError(f"{folder}: nothing of COVID was measured on {source}")
    return {f"{source} left out of training": rows}

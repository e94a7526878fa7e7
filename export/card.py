"""Model card: intended use, training data, metrics, release gate, content gate.

Quantisation and limits of a model.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import OPACITY, Finding, GateContract, ModelContract
from lungwatch.errors import ConfigError
from lungwatch.training.evaluation.gate_rates import FAMILIAR, FRONTAL, LUNGS, POLARITY, UPRIGHT
from lungwatch.training.evaluation.metrics import FEWEST
from lungwatch.training.evaluation.release_gate import RELEASE_GATE_VERSION

# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
FIGURES = "figures"


# Title of a table -> row -> column -> number.
FigureTables: TypeAlias = dict[str, dict[str, dict[str, float]]]


def read_figures(file: Path) -> FigureTables:
    """Read tables from JSON: {"title": {"row": {"column": number}}}.

    Raises
    ------
    ConfigError
        If it is unreadable, or not of that form.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error
    return check_figures(values, str(file))


def check_figures(values: object, where: str) -> FigureTables:
    """Make sure that values are tables of numbers.

    Raises
    ------
    ConfigError
        If they are not; the message names the place within `where`.
    """
    return {
        title: {
            row: {column: _number(cell, at) for column, cell, at in _items(cells, in_row)}
            for row, cells, in_row in _items(rows, in_table)
        }
        for title, rows, in_table in _items(values, where)
    }


def of_data_sets(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured on data sets at the export, without what comes from elsewhere."""
    # The names of data sets hold a "/"; tables and the release gate have one of their own.
    return {name: found for name, found in metrics.items() if "/" in name}


def figures_markdown(figures: FigureTables) -> str:
    """Draw the tables in Markdown, each under its title."""
    return "\n\n".join(f"### {title}\n\n{_table(rows)}" for title, rows in figures.items())


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["", *map(_escaped, columns)], ["---"] * (len(columns) + 1)]
    lines += [
        [_escaped(row), *(_shown(cells.get(c)) for c in columns)] for row, cells in rows.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _items(values: object, where: str) -> list[tuple[str, Any, str]]:
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            f'{where} holds no tables of the form {{"title": {{"row": {{"column": number}}}}}}'
        )
    for name in values:
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{where}: {name!r} is no name for a table, row or column")
    return [(name, value, f"{where}: {name}") for name, value in values.items()]


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}, not a number")
    return value


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


_ASKS = {
    FRONTAL: "is it a frontal chest X-ray, however it lies?",
    UPRIGHT: "is it upright? (else turned by 90°, 180° or 270°)",
    POLARITY: "is air dark? (else the grey values are inverted)",
    LUNGS: "is enough of the picture lung? (0.5 stands for 5 %)",
    FAMILIAR: "is it near the X-rays that the gate learnt from? (0.5 stands for the largest "
    "distance that passes)",
}


_WHAT = """\
Before the network is asked, a second one says whether the picture can be judged at all. A picture
is refused by the first check whose score is below its threshold."""


_RULE = """\
Thresholds are chosen on the X-rays of the validation split, each at three exposures, and on no
picture that has to be refused: the 0.2 % quantile of each chance, but within 0.5 to 0.8; and 1.25
times the 99.5 % quantile of the distances, but at least 5."""


_RATES = """\
Rates of the shipped file on pictures read as the daemon reads them; what is refused while reading
counts as refused."""


_MADE = """\
- What has to be refused was made: X-rays turned, inverted, cut to pieces, laid over one another;
  noise, text, shapes, phantoms of bones and slices. No picture of another part of the body was
  learnt from."""


_GATE_LIMITS = """\
- The gate knows adults and children of the collections above. It was not measured on newborns, on
  X-rays taken lying on the side (decubitus), after the removal of a lung, or of animals, and hardly
  on photographs of films.
- It asks whether a picture can be judged, not whether the answer is right: nothing is said of
  exposure, motion or a foreign body.
- A mirrored chest passes, and one that is tilted by up to about 25°.
- The pictures that it refuses here are of few kinds and collections. Another kind may pass.
- Distances between embeddings tell collections apart too. A hospital whose X-rays look otherwise
  may be refused more often than these figures say: `lungwatch evaluate --gate-images DIR` tells,
  and `gate = "flag"` keeps such images with a remark."""


def gate_markdown(gate: GateContract) -> str:
    """Describe a gate in Markdown, from its contract alone."""
    about, spec = gate.provenance, gate.preprocess
    parts = [
        (
            f"{_WHAT} Input: {spec.size_px} x {spec.size_px} px, fit '{spec.fit}', intensity "
            f"'{spec.intensity}' ({spec.low_percentile:g} to {spec.high_percentile:g} %)."
        ),
        _checks_table(gate),
    ]
    if thresholds := about.get("thresholds"):
        least, most = gate.lung_area
        parts.append(
            f"{_RULE} Here the largest distance is {thresholds['distance']:g}; a typical training "
            "image has 1. The flag `partial_lungs` is set where the lungs are cut off, less than "
            f"{least:.1%} or more than {most:.1%} of the picture (0.5 % and 99.5 % quantiles of "
            "the training images)."
        )
    if rows := gate.metrics.get("rates"):
        parts += [_RATES, rates_table(rows)]
    parts += ["Limits of the gate:", _GATE_LIMITS]
    if about:
        parts.append("How the gate was made:\n\n" + _gate_making(about))
    return "\n\n".join(parts)


def rates_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw what was kept and refused, failures first to be seen."""
    lines = [
        "| pictures of | copies | should be | pictures | right | wrong | refused as |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        count, kept = row["pictures"], row["kept"]
        right = kept if row["expected"] == "kept" else count - kept
        often = sorted(row["refused"].items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = ", ".join(f"{reason} {number}" for reason, number in often) or "none"
        lines.append(
            f"| {row['pictures_of']} | {row['copies']} | {row['expected']} | {count} "
            f"| {right / count:.1%} | {count - right} | {reasons} |"
        )
    return "\n".join(lines)


def _checks_table(gate: GateContract) -> str:
    lines = ["| check | asks | passes from | else refused as |", "|---|---|---|---|"]
    lines += [
        f"| {check.name} | {_ASKS.get(check.name, '')} | {check.threshold:g} | {check.reason} |"
        for check in gate.checks
    ]
    return "\n".join(lines)


def _gate_making(about: Mapping[str, Any]) -> str:
    data, masks, fit = about["data"], about["data"]["masks"], about["fit"]
    count = sum(data["train"].values())
    lines = [
        (
            f"- {about['family']}, cut in its middle, from ImageNet; {about['parameters']:,} "
            f"parameters. {about['backend']}. Pictures were {about['pictures']}."
        ),
        (
            f"- It learnt from {count} X-rays of `{data['name']}` (training split; findings are "
            f"not used) and {masks['train']} X-rays with lungs drawn by hand: {fit['mask_steps']} "
            "steps on the drawings, which found the lungs of all others, then from the start "
            f"{fit['steps']} on everything; batches of {fit['batch_size']}, AdamW, learning rate "
            f"{fit['learning_rate']:g}, seed {fit['seed']}."
        ),
        _MADE,
    ]
    if dropped := data.get("dropped", 0) + masks.get("dropped", 0):
        lines.append(f"- {dropped} images that show an X-ray of another split were left out.")
    if others := masks.get("of_other_splits"):
        lines.append(
            f"- {others} of the X-rays with drawn lungs show an X-ray of the validation or test "
            "split, so the rates of these splits are a little too good."
        )
    terms = "; ".join(f"{name} ({number})" for name, number in data["licences"].items())
    lines.append(f"- Terms of the training images (number of images): {terms}.")
    if quantisation := about.get("quantisation"):
        lines.append(
            f"- Quantised: weights {quantisation['weights']}, activations "
            f"{quantisation['activations']}, {quantisation['convolutions']} convolutions, "
            f"{quantisation['bytes_float'] / 1e6:.1f} MB to {quantisation['bytes_int8'] / 1e6:.1f} "
            f"MB; the chances differ from the float network's by {quantisation['chance_mean']:.4f} "
            f"on average (onnxruntime {quantisation['onnxruntime']})."
        )
    return "\n".join(lines)


_QUANTISED = """\
The convolutions count in int8; the head, the maps and the answers in float. Calibration and
threshold were fitted to this graph's own answers. Held against the float network, ROC-AUC of
both, the difference of the calibrated probabilities, decisions that change (UNCERTAIN counted
as one) and the likeness of the maps:"""


_QUANTISED_LIMIT = """\
Measured on the processor of the export. One without VNNI instructions may saturate in its
integer sums and answer a little otherwise; that was not measured."""


def quantisation_markdown(about: Mapping[str, Any]) -> str:
    """Draw the section, from what `lungwatch.export.quantise` put into the contract."""
    rows = [
        "| set | images | float | int8 | loss | largest | mean | changed | cosine | correlation |",
        "|---" * 10 + "|",
    ]
    for name, found in about["fidelity"].items():
        maps = (found["map_cosine"], found["map_correlation"])
        likeness = " | ".join("none" if value is None else f"{value:.3f}" for value in maps)
        rows.append(
            f"| {name} | {found['images']} | {found['roc_auc_float']:.4f} | "
            f"{found['roc_auc_int8']:.4f} | {found['loss']:.4f} | "
            f"{found['probability_largest']:.3f} | {found['probability_mean']:.4f} | "
            f"{found['decisions_changed']} | {likeness} |"
        )
    for name, found in about.get("findings", {}).items():
        rows.append(
            f"\nROC-AUC of the finding `{name}` on validation: {found['roc_auc_float']:.4f}, in "
            f"int8 {found['roc_auc_int8']:.4f}."
        )
    made = (
        f"{about['convolutions']} convolutions; weights {about['weights']}; activations "
        f"{about['activations']}, range by {about['calibration']} over "
        f"{sum(about['images'].values())} training images; "
        f"{about['bytes_float'] / 1e6:.1f} MB became {about['bytes_int8'] / 1e6:.1f} MB "
        f"(onnxruntime {about['onnxruntime']})."
    )
    return "\n\n".join([_QUANTISED, "\n".join(rows), made, _QUANTISED_LIMIT])


# The key in a contract's metrics, beside the data sets, whose names all hold a "/".
RELEASE_GATE = "release_gate"


_WORDS = {"pass": "pass", "fail": "**FAIL**", "not_measured": "not measured"}

_VERDICTS = {
    "pass": "The gate is passed: no check fails, and every requirement was measured.",
    "fail": "**The gate is not passed.** What fails is a reason to distrust the model there.",
    "not_measured": "**The gate is not passed**: nothing fails, but something was not measured.",
}

_KEYS = ("name", "title", "on", "value", "interval", "bound", "at_least", "judged", "verdict")


def read_release_gate(file: Path) -> dict[str, Any]:
    """Read what `lungwatch evaluate --gate` wrote, as it goes into a contract's metrics.

    Of each check its reason, its value, interval, bound and verdict and the figures beside it are
    kept; why the bound is where it is stands in `docs/release-gate.md`.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON in UTF-8") from error
    if not isinstance(values, dict) or values.get("release_gate") != RELEASE_GATE_VERSION:
        raise ConfigError(
            f"{file} is no release gate of this version: make it with `lungwatch evaluate --gate`"
        )
    try:
        checks = [_check(check) for check in values["checks"]]
        told = {key: values[key] for key in ("model", "model_sha256", "data", "verdict", "counts")}
        _require_verdict(told["verdict"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is no complete release gate: {error}") from error
    return {"release_gate": RELEASE_GATE_VERSION, **told, "checks": checks}


def require_same_model(result: Mapping[str, Any], model_sha256: str, where: str) -> None:
    """Make sure that a release gate was measured on this model.

    Parameters
    ----------
    result
        Of `read_release_gate`.
    model_sha256
        Of `lungwatch.training.evaluation.scorers.model_digest`.
    where
        What the message calls the model.

    Raises
    ------
    ConfigError
        If it was another.
    """
    if result["model_sha256"] != model_sha256:
        raise ConfigError(
            f"the release gate was measured on {result['model']}, whose files are not those of "
            f"{where}: run `lungwatch evaluate {where} … --gate` anew"
        )


def release_gate_markdown(result: Mapping[str, Any]) -> str:
    """Draw the table of a release gate in Markdown, failures first among what needs reading."""
    counts = result["counts"]
    lines = [
        _VERDICTS[result["verdict"]]
        + f" {counts['pass']} checks pass, {counts['fail']} fail, {counts['not_measured']} were "
        f"not measured. Measured on {result['model']}, data: {', '.join(result['data'])}.",
        "",
        "| check | on | value | 95 % interval | bound | verdict | beside |",
        "|---|---|---|---|---|---|---|",
    ]
    for check in result["checks"]:
        ends = check["interval"]
        sign = "≥" if check["at_least"] else "≤"
        bound = f"{sign} {check['bound']:g}" + (", lower end" if check["judged"] == "low" else "")
        reason = f": {check['reason']}" if check["reason"] else ""
        cells = (
            check["title"],
            check["on"],
            "" if check["value"] is None else f"{check['value']:.3f}",
            f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "",
            bound,
            _WORDS[check["verdict"]] + reason,
            ", ".join(f"{name} {value:.3g}" for name, value in check["beside"].items()),
        )
        lines.append("| " + " | ".join(_escaped_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: check[key] for key in _KEYS}
    _require_verdict(found["verdict"])
    numbers = [found["bound"], *(found["interval"] or ()), *check["beside"].values()]
    if found["value"] is not None:
        numbers.append(found["value"])
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{found['name']} holds what is no number")
    beside = {name: round(float(value), 4) for name, value in check["beside"].items()}
    return {**found, "reason": check["reason"], "beside": beside}


def _require_verdict(word: object) -> None:
    if word not in _WORDS:
        raise ValueError(f"verdict {word!r} is none")


def _escaped_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


_USE = """\
**Intended use.** Research, teaching and testing: ordering and auditing collections of frontal
chest X-rays, and studying what such networks look at.

**Not intended.** Diagnosis, triage, treatment, exclusion of disease, or any decision about a
person. COVID-19 is diagnosed by laboratory tests; many infected people have a normal chest
X-ray. Not for lateral views, CT, or parts of the body other than the chest: a content gate refuses
most of such pictures, not all.

**The answer** is COVID, NEGATIVE (no COVID pattern; nothing is said of other disease, and other
pneumonias belong here) or UNCERTAIN, a calibrated probability, and a coarse map of what spoke for
either class."""


_LIMITS = """\
- The probability is calibrated for the share of COVID in the validation images. In a clinic
  that share is another, and the probability is wrong by as much.
- Networks of this kind learn where an image comes from as readily as what it shows: exposure,
  crop, letters, tubes, age. The figures within one source show how much remains when the
  source gives no hint; the figures on other data sets show how much carries over.
- The map says which cells of the last feature map raised the score. It is no segmentation and
  proves no finding. A map that lights up outside the lungs is a reason to distrust the answer.
- Performance was not broken down by sex, ethnicity or equipment: the collections do not say."""


_MEASURED = """\
Measured on the exported ONNX file; accuracy, sensitivity, specificity and F1 at the threshold
that was fixed on validation data, abstention ignored."""


_RULES = {"youden": "Youden", "balanced": "largest smaller one of sensitivity and specificity"}


_GUIDES = {
    "exchange_histograms": "Histograms exchanged between sources: share of images",
    "group_robust": "Groups of finding and source weighed by their loss (group DRO): step",
    "domain_adversarial": "Domain-adversarial training: weight",
}


_FIGURES = {
    "ROC-AUC": "roc_auc",
    "PR-AUC": "pr_auc",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "F1": "f1",
    "ECE": "ece",
    "Brier": "brier",
    "uncertain": "uncertain",
}


def write_card(contract: ModelContract, notes: str = "") -> str:
    """Write the card in Markdown, from the contract alone and notes on the data.

    Source: Mitchell et al. 2019, Model Cards for Model Reporting.
    """
    measured = of_data_sets(contract.metrics)
    parts = [
        f"# {contract.id}",
        f"> {RESEARCH_USE_ONLY}",
        f"{contract.family}; frontal chest X-rays, COVID against everything else.",
        "## Use",
        _USE,
        "## Figures as measured",
        _MEASURED,
        _figures_table(measured),
        "ROC-AUC of the COVID score for one finding against another (images in brackets):",
        _probes_table(measured),
    ]
    if table := _findings_table(measured):
        parts += ["The findings beside COVID, where the labels tell them:", table]
    if figures := contract.metrics.get(FIGURES):
        parts.append(figures_markdown(figures))
    if release := contract.metrics.get(RELEASE_GATE):
        parts += ["## Release gate", release_gate_markdown(release)]
    parts += [
        "## Limits",
        _LIMITS,
        "## Training data",
        _training_data(contract.provenance),
    ]
    if notes:
        parts.append(notes.strip())
    if contract.gate:
        parts += ["## Content gate", gate_markdown(contract.gate)]
    parts += [
        "## Decision",
        _decision(contract),
        "## Input and maps",
        _input(contract),
    ]
    if quantisation := contract.provenance.get("quantisation"):
        parts += ["## Quantisation", quantisation_markdown(quantisation)]
    parts += ["## How it was made", _making(contract.provenance)]
    return "\n\n".join(parts) + "\n"


def _decision(contract: ModelContract) -> str:
    decision, calibration = contract.decision, contract.calibration
    rule = _RULES[contract.provenance.get("threshold_rule", "youden")]
    return (
        f"Threshold {decision.threshold:.4f} ({rule} on validation); UNCERTAIN within "
        f"[{decision.uncertain_low:.4f}, {decision.uncertain_high:.4f}). Platt calibration: slope "
        f"{calibration.slope:.4f}, intercept {calibration.intercept:.4f}."
        + "".join(map(_finding, contract.findings))
    )


def _finding(finding: Finding) -> str:
    calibration = finding.calibration
    return (
        f"\n\nBeside COVID the model scores the finding `{finding.name}`, with a probability of "
        f"its own: present from {finding.threshold:.4f}; Platt calibration: slope "
        f"{calibration.slope:.4f}, intercept {calibration.intercept:.4f}. It changes no label"
        + (
            "; a NEGATIVE answer with it carries the flag `other_opacity`."
            if finding.name == OPACITY
            else "."
        )
    )


def _input(contract: ModelContract) -> str:
    spec = contract.preprocess
    return (
        f"{spec.size_px} x {spec.size_px} px, fit '{spec.fit}', intensity '{spec.intensity}' "
        f"({spec.low_percentile:g} to {spec.high_percentile:g} %); standardisation is inside the "
        f"graph. Maps of {contract.cam_side_px} x {contract.cam_side_px} cells for both classes, "
        f"drawn {_scale(contract.map_reference)}; embedding of {contract.embedding_size} numbers."
    )


def _scale(reference: float | None) -> str:
    if reference is None:
        return "relative to each image's strongest evidence"
    return (
        f"on one scale for all images, whose end is {reference:.4g} (95th percentile of the "
        "largest evidence over validation images called COVID)"
    )


def _figures_table(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return "None: exported without evaluation."
    rows = [f"| set | images | COVID | {' | '.join(_FIGURES)} |"]
    rows.append("|---" * (len(_FIGURES) + 3) + "|")
    for name, found in metrics.items():
        images = found["positives"] + found["negatives"]
        cells = [
            _cell(found[key], found.get("intervals", {}).get(key), key in found.get("too_few", ()))
            for key in _FIGURES.values()
        ]
        rows.append(f"| {name} | {images} | {found['positives']} | {' | '.join(cells)} |")
    if any(found.get("intervals") for found in metrics.values()):
        rows += ["", _intervals(metrics)]
    return "\n".join(rows)


def _intervals(metrics: Mapping[str, Any]) -> str:
    over = ", ".join(
        f"{name} over {found['bootstrap']['over']}"
        for name, found in metrics.items()
        if found.get("intervals")
    )
    return (
        f"In brackets 95 % intervals by bootstrap: {over}. Too few: fewer than {FEWEST} patients "
        "of a class (images, where patients are unknown)."
    )


def _cell(value: float, interval: Sequence[float] | None, few: bool) -> str:  # noqa: FBT001
    within = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{value:.3f}{within}{', too few' if few else ''}"


def _probes_table(metrics: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in metrics.items():
        for probe, found in figures["probes"].items():
            cell = _cell(
                found["roc_auc"],
                figures.get("probe_intervals", {}).get(probe),
                probe in figures.get("probe_too_few", ()),
            )
            rows.append(
                f"| {name} | {probe} | {cell} ({found['positives']} vs {found['negatives']}) |"
            )
    return "\n".join(["| set | comparison | ROC-AUC |", "|---|---|---|", *rows])


def _findings_table(metrics: Mapping[str, Any]) -> str:
    columns = {name: key for name, key in _FIGURES.items() if name != "uncertain"}
    rows = []
    for name, measured in metrics.items():
        for finding, found in measured.get("findings", {}).items():
            images = found["positives"] + found["negatives"]
            cells = [
                _cell(
                    found[key], found.get("intervals", {}).get(key), key in found.get("too_few", ())
                )
                for key in columns.values()
            ]
            rows.append(
                f"| {name} | {finding} | {found['positives']} | {images} | {' | '.join(cells)} |"
            )
    if not rows:
        return ""
    head = [
        f"| set | finding | with it | images | {' | '.join(columns)} |",
        "|---" * (len(columns) + 4) + "|",
    ]
    return "\n".join(head + rows)


def _training_data(provenance: Mapping[str, Any]) -> str:
    data = provenance.get("data")
    if not data:
        return "Not recorded: exported from a bare Keras file."
    lines = [f"`{data['name']}`, training split (validation split in brackets):", ""]
    lines += [
        f"- {group}: {count} ({data['val'].get(group, 0)})"
        for group, count in data["train"].items()
    ]
    terms = "; ".join(f"{name} ({count})" for name, count in data["licences"].items())
    return "\n".join([*lines, "", f"Terms of the training images (number of images): {terms}."])


def _making(provenance: Mapping[str, Any]) -> str:
    lines = []
    if before := provenance.get("network_of"):
        lines.append(
            f"- The network, its calibration and its thresholds are those of {before}; the scale "
            "of the maps and the content gate are new."
        )
    if foreign := provenance.get("foreign"):
        lines.append(
            "- A Keras network of another make, declared on export: output "
            f"{foreign['output']}, input range {foreign['input_range']}, channels "
            f"{foreign['channels']}. Calibration and threshold were fitted on the validation split."
        )
    if members := provenance.get("members"):
        families = ", ".join(str(member.get("family")) for member in members)
        lines.append(f"- The mean of the calibrated logits of {len(members)} networks: {families}.")
    if "phase" in provenance:
        lines.append(_phases(provenance))
    guidance = provenance.get("guidance")
    if guidance:
        lines.append(_guided(provenance["network"], guidance))
    if "fit" in provenance:
        fit = provenance["fit"]
        lines.append(
            f"- AdamW, learning rate {fit['learning_rate']:g}, batches of {fit['batch_size']}, "
            f"seed {fit['seed']}; {_kept(provenance)}."
        )
        if not guidance:
            amounts = ", ".join(f"{k} {v:g}" for k, v in fit["augmentation"].items())
            lines.append(f"- Augmentation, no flips: {amounts}.")
    if "quantisation" not in provenance and (fixed_on := provenance.get("calibrated_on")):
        lines.append(f"- Calibration and threshold were fixed on the {fixed_on}.")
    packages = provenance.get("environment", {}).get("packages", {})
    if packages:
        lines.append("- " + ", ".join(f"{k} {v}" for k, v in packages.items()) + ".")
    parity = provenance["parity"]
    before = ", before quantisation" if "quantisation" in provenance else ""
    lines.append(
        f"- Largest differences on {parity['images']} images ({parity['kind']}){before}: "
        f"probability of ONNX against Keras {parity['probability']:.1e}, map {parity['cam']:.1e}, "
        f"map against automatic differentiation {parity['gradient']:.1e}."
    )
    return "\n".join(lines)


def _kept(provenance: Mapping[str, Any]) -> str:
    epochs, best = provenance["epochs"], provenance["best_epoch"]
    if provenance["fit"].get("keep") == "last":
        return f"the last weights of {epochs} epochs are kept"
    if provenance.get("trained_on", "train") != "train":
        through = ", counted through all phases" if "phase" in provenance else ""
        return (
            f"the final network learnt from {provenance['trained_on']}, for as many epochs as led "
            "to the lowest calibrated validation loss without the latter: "
            f"{best}{through}"
        )
    return f"best of {epochs} epochs by calibrated validation loss: {best}"


def _guided(network: Mapping[str, Any], guidance: Mapping[str, Any]) -> str:
    cut = f", cut at {network['stride']} pixels a cell" if network.get("stride") else ""
    rewarded = guidance["objective"]
    further = "".join(
        f" {title} {guidance[name]:g}." for name, title in _GUIDES.items() if guidance.get(name)
    )
    return (
        f"- Guided to the lungs: backbone {network['backbone']}{cut}, starting weights "
        f"`{network['weights']}`; framing, marks and surroundings changed at every showing. "
        f"Target of other pneumonias {rewarded['other_target']:g}; weight of the order within "
        f"each source {rewarded['ranking']:g}, of evidence outside the lungs "
        f"{rewarded['lungs']:g}.{further}"
    )


def _phases(provenance: Mapping[str, Any]) -> str:
    network = provenance["network"]
    part = f"its last {network['unfreeze']} blocks" if network["unfreeze"] else "all of it"
    phases = (
        ("the head alone", provenance["fit_frozen"]),
        (f"the backbone ({part}, batch norm in inference mode) with it", provenance["fit_tuning"]),
    )
    steps = "; then ".join(
        f"{what}, at most {fit['epochs']} epochs at learning rate {fit['learning_rate']:g}"
        for what, fit in phases
        if fit
    )
    return (
        f"- Transfer learning: backbone {network['backbone']}, starting weights "
        f"`{network['weights']}`. Trained were {steps}. Kept: the {provenance['phase']} network."
    )

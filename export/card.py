"""The model card: what a model is for, what it learnt from, and how far it can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.contract import OPACITY, Finding, ModelContract
from lungwatch.export.figures import FIGURES, figures_markdown, of_data_sets
from lungwatch.export.gate_card import gate_markdown
from lungwatch.export.quantisation_card import quantisation_markdown
from lungwatch.export.release_card import RELEASE_GATE, release_gate_markdown
from lungwatch.training.bootstrap import FEWEST

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

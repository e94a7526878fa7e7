"""Export of a trained run: convert, verify, evaluate, write the bundle."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.bundle import ABOUT_FILE, CARD_FILE, DRIFT_FILE, GATE_FILE, LEARNT_FILE, MODEL_FILE
from lungwatch.comparison import DriftReference
from lungwatch.contract import (
    CAM,
    EMBEDDING,
    FINDINGS,
    PROBABILITY,
    Calibration,
    Finding,
    Golden,
    ModelContract,
)
from lungwatch.errors import ConfigError, DatasetError, ModelError
from lungwatch.export.card import FIGURES, FigureTables, check_figures, write_card
from lungwatch.export.gate import GateRequest, export_gate
from lungwatch.export.graph import (
    PROBABILITY_LIMIT,
    compare,
    own_form,
    run_onnx,
    synthetic_images,
    to_onnx,
    with_contract,
)
from lungwatch.export.quantise import check_size, make_int8, recalibrate, val_samples
from lungwatch.export.references import (
    evaluate_sets,
    findings_of_graph,
    int8_loss,
    make_reference,
    reference_of_data,
    with_references,
)
from lungwatch.files import fsync_dir, make_dirs, write_atomic
from lungwatch.preprocess import PreprocessSpec, golden_digest, golden_input
from lungwatch.training.data.dataset import LabelMap, dataset_name, load_dataset
from lungwatch.training.data.pixels import FloatArray, KerasModel, OnnxProto, read_pixels, targets
from lungwatch.training.data.splits import LearntImages, learnt_of, prefixes, sha256_of
from lungwatch.training.evaluation.calibration import Rule
from lungwatch.training.evaluation.metrics import roc_auc, sigmoid
from lungwatch.training.evaluation.scorers import (
    Declaration,
    Judgement,
    KerasScorer,
    OnnxScorer,
    predict_logits,
)

# A validation area up to this is about chance: 200 images of either class have a standard error
# of 0.03 there.
CHANCE_AUC = 0.55
_CONSTANT = 1e-6
_PARITY_IMAGES = 50
# What the metrics of runs said before calibration images were held back.
_ALL_RELEARNT = "train and val"
# Processors without VNNI saturate in 16-bit sums, which moves an int8 network's answers further
# than float rounding does. An allowance, not a measurement; a broken file is off by far more.
_INT8_TOLERANCE = 0.02
_OF_CONFIG = (
    "data",
    "fit",
    "fit_frozen",
    "fit_tuning",
    "guidance",
    "members",
    "network",
    "normalisation",
    "tuning",
)
_OF_METRICS = ("phase", "trained_on", "calibrated_on")


def write_bundle(
    folder: Path,
    *,
    model: bytes,
    contract: ModelContract,
    card: str,
    gate: bytes | None = None,
    drift: DriftReference | None = None,
    learnt: bytes | None = None,
    replace: bool = False,
) -> Path:
    """Write the folder `<name>-<version>` atomically.

    Parameters
    ----------
    gate
        The content gate's ONNX file, if the contract describes one.
    drift
        The reference for drift, if there is one.
    learnt
        The record of the images that the network learnt from, if there is one.

    Raises
    ------
    ModelError
        If there is a gate that the contract does not describe, or the reverse; or the reference
        is of another embedding.
    ConfigError
        If that version exists already and `replace` is not set: results in databases point
        at a version by its name.
    OSError
        If writing fails.
    """
    if (gate is None) != (contract.gate is None):
        raise ModelError(
            f"{contract.id}: a content gate and its section in the contract go together"
        )
    target = folder / contract.id
    if target.exists() and not replace:
        raise ConfigError(f"{target} exists already; choose another version or replace it")
    make_dirs(folder)
    building = folder / f".tmp-{contract.id}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    files = {MODEL_FILE: model, CARD_FILE: card.encode()}
    if gate is not None:
        files[GATE_FILE] = gate
    if drift is not None:
        drift.check(contract.embedding_size)
        files[DRIFT_FILE] = (drift.to_json() + "\n").encode()
    if learnt is not None:
        files[LEARNT_FILE] = learnt
    for name, data in files.items():
        write_atomic(building / name, data)
    about = {
        "name": contract.name,
        "version": contract.version,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    write_atomic(building / ABOUT_FILE, (json.dumps(about, indent=2) + "\n").encode())
    if target.exists():
        shutil.rmtree(target)
    building.rename(target)
    fsync_dir(folder)
    return target


def check_weights(model: KerasModel, name: str) -> None:
    """Refuse weights that are no finite numbers.

    Raises
    ------
    ModelError
        If there are any; the first layer is named.
    """
    for weight in model.weights:
        if not np.isfinite(np.asarray(weight)).all():
            raise ModelError(
                f"{name}: weights of {weight.path} are not finite: the training diverged; train "
                "it again with a smaller learning rate"
            )


def check_varied(logits: FloatArray, name: str) -> None:
    """Refuse a network that gives the same logit, (N,), for different images.

    Raises
    ------
    ModelError
        If it does, or gives what is no finite number.
    """
    if not np.isfinite(logits).all():
        raise ModelError(f"{name} answers with what is no finite number: the training diverged")
    if len(logits) > 1 and float(np.ptp(logits)) < _CONSTANT:
        raise ModelError(f"{name} gives all {len(logits)} images the same answer: train it again")


def check_validation(area: float, calibration: Calibration, name: str) -> None:
    """Refuse a network that does not tell the classes apart on validation images.

    Raises
    ------
    ModelError
        If its area under the ROC curve is about chance or less, or no rising calibration fits.
    """
    if not area > CHANCE_AUC:
        raise ModelError(
            f"{name} has ROC-AUC {area:.3f} on validation images, not above {CHANCE_AUC}: no "
            "better than chance; it is not exported"
        )
    # `fit_calibration` gives the identity, which no fit gives, where the slope is not above 0.
    if calibration == Calibration():
        raise ModelError(
            f"{name} scores COVID lower on validation images: no calibration with a slope above 0 "
            "fits; it is not exported"
        )


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Request of an export.

    Attributes
    ----------
    model
        A run folder or a .keras file.
    name, version
        The bundle's identity.
    folder
        Where the bundle's own folder is made.
    data
        Data set that the model was trained on: its validation split calibrates a bare .keras
        file; its images prove parity; its validation and test splits are measured.
    evaluate
        Further data sets whose test split is measured.
    notes
        Markdown for the card, on the data and their confounds.
    replace
        Whether a bundle of the same version is replaced.
    int8
        Whether the convolutions are quantised; needs `data`.
    max_mb
        Largest int8 file, megabytes of 10^6 bytes.
    figures
        Tables measured elsewhere, for the card and the contract's metrics; those that the
        run's metrics.json has under "figures" come first.
    threshold_rule
        Choose a new threshold on the validation split of `data`, by this rule; None keeps a
        run's own, which is Youden's.
    gate
        The content gate that goes with the model; None for none.
    labels
        What labels of the data sets mean that are no finding.
    declared
        What the numbers of a .keras file mean that lungwatch did not make.
    """

    model: Path
    name: str
    version: str
    folder: Path
    data: Path | None = None
    evaluate: Sequence[Path] = ()
    notes: str = ""
    replace: bool = False
    int8: bool = False
    max_mb: float = 20.0
    figures: FigureTables = field(default_factory=dict)
    threshold_rule: Rule | None = None
    gate: GateRequest | None = None
    labels: LabelMap | None = None
    declared: Declaration | None = None

    def __post_init__(self) -> None:
        if self.threshold_rule and self.data is None:
            raise DatasetError("a new threshold needs the data set of the training (--data)")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_]*(-[a-z0-9_]+)*", self.name):
            raise ConfigError(f"model name {self.name!r}: lower-case letters, digits, - and _ only")
        check_version(self.version)
        if self.int8 and self.data is None:
            raise DatasetError(
                "quantising needs the data set of the training (--data): its training images "
                "show the range of the activations, its validation images what was lost"
            )


def check_version(version: str) -> None:
    """Refuse an invalid version of a bundle.

    Raises
    ------
    ConfigError
        If it is not of the form 1.0.0.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ConfigError(f"model version {version!r} is not of the form 1.0.0")


def export(
    request: ExportRequest, *, progress: Callable[[int], None] | None = None
) -> tuple[Path, ModelContract]:
    """Export a network and write its bundle.

    Returns
    -------
    folder, contract
        The bundle's folder and what the model says about itself.

    Raises
    ------
    ModelError
        If the network cannot be exported, its graph differs from it, or the int8 graph loses
        too much or is too large.
    NotFoundError
        If there is no such model.
    DatasetError
        If images cannot be read, or a bare .keras file or `int8` comes without data.
    ConfigError
        If the name, the version or the target is not acceptable.
    MissingExtraError
        If TensorFlow is not installed.
    """
    scorer = KerasScorer(request.model, request.declared)
    _refuse_degenerate(scorer)
    learnt = _learnt(scorer, request)
    proto, judgement, provenance = _convert(request, scorer, learnt, progress)
    contract = _contract(request, scorer, judgement, proto.SerializeToString(), provenance)
    exported = OnnxScorer(with_contract(proto, contract))
    contract = _evaluated(
        contract, exported, request, scorer=scorer, learnt=learnt, progress=progress
    )
    gate = export_gate(request.gate, progress=progress) if request.gate else None
    if gate:
        contract = replace(contract, gate=gate.contract)
    model = with_contract(proto, contract)
    if request.int8:
        check_size(len(model), request.max_mb)
    # The daemon looks for drift from this population, and by its axes from a site's own.
    drift = (
        make_reference(exported, gate, request.data, labels=request.labels, progress=progress)
        if request.data
        else None
    )
    bundle = write_bundle(
        request.folder,
        model=model,
        contract=contract,
        card=write_card(contract, request.notes),
        gate=gate.onnx if gate else None,
        drift=drift,
        learnt=learnt.to_json().encode() if learnt else None,
        replace=request.replace,
    )
    return bundle, contract


def _convert(
    request: ExportRequest,
    scorer: KerasScorer,
    learnt: LearntImages | None,
    progress: Callable[[int], None] | None,
) -> tuple[OnnxProto, Judgement, dict[str, Any]]:
    """Convert and perhaps quantise the network; return graph, judgement and provenance."""
    spec, data, rule = scorer.judgement.preprocess, request.data, request.threshold_rule
    images, kind = _parity_images(request, spec)
    network = _network(scorer, images)
    check_varied(scorer.logits(images), scorer.judgement.name)
    proto = to_onnx(network)
    plain = proto.SerializeToString()
    judgement = scorer.judgement
    if rule or not scorer.calibrated:
        judgement = _calibrate(scorer, request, rule or "youden", learnt)
    parity = compare(network, plain, images, kind)
    parity.check()
    provenance = {**_provenance(scorer), "parity": parity.to_dict()}
    if rule:
        provenance["threshold_rule"] = rule
    if request.int8 and data:
        int8 = make_int8(
            proto,
            judgement,
            data,
            rule=rule or "youden",
            labels=request.labels,
            learnt=learnt,
            progress=progress,
        )
        proto, judgement = int8.proto, int8.judgement
        provenance["quantisation"] = int8.about
        if scorer.further:
            provenance["quantisation"]["findings"] = int8_loss(
                plain, proto.SerializeToString(), scorer.further, data, spec, labels=request.labels
            )
    findings = _findings(request, scorer, proto.SerializeToString())
    return proto, replace(judgement, findings=findings), provenance


def _evaluated(
    contract: ModelContract,
    exported: OnnxScorer,
    request: ExportRequest,
    *,
    scorer: KerasScorer,
    learnt: LearntImages | None,
    progress: Callable[[int], None] | None,
) -> ModelContract:
    """Return the contract with the graph's metrics and the scale of its maps."""
    data, labels = request.data, request.labels
    metrics = evaluate_sets(
        exported, data, request.evaluate, progress, labels=labels, learnt=learnt
    )
    if data and (own := metrics.get(f"{dataset_name(data)}/val")):
        check_validation(own["roc_auc"], contract.calibration, scorer.judgement.name)
    if tables := _figures(request, scorer):
        metrics[FIGURES] = tables
    if data is None:
        return replace(contract, metrics=metrics)
    return replace(
        contract,
        metrics=metrics,
        map_reference=reference_of_data(exported, data, labels),
        findings=with_references(contract.findings, exported, data, labels),
    )


def _contract(
    request: ExportRequest,
    scorer: KerasScorer,
    judgement: Judgement,
    graph: bytes,
    provenance: dict[str, Any],
) -> ModelContract:
    spec = judgement.preprocess
    answer = run_onnx(graph, golden_input(spec)[np.newaxis])
    tolerance = _INT8_TOLERANCE if request.int8 else Golden.tolerance
    return ModelContract(
        name=request.name,
        version=request.version,
        family=scorer.config.get("family", scorer.model.name),
        preprocess=spec,
        cam_side_px=int(answer[CAM].shape[-1]),
        embedding_size=int(answer[EMBEDDING].shape[-1]),
        decision=judgement.decision,
        calibration=judgement.calibration,
        golden=Golden(
            input_sha256=golden_digest(),
            probability=float(answer[PROBABILITY][0]),
            cam_mean=float(answer[CAM][0].mean()),
            tolerance=tolerance,
            findings=tuple(float(p) for p in sigmoid(answer[FINDINGS][0]))
            if judgement.findings
            else (),
        ),
        findings=judgement.findings,
        provenance=provenance,
    )


def _provenance(scorer: KerasScorer) -> dict[str, Any]:
    if not scorer.calibrated:
        return {"foreign": scorer.foreign.to_dict()} if scorer.foreign else {}
    return {
        **{key: scorer.config[key] for key in _OF_CONFIG if key in scorer.config},
        **{key: scorer.metrics[key] for key in _OF_METRICS if key in scorer.metrics},
        "environment": scorer.environment,
        "epochs": scorer.metrics["epochs"],
        "best_epoch": scorer.metrics["best_epoch"],
        "parameters": scorer.metrics["parameters"],
    }


def _network(scorer: KerasScorer, images: FloatArray) -> KerasModel:
    """Return the network in lungwatch's own form, which for a foreign one must answer as it."""
    if scorer.foreign is None:
        return scorer.network
    built = own_form(scorer.model, scorer.foreign, scorer.judgement.name)
    before, after = scorer.logits(images), predict_logits(built, images)
    differing = float(np.abs(sigmoid(before) - sigmoid(after)).max())
    if not differing <= PROBABILITY_LIMIT:
        raise ModelError(
            f"{scorer.judgement.name} answers otherwise under lungwatch's head: by {differing:.2e}"
        )
    return built


def _refuse_degenerate(scorer: KerasScorer) -> None:
    name = scorer.judgement.name
    check_weights(scorer.network, name)
    if not scorer.calibrated:
        return
    if scorer.metrics.get("trained_on") == _ALL_RELEARNT:
        raise ModelError(
            f"{name} learnt from all validation images, and its calibration is another network's: "
            "train it with this version, which holds a third of them back"
        )
    area = scorer.metrics.get("validation", {}).get("roc_auc", 1.0)
    check_validation(area, scorer.judgement.calibration, name)


def _learnt(scorer: KerasScorer, request: ExportRequest) -> LearntImages | None:
    """Return the run's record, or what the splits of its data say; None if nothing is known."""
    known = learnt_of(request.model) if scorer.calibrated else None
    if known is not None or request.data is None:
        return known
    samples = load_dataset(request.data, request.labels)
    left_out = scorer.config.get("data", {}).get("left_out")
    parts = {
        split: [
            s.path for s in samples if s.split == split and (not left_out or s.source != left_out)
        ]
        for split in ("train", "val")
    }
    return LearntImages(
        train=prefixes(sha256_of(parts["train"])), val=prefixes(sha256_of(parts["val"]))
    )


def _calibrate(
    scorer: KerasScorer, request: ExportRequest, rule: Rule, learnt: LearntImages | None
) -> Judgement:
    data = request.data
    if data is None:
        raise DatasetError(
            "a bare .keras file carries no threshold: give the data set whose validation split "
            "fixes it (--data), or export the run folder"
        )
    samples = val_samples(load_dataset(data, request.labels), dataset_name(data), learnt)
    logits = scorer.logits(read_pixels(samples, scorer.judgement.preprocess))
    truth, name = targets(samples), scorer.judgement.name
    judgement = recalibrate(scorer.judgement, truth, logits, rule)
    check_varied(logits, name)
    check_validation(roc_auc(truth, logits), judgement.calibration, name)
    return judgement


def _findings(request: ExportRequest, scorer: KerasScorer, graph: bytes) -> tuple[Finding, ...]:
    """Return the findings beside COVID, in the order of the graph's output."""
    names, own = scorer.further, {one.name: one for one in scorer.judgement.findings}
    if set(own) - set(names):
        raise ModelError(f"metrics.json names findings that the network lacks: {', '.join(own)}")
    if not names:
        return ()
    if set(own) == set(names) and not request.int8 and not request.threshold_rule:
        return tuple(own[name] for name in names)
    if request.data is None:
        raise DatasetError(
            f"nothing tells how the scores for {', '.join(names)} are read: give the data set "
            "whose validation split fixes it (--data)"
        )
    rule = request.threshold_rule or "youden"
    return findings_of_graph(
        graph,
        names,
        request.data,
        scorer.judgement.preprocess,
        rule=rule,
        labels=request.labels,
    )


def _figures(request: ExportRequest, scorer: KerasScorer) -> FigureTables:
    recorded = scorer.metrics.get(FIGURES)
    own = check_figures(recorded, f"the run's {FIGURES}") if recorded else {}
    return {**own, **request.figures}


def _parity_images(request: ExportRequest, spec: PreprocessSpec) -> tuple[FloatArray, str]:
    data = request.data
    if data is None:
        return synthetic_images(spec), "synthetic"
    samples = load_dataset(data, request.labels)
    chosen = np.unique(np.linspace(0, len(samples) - 1, _PARITY_IMAGES).astype(int))
    return read_pixels([samples[i] for i in chosen], spec), f"evenly from {dataset_name(data)}"

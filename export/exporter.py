"""Export of a trained run: convert, prove, measure, describe, write the bundle."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.contract import CAM, EMBEDDING, PROBABILITY, Golden, ModelContract
from lungwatch.errors import ConfigError, DatasetError
from lungwatch.export.bundle import write_bundle
from lungwatch.export.card import write_card
from lungwatch.export.fidelity import check_size
from lungwatch.export.figures import FIGURES, Figures, check_figures
from lungwatch.export.gate import GateRequest, export_gate
from lungwatch.export.int8 import make_int8, recalibrate
from lungwatch.export.parity import compare, run_onnx, synthetic_images
from lungwatch.export.peaks import reference_of_data
from lungwatch.export.to_onnx import to_onnx, with_contract
from lungwatch.golden import golden_digest, golden_input
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.calibrate import Rule
from lungwatch.training.dataset import dataset_name, load_dataset, select
from lungwatch.training.evaluate import measure
from lungwatch.training.pixels import FloatArray, read_pixels, targets
from lungwatch.training.samples import Split
from lungwatch.training.scorers import Judgement, KerasScorer, OnnxScorer

_PARITY_IMAGES = 50
_OWN_SPLITS: tuple[Split, ...] = ("val", "test")
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


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and as what.

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
        Fix the threshold anew on the validation split of `data`, by this rule; None keeps a
        run's own, which is Youden's.
    gate
        The content gate that goes with the model; None for none.
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
    figures: Figures = field(default_factory=dict)
    threshold_rule: Rule | None = None
    gate: GateRequest | None = None

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
    """Refuse what is no version of a bundle.

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
    scorer = KerasScorer(request.model)
    spec = scorer.judgement.preprocess
    proto = to_onnx(scorer.model)
    plain = proto.SerializeToString()
    rule = request.threshold_rule
    judgement = scorer.judgement
    if rule or not scorer.calibrated:
        judgement = _calibrate(scorer, request.data, rule or "youden")

    images, kind = _parity_images(request.data, spec)
    parity = compare(scorer.model, plain, images, kind)
    parity.check()
    provenance = {**_provenance(scorer), "parity": parity.to_dict()}
    if rule:
        provenance["threshold_rule"] = rule
    if request.int8 and request.data:
        int8 = make_int8(proto, judgement, request.data, rule=rule or "youden", progress=progress)
        proto, judgement = int8.proto, int8.judgement
        provenance["quantisation"] = int8.about
    contract = _contract(request, scorer, judgement, proto.SerializeToString(), provenance)
    exported = OnnxScorer(with_contract(proto, contract))
    metrics = measure_sets(exported, request.data, request.evaluate, progress)
    if figures := _figures(request, scorer):
        metrics[FIGURES] = figures
    contract = replace(
        contract,
        metrics=metrics,
        map_reference=reference_of_data(exported, request.data) if request.data else None,
    )
    gate = export_gate(request.gate, progress=progress) if request.gate else None
    if gate:
        contract = replace(contract, gate=gate.contract)
    model = with_contract(proto, contract)
    if request.int8:
        check_size(len(model), request.max_mb)
    bundle = write_bundle(
        request.folder,
        model=model,
        contract=contract,
        card=write_card(contract, request.notes),
        gate=gate.onnx if gate else None,
        replace=request.replace,
    )
    return bundle, contract


def _contract(
    request: ExportRequest,
    scorer: KerasScorer,
    judgement: Judgement,
    graph: bytes,
    provenance: dict[str, Any],
) -> ModelContract:
    spec = judgement.preprocess
    answer = run_onnx(graph, golden_input(spec)[np.newaxis])
    tolerance = {"tolerance": _INT8_TOLERANCE} if request.int8 else {}
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
            **tolerance,
        ),
        provenance=provenance,
    )


def _provenance(scorer: KerasScorer) -> dict[str, Any]:
    if not scorer.calibrated:
        return {}
    return {
        **{key: scorer.config[key] for key in _OF_CONFIG if key in scorer.config},
        **{key: scorer.metrics[key] for key in _OF_METRICS if key in scorer.metrics},
        "environment": scorer.environment,
        "epochs": scorer.metrics["epochs"],
        "best_epoch": scorer.metrics["best_epoch"],
        "parameters": scorer.metrics["parameters"],
    }


def _calibrate(scorer: KerasScorer, data: Path | None, rule: Rule) -> Judgement:
    if data is None:
        raise DatasetError(
            "a bare .keras file carries no threshold: give the data set whose validation split "
            "fixes it (--data), or export the run folder"
        )
    samples = select(load_dataset(data), "val", dataset_name(data))
    logits = scorer.logits(read_pixels(samples, scorer.judgement.preprocess))
    return recalibrate(scorer.judgement, targets(samples), logits, rule)


def _figures(request: ExportRequest, scorer: KerasScorer) -> Figures:
    recorded = scorer.metrics.get(FIGURES)
    own = check_figures(recorded, f"the run's {FIGURES}") if recorded else {}
    return {**own, **request.figures}


def _parity_images(data: Path | None, spec: PreprocessSpec) -> tuple[FloatArray, str]:
    if data is None:
        return synthetic_images(spec), "synthetic"
    samples = load_dataset(data)
    chosen = np.unique(np.linspace(0, len(samples) - 1, _PARITY_IMAGES).astype(int))
    return read_pixels([samples[i] for i in chosen], spec), f"evenly from {dataset_name(data)}"


def measure_sets(
    scorer: OnnxScorer,
    data: Path | None,
    evaluate: Sequence[Path],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure an exported graph for its contract.

    Parameters
    ----------
    scorer
        The graph.
    data
        Data set of the training: its validation and test splits, as far as there are any.
    evaluate
        Further data sets: their test splits.
    progress
        Called with 1 for every image read.
    """
    wanted: list[tuple[Path, Split]] = []
    if data:
        there = {s.split for s in load_dataset(data)}
        wanted += [(data, split) for split in _OWN_SPLITS if split in there]
    wanted += [(path, "test") for path in evaluate]
    found = {}
    for path, split in wanted:
        chosen = select(load_dataset(path), split, dataset_name(path))
        pixels = read_pixels(chosen, scorer.judgement.preprocess, progress=progress)
        found[f"{dataset_name(path)}/{split}"] = measure(scorer, chosen, pixels)
    return found

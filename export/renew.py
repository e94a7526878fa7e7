"""Renewal of a bundle around the same network: map scale, content gate, drift, contract, card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lungwatch.bundle import read_bundle
from lungwatch.comparison import LEAST_VALUES, DriftReference
from lungwatch.contract import ModelContract
from lungwatch.errors import DatasetError, MissingExtraError, ModelError
from lungwatch.export.card import (
    FIGURES,
    RELEASE_GATE,
    FigureTables,
    read_release_gate,
    require_same_model,
    write_card,
)
from lungwatch.export.exporter import check_version, write_bundle
from lungwatch.export.gate import GateRequest, export_gate
from lungwatch.export.graph import run_onnx, with_contract
from lungwatch.export.references import (
    add_peak_output,
    evaluate_sets,
    make_reference,
    reference_of_data,
)
from lungwatch.preprocess import golden_input
from lungwatch.training.data.dataset import LabelMap, dataset_name
from lungwatch.training.evaluation.scorers import OnnxScorer, model_digest


@dataclass(frozen=True, kw_only=True)
class RenewRequest:
    """Request of a bundle's renewal.

    Attributes
    ----------
    bundle
        Folder of the bundle.
    version
        Of the new bundle, "1.1.0".
    folder
        Where the new bundle's own folder is made.
    gate
        The content gate that it gets; None keeps the bundle's own, if it has one.
    data
        Data set of the training: its validation split gives the scale of the maps, and its
        validation and test splits are measured again.
    reference
        Data set of whose validation split the reference for drift is made; None keeps the
        bundle's own, if it has one.
    evaluate
        Further data sets whose test split is measured again.
    notes
        Markdown for the card, on the data and their confounds.
    figures
        Tables measured elsewhere; they come after those that the bundle has.
    release_gate
        What `lungwatch evaluate BUNDLE … --gate` wrote, for the card; None keeps the bundle's own,
        if it has one and keeps its content gate.
    replace
        Whether a bundle of the same version is replaced.
    labels
        What labels of the data sets mean that are no finding.
    """

    bundle: Path
    version: str
    folder: Path
    gate: GateRequest | None = None
    data: Path | None = None
    reference: Path | None = None
    evaluate: Sequence[Path] = ()
    notes: str = ""
    figures: FigureTables = field(default_factory=dict)
    release_gate: Path | None = None
    replace: bool = False
    labels: LabelMap | None = None

    def __post_init__(self) -> None:
        check_version(self.version)


def renew(
    request: RenewRequest, *, progress: Callable[[int], None] | None = None
) -> tuple[Path, ModelContract]:
    """Write a new version of a bundle, with the same network.

    Weights, calibration, thresholds and golden answers stay as they are. The graph gets the
    output `cam_peak`, the contract the present version.

    Returns
    -------
    folder, contract
        The new bundle's folder and what its model says about itself.

    Raises
    ------
    ModelError
        If the bundle is damaged, has another kind of graph, answers its golden picture otherwise
        than before, or the gate cannot be exported.
    ConfigError
        If the version or the target is not acceptable.
    DatasetError
        If images are missing, cannot be read, or are too few for a reference.
    MissingExtraError
        If a package of the extra 'train' is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("renewing a bundle", "train") from error

    files = read_bundle(request.bundle)
    files.check_digests()
    before = OnnxScorer(files.model, str(request.bundle)).contract
    model = add_peak_output(files.model)
    _check_same(files.model, model, before)

    gate_request = request.gate or (GateRequest(run=request.bundle) if before.gate else None)
    gate = export_gate(gate_request, progress=progress) if gate_request else None
    scorer = OnnxScorer(model, str(request.bundle))
    measured = evaluate_sets(
        scorer, request.data, request.evaluate, progress, labels=request.labels
    )
    drift = DriftReference.from_json(files.drift) if files.drift is not None else None
    if request.reference:
        drift = make_reference(
            scorer, gate, request.reference, labels=request.labels, progress=progress
        )
        if drift is None:
            raise DatasetError(
                f"{dataset_name(request.reference)}: too few pictures for a reference for drift "
                f"({LEAST_VALUES} that the gate accepts are needed)"
            )
    figures = {**before.metrics.get(FIGURES, {}), **request.figures}
    told: dict[str, Any] = {FIGURES: figures} if figures else {}
    kept = dict(before.metrics)
    if request.gate:
        # It was measured with the content gate that is replaced.
        kept.pop(RELEASE_GATE, None)
    if request.release_gate:
        told[RELEASE_GATE] = read_release_gate(request.release_gate)
        digest = model_digest(request.bundle)
        require_same_model(told[RELEASE_GATE], digest, str(request.bundle))
    map_reference = before.map_reference
    if request.data:
        map_reference = reference_of_data(scorer, request.data, request.labels)
    contract = replace(
        before,
        version=request.version,
        gate=gate.contract if gate else None,
        map_reference=map_reference,
        provenance={**before.provenance, "network_of": before.id},
        metrics={**measured, **kept, **measured, **told},
    )
    bundle = write_bundle(
        request.folder,
        model=with_contract(onnx.load_model_from_string(model), contract),
        contract=contract,
        card=write_card(contract, request.notes),
        gate=gate.onnx if gate else None,
        drift=drift,
        learnt=files.learnt,
        replace=request.replace,
    )
    return bundle, contract


def _check_same(before: bytes, after: bytes, contract: ModelContract) -> None:
    batch = golden_input(contract.preprocess)[np.newaxis]
    old, new = run_onnx(before, batch), run_onnx(after, batch)
    if differing := sorted(name for name in old if not np.array_equal(old[name], new[name])):
        raise ModelError(
            f"{contract.id} answers otherwise with its new output: {', '.join(differing)}"
        )

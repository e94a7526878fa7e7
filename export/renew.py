"""A bundle made anew around the same network: peaks of the maps, content gate, contract, card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lungwatch.bundle import read_bundle
from lungwatch.contract import ModelContract
from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.export.bundle import write_bundle
from lungwatch.export.card import write_card
from lungwatch.export.exporter import check_version, measure_sets
from lungwatch.export.figures import FIGURES, Figures
from lungwatch.export.gate import GateRequest, export_gate
from lungwatch.export.parity import run_onnx
from lungwatch.export.peaks import add_peak_output, reference_of_data
from lungwatch.export.to_onnx import with_contract
from lungwatch.golden import golden_input
from lungwatch.training.scorers import OnnxScorer


@dataclass(frozen=True, kw_only=True)
class RenewRequest:
    """Which bundle to renew, and what it gets.

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
        validation and test splits are measured anew.
    evaluate
        Further data sets whose test split is measured anew.
    notes
        Markdown for the card, on the data and their confounds.
    figures
        Tables measured elsewhere; they come after those that the bundle has.
    replace
        Whether a bundle of the same version is replaced.
    """

    bundle: Path
    version: str
    folder: Path
    gate: GateRequest | None = None
    data: Path | None = None
    evaluate: Sequence[Path] = ()
    notes: str = ""
    figures: Figures = field(default_factory=dict)
    replace: bool = False

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
        If images are missing or cannot be read.
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
    measured = measure_sets(scorer, request.data, request.evaluate, progress)
    figures = {**before.metrics.get(FIGURES, {}), **request.figures}
    told = {FIGURES: figures} if figures else {}
    reference = before.map_reference
    if request.data:
        reference = reference_of_data(scorer, request.data)
    contract = replace(
        before,
        version=request.version,
        gate=gate.contract if gate else None,
        map_reference=reference,
        provenance={**before.provenance, "network_of": before.id},
        metrics={**measured, **before.metrics, **measured, **told},
    )
    bundle = write_bundle(
        request.folder,
        model=with_contract(onnx.load_model_from_string(model), contract),
        contract=contract,
        card=write_card(contract, request.notes),
        gate=gate.onnx if gate else None,
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

"""Export of a trained content gate: `gate.onnx` and its section of the contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.bundle import GATE_FILE, read_bundle
from lungwatch.contract import INPUT
from lungwatch.errors import DatasetError, ModelError
from lungwatch.export.fidelity import check_size
from lungwatch.export.gate_graph import gate_to_onnx, look_with_onnx, with_scores
from lungwatch.export.int8 import count_quantised
from lungwatch.export.quantise import describe_quantisation, quantise, spread
from lungwatch.gate import GATE_LUNGS, GATE_SCORES, GateContract, Verdict
from lungwatch.golden import golden_input
from lungwatch.preprocess import PreprocessSpec
from lungwatch.training.dataset import dataset_name, load_dataset, of_split
from lungwatch.training.foreign import KerasModel
from lungwatch.training.gate_checks import (
    Familiarity,
    GateLook,
    GateThresholds,
    check_losses,
    choose_thresholds,
    exposures,
)
from lungwatch.training.gate_images import GateXray, draw_batch
from lungwatch.training.gate_network import LUNGS_CELL_PX, answering_network, look_with
from lungwatch.training.gate_rates import (
    AS_IS,
    VARIANTS,
    Looked,
    image_files,
    look_at,
    rates,
)
from lungwatch.training.pixels import FloatArray, read_pixels
from lungwatch.training.run import RunFolder
from lungwatch.training.samples import Sample
from lungwatch.training.scorers import OnnxScorer, load_keras, onnx_session

MAX_MB = 3.0
KEPT, REFUSED = "kept", "refused"

_PARITY_IMAGES = 32
_PARITY_LIMIT = 1e-4
# Beside the training images, which are upright chests all: the activations of what is none.
_DRAWN_FOR_RANGES = 100
# int8 arithmetic differs between processors; a score on a slope differs by more than a float's.
_TOLERANCE = 0.05
_OF_CONFIG = ("family", "fit", "data", "backend", "pictures")


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """Which gate to export.

    Attributes
    ----------
    run
        A run folder of `lungwatch train gate`; or a bundle, whose gate is taken over as it is.
    data
        Data set of the training; a bundle's gate needs none. Its training split shows the
        activations' range and what is familiar, its validation split chooses the thresholds,
        its validation and test split measure.
    keep
        Further folders of upright frontal chest X-rays to measure on, as they are, turned and
        inverted.
    refuse
        Folders of pictures that are none, to measure on.
    """

    run: Path
    data: Path | None = None
    keep: Sequence[Path] = ()
    refuse: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedGate:
    """A gate, ready for a bundle.

    Attributes
    ----------
    onnx
        The bytes of `gate.onnx`.
    contract
        What the bundle's contract says of it.
    """

    onnx: bytes
    contract: GateContract


def export_gate(
    request: GateRequest, *, progress: Callable[[int], None] | None = None
) -> ExportedGate:
    """Convert a gate, quantise it, choose its thresholds and measure it.

    Thresholds follow the rule of `lungwatch.training.gate_checks`, on the int8 graph's own
    answers; distances are from the int8 graph's own embeddings of the training images.

    Parameters
    ----------
    request
        What to export.
    progress
        Called with 1 for every image read.

    Raises
    ------
    ModelError
        If the graph differs from the network, is larger than 3 MB, or refuses more than 2 % of
        the validation images.
    NotFoundError
        If there is no finished run.
    DatasetError
        If images are missing or cannot be read.
    MissingExtraError
        If TensorFlow or onnx is not installed.
    """
    if (request.run / GATE_FILE).is_file():
        return _of_bundle(request.run)
    if request.data is None:
        raise DatasetError(
            "exporting a gate needs the data set of its training (--data): it chooses the "
            "thresholds and shows what is familiar"
        )
    run = RunFolder(root=request.run)
    config, measured = run.read("config.json"), run.read("metrics.json")
    spec = PreprocessSpec.from_dict(config["preprocess"])
    model = load_keras(run.model)
    name, samples = dataset_name(request.data), load_dataset(request.data)
    left_out = config["data"].get("left_out") or []
    kept = [sample for sample in samples if sample.source not in left_out]
    train_samples = of_split(kept, "train", name)
    train = read_pixels(train_samples, spec, progress=progress)
    val = read_pixels(of_split(kept, "val", name), spec, progress=progress)

    plain = gate_to_onnx(model)
    plain_session = onnx_session(plain.SerializeToString(), "the exported gate")
    parity = _parity(model, lambda pixels: look_with_onnx(plain_session, pixels), val)
    shown = spread(train_samples)
    places = {sample.path: index for index, sample in enumerate(train_samples)}
    ranges = train[[places[sample.path] for sample in shown]]
    shown_pixels = np.concatenate([ranges, _drawn(ranges, spec)])
    int8 = quantise(plain, shown_pixels, symbolic_shapes=False, narrow_weights=True)
    session = onnx_session(int8.SerializeToString(), "the int8 gate")

    looked = look_with_onnx(session, train)
    familiarity, looked_val = Familiarity.of(looked.embedding), look_with_onnx(session, val)
    exposed = [look_with_onnx(session, pixels) for pixels in exposures(val)]
    thresholds = choose_thresholds(looked, looked_val, exposed, familiarity)
    check_losses(thresholds.scores(looked_val, familiarity), thresholds.checks())
    data = with_scores(int8, familiarity, thresholds).SerializeToString()
    check_size(len(data), MAX_MB)

    contract = _contract(data, thresholds, spec)
    quantisation = {
        **describe_quantisation(shown, narrow_weights=True),
        "drawn": _DRAWN_FOR_RANGES,
        "convolutions": count_quantised(int8.graph.node),
        "bytes_float": len(plain.SerializeToString()),
        "bytes_int8": len(data),
        "chance_mean": _mean_difference(look_with_onnx(plain_session, val), looked_val),
    }
    contract = replace(
        contract,
        provenance={
            **{key: config[key] for key in _OF_CONFIG if key in config},
            "parameters": measured["parameters"],
            "thresholds": thresholds.to_dict(),
            "parity": parity,
            "quantisation": quantisation,
        },
        metrics={
            "rates": [
                *_rates_of_splits(OnnxGate(data, contract), request.data, kept, progress),
                *_rates_of_folders(OnnxGate(data, contract), request, progress),
            ]
        },
    )
    return ExportedGate(onnx=data, contract=contract)


def _of_bundle(folder: Path) -> ExportedGate:
    files = read_bundle(folder)
    files.check_digests()
    contract = OnnxScorer(files.model, str(folder)).contract.gate
    if contract is None or files.gate is None:
        raise ModelError(f"{folder}: the model's contract says nothing of a content gate")
    return ExportedGate(onnx=files.gate, contract=contract)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    verdict: Verdict
    lungs: NDArray[np.float32]


class OnnxGate:
    """An exported gate with its contract, for measuring."""

    def __init__(self, data: bytes, contract: GateContract) -> None:
        self._session = onnx_session(data, "the exported gate")
        self.contract = contract

    def run(self, batch: FloatArray) -> Sequence[_Answer]:
        """See `lungwatch.training.gate_rates.Gate`."""
        scores, lungs = self._session.run([GATE_SCORES, GATE_LUNGS], {INPUT: batch})
        return [
            _Answer(verdict=self.contract.verdict([float(one) for one in row]), lungs=field)
            for row, field in zip(scores, lungs, strict=True)
        ]


def _contract(data: bytes, thresholds: GateThresholds, spec: PreprocessSpec) -> GateContract:
    session = onnx_session(data, "the exported gate")
    scores, lungs = session.run([GATE_SCORES, GATE_LUNGS], {INPUT: golden_input(spec)[np.newaxis]})
    return GateContract(
        preprocess=spec,
        checks=thresholds.checks(),
        lungs_side_px=int(lungs.shape[-1]),
        lung_area=thresholds.lung_area,
        golden_scores=tuple(round(float(score), 6) for score in scores[0]),
        golden_lung_area=round(float((lungs[0] >= 0.5).mean()), 6),
        tolerance=_TOLERANCE,
    )


def _parity(
    model: KerasModel, exported: Callable[[FloatArray], GateLook], pixels: FloatArray
) -> dict[str, Any]:
    """Hold the float graph against the Keras network.

    Raises
    ------
    ModelError
        If a chance or a cell of the lungs differs by more than 1e-4.
    """
    few = pixels[:: max(1, len(pixels) // _PARITY_IMAGES)][:_PARITY_IMAGES]
    ours, theirs = exported(few), look_with(answering_network(model), few)
    found = {
        "images": len(few),
        "chances": float(np.abs(ours.chances - theirs.chances).max()),
        "lungs": float(np.abs(ours.lungs - theirs.lungs).max()),
        "embedding": float(np.abs(ours.embedding - theirs.embedding).max()),
    }
    if not max(found["chances"], found["lungs"]) <= _PARITY_LIMIT:  # a NaN must not pass
        raise ModelError(
            f"the exported gate differs from its network: chances by {found['chances']:.1e}, lungs "
            f"by {found['lungs']:.1e}, the limit is {_PARITY_LIMIT:.0e}"
        )
    return found


def _mean_difference(plain: GateLook, int8: GateLook) -> float:
    return round(float(np.abs(plain.chances - int8.chances).mean()), 6)


def _drawn(pixels: FloatArray, spec: PreprocessSpec) -> FloatArray:
    """Draw pictures as in training from preprocessed X-rays, turned and inverted ones too."""
    xrays = [GateXray(pixels=np.round(one[:, :, 0] * 255.0).astype(np.uint8)) for one in pixels]
    side = spec.size_px // LUNGS_CELL_PX
    return draw_batch(xrays, _DRAWN_FOR_RANGES, spec, side, np.random.default_rng(0)).pixels


def _rates_of_splits(
    gate: OnnxGate,
    data: Path,
    samples: Sequence[Sample],
    progress: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """Measure on a data set's validation and test split: whole, turned, inverted, by source."""
    name, rows = dataset_name(data), []
    root = data if data.is_dir() else data.parent
    for split in ("val", "test"):
        chosen = {str(s.path.relative_to(root)): s for s in samples if s.split == split}
        if not chosen:
            continue
        files = [sample.path for sample in chosen.values()]
        looked = look_at(gate, root, files, variants=tuple(VARIANTS), progress=progress)
        whole = f"{name}/{split}"
        rows += _rows([replace(one, folder=whole) for one in looked], as_is=KEPT)
        by_source = [
            replace(one, folder=f"{whole}, {chosen[one.file].source or 'unknown'}")
            for one in looked
            if one.variant == AS_IS
        ]
        rows += _rows(sorted(by_source, key=lambda one: one.folder), as_is=KEPT)
    return rows


def _rates_of_folders(
    gate: OnnxGate, request: GateRequest, progress: Callable[[int], None] | None
) -> list[dict[str, Any]]:
    """Measure on the folders that the request names."""
    rows = []
    for folder in request.keep:
        files, whole = image_files(folder), folder.resolve().name
        looked = look_at(gate, folder, files, variants=tuple(VARIANTS), progress=progress)
        rows += _rows([one for one in looked if one.variant == AS_IS], as_is=KEPT)
        copies = [replace(one, folder=whole) for one in looked if one.variant != AS_IS]
        rows += _rows(copies, as_is=KEPT)
    for folder in request.refuse:
        looked = look_at(gate, folder, image_files(folder), progress=progress)
        rows += _rows(looked, as_is=REFUSED)
    return rows


def _rows(looked: Sequence[Looked], *, as_is: str) -> list[dict[str, Any]]:
    """Count by folder and copy; what becomes of a copy that is turned or inverted is clear."""
    return [
        {
            "pictures_of": rate.folder,
            "copies": rate.variant,
            "expected": as_is if rate.variant == AS_IS else REFUSED,
            "pictures": rate.pictures,
            "kept": rate.kept,
            "refused": {**rate.refused_by_reader, **rate.refused_by_gate},
        }
        for rate in rates(looked)
        if rate.folder != "all"
    ]

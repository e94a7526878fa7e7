"""Export of a trained content gate: ONNX graph, thresholds, rates and section of the contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungwatch.bundle import GATE_FILE, read_bundle
from lungwatch.contract import GATE_LUNGS, GATE_SCORES, INPUT, GateContract, Verdict
from lungwatch.errors import DatasetError, MissingExtraError, ModelError
from lungwatch.export.graph import OPSET
from lungwatch.export.quantise import (
    check_size,
    count_quantised,
    describe_quantisation,
    quantise,
    spread,
)
from lungwatch.preprocess import PreprocessSpec, golden_input
from lungwatch.training.data.dataset import LabelMap, Sample, dataset_name, load_dataset, of_split
from lungwatch.training.data.gate_images import GateXray, draw_batch
from lungwatch.training.data.pixels import (
    FloatArray,
    KerasModel,
    OnnxProto,
    OnnxSession,
    Tensor,
    read_pixels,
)
from lungwatch.training.evaluation.gate_rates import (
    AS_IS,
    LEAST_LUNGS,
    VARIANTS,
    Familiarity,
    GateOutcome,
    GateOutput,
    GateThresholds,
    check_losses,
    choose_thresholds,
    exposures,
    gate_outcomes,
    image_files,
    rates,
)
from lungwatch.training.evaluation.scorers import OnnxScorer, onnx_session
from lungwatch.training.fitting.run import RunFolder, prepare_tensorflow
from lungwatch.training.networks.lungs import (
    CHANCES,
    EMBEDDING,
    LUNGS_CELL_PX,
    gate_output_network,
    gate_outputs,
)
from lungwatch.training.networks.weights import load_keras

_AT_ONCE = 32
MAX_MB = 3.0
KEPT, REFUSED = "kept", "refused"
_PARITY_IMAGES = 32
_PARITY_LIMIT = 1e-4
# Beside the training images, which are upright chests all: the activations of what is none.
_DRAWN_FOR_RANGES = 100
# int8 arithmetic differs between processors; a score on a slope differs by more than a float's.
_TOLERANCE = 0.05
_OF_CONFIG = ("family", "fit", "data", "backend", "pictures")


def gate_to_onnx(model: KerasModel) -> OnnxProto:
    """Convert a gate's network, without the scores that need fitting.

    Returns
    -------
    onnx.ModelProto
        From `pixels`, float32 (N, S, S, 1), 0..1, to `chances`, `embedding` and `lungs`, as
        `lungwatch.training.networks.lungs.gate_output_network` gives them.

    Raises
    ------
    ModelError
        If the conversion lost an output.
    MissingExtraError
        If TensorFlow or tf2onnx is not installed.
    """
    prepare_tensorflow()
    try:
        import tensorflow as tf
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError("exporting", "train") from error

    answering = gate_output_network(model)
    size = int(model.input_shape[1])
    signature = [tf.TensorSpec((None, size, size, 1), tf.float32, name=INPUT)]

    def graph(pixels: Tensor) -> dict[str, Tensor]:
        return dict(answering(pixels, training=False))

    # `from_keras` does not know Keras 3 (tensorflow-onnx #2329).
    proto, _ = tf2onnx.convert.from_function(
        tf.function(graph, input_signature=signature), input_signature=signature, opset=OPSET
    )
    names = {output.name for output in proto.graph.output}
    if names != {CHANCES, EMBEDDING, GATE_LUNGS}:
        raise ModelError(f"the conversion of the gate gave the outputs {sorted(names)}")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def look_with_onnx(session: OnnxSession, pixels: FloatArray) -> GateOutput:
    """Ask such a graph about preprocessed pictures, (N, S, S, 1), 0..1."""
    names = [CHANCES, EMBEDDING, GATE_LUNGS]
    parts = np.array_split(pixels, max(1, -(-len(pixels) // _AT_ONCE)))
    found = [session.run(names, {INPUT: part}) for part in parts]
    chances, embedding, lungs = (np.concatenate(column) for column in zip(*found, strict=True))
    return GateOutput(chances=chances, embedding=embedding, lungs=lungs)


def with_scores(
    proto: OnnxProto, familiarity: Familiarity, thresholds: GateThresholds
) -> OnnxProto:
    """Add the scores to a converted gate, and leave only what the gate's contract promises.

    Parameters
    ----------
    proto
        Of `gate_to_onnx`, quantised or not; left as it is.
    familiarity, thresholds
        What the distance and its score are made of.

    Returns
    -------
    onnx.ModelProto
        With the outputs `scores` and `lungs`; see `lungwatch.contract`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph

    def constant(name: str, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"gate_{name}"))
        return f"gate_{name}"

    def number(name: str, value: float) -> str:
        return constant(name, np.array(value, np.float32))

    def node(
        kind: str,
        name: str,
        *inputs: str,
        **attributes: Any,  # noqa: ANN401 - onnx's own
    ) -> str:
        output = f"gate_{name}"
        graph.node.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    centred = node("Sub", "centred", EMBEDDING, constant("mean", familiarity.mean))
    along = node("MatMul", "along", centred, constant("axes", familiarity.axes))
    distance = node(
        "ReduceSum",
        "distance",
        node("Mul", "squares", along, along),
        constant("columns", np.array([1], np.int64)),
        keepdims=1,
    )
    ratio = node("Div", "ratio", distance, number("furthest", thresholds.distance))
    square = node("Mul", "ratio_2", ratio, ratio)
    fourth = node("Mul", "ratio_4", square, square)
    familiar = node("Reciprocal", "familiar", node("Add", "ratio_4_1", fourth, number("one", 1.0)))

    is_lung = node("GreaterOrEqual", "is_lung", GATE_LUNGS, number("half", 0.5))
    cells = node("Cast", "cells", is_lung, to=TensorProto.FLOAT)
    area = node("ReduceMean", "area", cells, axes=[1, 2], keepdims=0)
    column = node(
        "Reshape", "area_column", area, constant("as_column", np.array([-1, 1], np.int64))
    )
    enough = node("Mul", "enough", column, number("per_area", 1.0 / (2 * LEAST_LUNGS)))
    lungs = node("Clip", "lungs_score", enough, number("least", 0.0), number("most", 1.0))

    graph.node.append(
        helper.make_node("Concat", [CHANCES, lungs, familiar], [GATE_SCORES], GATE_SCORES, axis=1)
    )
    kept = [output for output in graph.output if output.name == GATE_LUNGS]
    count = len(thresholds.checks())
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(GATE_SCORES, TensorProto.FLOAT, ["batch", count])
    )
    graph.output.extend(kept)
    onnx.checker.check_model(made)
    return made


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """Request of a gate's export.

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
    labels
        What labels of `data` mean that are no finding.
    """

    run: Path
    data: Path | None = None
    keep: Sequence[Path] = ()
    refuse: Sequence[Path] = ()
    labels: LabelMap | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedGate:
    """A gate, ready for a bundle.

    Attributes
    ----------
    onnx
        The bytes of `gate.onnx`.
    contract
        Its section of the bundle's contract.
    """

    onnx: bytes
    contract: GateContract


def export_gate(
    request: GateRequest, *, progress: Callable[[int], None] | None = None
) -> ExportedGate:
    """Convert a gate, quantise it, choose its thresholds and measure it.

    Thresholds follow the rule of `training.evaluation.gate_rates`, on the int8 graph's own
    answers; distances are from the int8 graph's own embeddings of the training images.

    Parameters
    ----------
    request
        What to export.

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
    name, samples = dataset_name(request.data), load_dataset(request.data, request.labels)
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

    outcomes = look_with_onnx(session, train)
    familiarity, val_outputs = Familiarity.of(outcomes.embedding), look_with_onnx(session, val)
    exposed = [look_with_onnx(session, pixels) for pixels in exposures(val)]
    thresholds = choose_thresholds(outcomes, val_outputs, exposed, familiarity)
    check_losses(thresholds.scores(val_outputs, familiarity), thresholds.checks())
    data = with_scores(int8, familiarity, thresholds).SerializeToString()
    check_size(len(data), MAX_MB)

    contract = _contract(data, thresholds, spec)
    quantisation = {
        **describe_quantisation(shown, narrow_weights=True),
        "drawn": _DRAWN_FOR_RANGES,
        "convolutions": count_quantised(int8.graph.node),
        "bytes_float": len(plain.SerializeToString()),
        "bytes_int8": len(data),
        "chance_mean": _mean_difference(look_with_onnx(plain_session, val), val_outputs),
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
        """See `lungwatch.training.evaluation.gate_rates.Gate`."""
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
    model: KerasModel, exported: Callable[[FloatArray], GateOutput], pixels: FloatArray
) -> dict[str, Any]:
    """Hold the float graph against the Keras network.

    Raises
    ------
    ModelError
        If a chance or a cell of the lungs differs by more than 1e-4.
    """
    few = pixels[:: max(1, len(pixels) // _PARITY_IMAGES)][:_PARITY_IMAGES]
    ours, theirs = exported(few), gate_outputs(gate_output_network(model), few)
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


def _mean_difference(plain: GateOutput, int8: GateOutput) -> float:
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
        outcomes = gate_outcomes(gate, root, files, variants=tuple(VARIANTS), progress=progress)
        whole = f"{name}/{split}"
        rows += _rows([replace(one, folder=whole) for one in outcomes], as_is=KEPT)
        by_source = [
            replace(one, folder=f"{whole}, {chosen[one.file].source or 'unknown'}")
            for one in outcomes
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
        outcomes = gate_outcomes(gate, folder, files, variants=tuple(VARIANTS), progress=progress)
        rows += _rows([one for one in outcomes if one.variant == AS_IS], as_is=KEPT)
        copies = [replace(one, folder=whole) for one in outcomes if one.variant != AS_IS]
        rows += _rows(copies, as_is=KEPT)
    for folder in request.refuse:
        outcomes = gate_outcomes(gate, folder, image_files(folder), progress=progress)
        rows += _rows(outcomes, as_is=REFUSED)
    return rows


def _rows(outcomes: Sequence[GateOutcome], *, as_is: str) -> list[dict[str, Any]]:
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
        for rate in rates(outcomes)
        if rate.folder != "all"
    ]

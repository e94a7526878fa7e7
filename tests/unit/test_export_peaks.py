"""A graph tells its maps' peaks, and telling them changes nothing else."""

from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lungwatch.contract import CAM, CAM_PEAK, INPUT, METADATA_KEY, OUTPUTS
from lungwatch.errors import ModelError
from lungwatch.export.graph import synthetic_images
from lungwatch.export.references import add_peak_output, map_reference
from lungwatch.models import SHIPPED_DEFAULT
from lungwatch.training.evaluation.scorers import OnnxScorer

MODELS = Path(str(resources.files("lungwatch.models")))
SHIPPED = sorted(path.parent.name for path in MODELS.glob("*/model.onnx"))


def session(data: bytes):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        data, sess_options=options, providers=["CPUExecutionProvider"]
    )


def without_peaks(data: bytes) -> bytes:
    """The file as it was before graphs told their peaks."""
    graph = (proto := onnx.load_model_from_string(data)).graph
    (output,) = [output for output in graph.output if output.name == CAM_PEAK]
    graph.output.remove(output)
    reshape, concat = graph.node[-1], graph.node[-2]
    assert reshape.output[0] == CAM_PEAK
    assert concat.output[0] == reshape.input[0]
    for node in (reshape, concat):
        graph.node.remove(node)
    (shape,) = [one for one in graph.initializer if one.name == reshape.input[1]]
    graph.initializer.remove(shape)
    return proto.SerializeToString()


def with_raw_maps(data: bytes) -> tuple[bytes, list[str]]:
    """The file with the maps before their division as further outputs."""
    proto = onnx.load_model_from_string(data)
    made_by = {name: node for node in proto.graph.node for name in node.output}
    names = []
    for unsqueezed in made_by[CAM].input:
        raw = made_by[made_by[unsqueezed].input[0]].input[0]
        names.append(raw)
        proto.graph.output.append(helper.make_tensor_value_info(raw, TensorProto.FLOAT, None))
    return proto.SerializeToString(), names


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    data = (MODELS / request.param / "model.onnx").read_bytes()
    scorer = OnnxScorer(data)
    return without_peaks(data), synthetic_images(scorer.judgement.preprocess, count=6)


def test_all_other_outputs_stay_the_same_bit_for_bit(shipped):
    before, images = shipped
    after = add_peak_output(before)
    old = session(before).run(list(OUTPUTS), {INPUT: images})
    new = session(after).run(list(OUTPUTS), {INPUT: images})
    for name, one, other in zip(OUTPUTS, old, new, strict=True):
        assert one.tobytes() == other.tobytes(), name
    assert len(after) - len(before) < 1000


def test_weights_nodes_and_contract_are_untouched(shipped):
    before, _ = shipped
    old, new = (onnx.load_model_from_string(data) for data in (before, add_peak_output(before)))
    old_nodes, new_nodes = (
        [node.SerializeToString() for node in proto.graph.node] for proto in (old, new)
    )
    assert [node for node in new_nodes if node not in set(old_nodes)] == new_nodes[-2:]
    assert {one.SerializeToString() for one in old.graph.initializer} <= {
        one.SerializeToString() for one in new.graph.initializer
    }
    (old_contract, new_contract) = (
        next(entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY)
        for proto in (old, new)
    )
    assert old_contract == new_contract


def test_map_times_peak_is_the_evidence_before_it_was_scaled(shipped):
    before, images = shipped
    data, raw_names = with_raw_maps(add_peak_output(before))
    cam, peak, *raw = session(data).run([CAM, CAM_PEAK, *raw_names], {INPUT: images})
    assert peak.shape == (len(images), 2)
    assert peak.dtype == np.float32
    evidence = np.stack(raw, axis=1)
    np.testing.assert_array_equal(peak, evidence.max(axis=(2, 3)))
    np.testing.assert_allclose(cam * peak[:, :, None, None], evidence, rtol=3e-7, atol=0)
    assert (peak > 0).any(axis=1).all()


def test_a_graph_that_tells_them_already_is_returned_as_it_is(shipped):
    once = add_peak_output(shipped[0])
    assert add_peak_output(once) == once


def test_weaker_evidence_has_a_lower_peak(shipped):
    """Unlike scaled maps, peaks tell an image with little evidence from one with much."""
    before, images = shipped
    scorer = OnnxScorer(add_peak_output(before))
    peaks, maps = scorer.peaks(images), scorer.maps(images)
    assert peaks.shape == (len(images), 2)
    for index in range(2):
        there = maps[:, index].max(axis=(1, 2)) > 0
        assert (peaks[there, index] > 0).all()
        assert (peaks[~there, index] == 0).all()


@pytest.mark.parametrize("spoil", ["no file", "no maps", "other scaling"])
def test_what_is_not_lungwatchs_graph_is_refused(shipped, spoil):
    proto = onnx.load_model_from_string(shipped[0])
    if spoil == "no maps":
        next(output for output in proto.graph.output if output.name == CAM).name = "else"
        for node in proto.graph.node:
            node.output[:] = ["else" if name == CAM else name for name in node.output]
    elif spoil == "other scaling":
        next(node for node in proto.graph.node if node.op_type == "ReduceMax").op_type = "ReduceSum"
    data = b"\x00nothing" if spoil == "no file" else proto.SerializeToString()
    with pytest.raises(ModelError):
        add_peak_output(data)


class Fixed:
    """A scorer with given logits and peaks, one an image."""

    def __init__(self, judgement, logits, peaks):
        self.judgement = judgement
        self._logits, self._peaks = np.array(logits), np.array(peaks, np.float32)

    def logits(self, pixels):
        return self._logits[pixels[:, 0, 0, 0].astype(int)]

    def peaks(self, pixels):
        return self._peaks[pixels[:, 0, 0, 0].astype(int)]


def test_the_reference_is_of_the_images_called_covid_alone():
    judgement = OnnxScorer((MODELS / SHIPPED_DEFAULT / "model.onnx").read_bytes()).judgement
    numbers = np.arange(103, dtype=np.float32).reshape(-1, 1, 1, 1)
    logits = [9.0] * 101 + [-9.0, -9.0]
    peaks = [[7.0, float(n)] for n in range(101)] + [[1.0, 5000.0], [1.0, 6000.0]]
    assert map_reference(Fixed(judgement, logits, peaks), numbers) == 95.0
    assert map_reference(Fixed(judgement, [-9.0] * 103, peaks), numbers) is None
    empty = [[1.0, 0.0]] * 103
    assert map_reference(Fixed(judgement, logits, empty), numbers) is None

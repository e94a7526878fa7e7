"""The content gate is loaded as part of its bundle, and refuses by its contract's thresholds."""

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lungwatch.attributes import RadiographMeta
from lungwatch.bundle import read_bundle
from lungwatch.cli.main import main
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.pipeline.gate import ContentGate, GateRefused
from lungwatch.daemon.pipeline.model import Classifier
from lungwatch.daemon.pipeline.pipeline import classify
from lungwatch.daemon.pipeline.records import Claimed, Prepared
from lungwatch.errors import Flag, ModelError, Reason
from lungwatch.models import SHIPPED_DEFAULT

pytest.importorskip("onnx")
gated = pytest.importorskip("tests.support.bundles")
META = RadiographMeta(
    format="PNG", rows=64, columns=64, bits_stored=8, photometric="MONOCHROME2", patient_id="P1"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    shipped = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT
    return gated.gated_bundle(shipped, tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture(scope="module")
def classifier(made):
    return Classifier.load(made, threads=1)


def prepared(classifier, grey: float, number: int = 1, *, shape=(64, 64)) -> Prepared:
    """A picture of one grey value, with a dark left half where the gate looks for lungs."""
    size = classifier.contract.preprocess.size_px
    return Prepared(
        claim=Claimed(
            result_id=number,
            image_id=number,
            sha256=f"{number:064x}",
            path=Path("x"),
            file=OwnedFile.open(Path("/dev/null")),
            attempt=1,
            received_at=datetime.now(UTC),
            started_s=0.0,
        ),
        meta=META,
        tensor=np.full((size, size, 1), grey, np.float32),
        preview=np.zeros((1, 1), np.uint8),
        shape=shape,
        gate_tensor=np.full((64, 64, 1), grey, np.float32),
    )


class TestBundle:
    def test_gate_and_model_are_loaded_together(self, classifier):
        assert [one.name for one in classifier.gate.contract.checks] == ["frontal", "positive"]

    def test_a_described_gate_that_is_missing_is_refused_by_name(self, bundle):
        (bundle / "gate.onnx").unlink()
        with pytest.raises(ModelError, match=r"gate\.onnx is not the file|gate\.onnx is missing"):
            Classifier.load(bundle)
        gated.write(bundle, {})
        with pytest.raises(ModelError, match=r"gate\.onnx is missing: .* describes a content gate"):
            Classifier.load(bundle)

    def test_a_gate_that_nobody_described_is_refused_by_name(self, bundle, tmp_path):
        shipped = Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT
        copy = gated.gateless_bundle(shipped, tmp_path)
        shutil.copy(bundle / "gate.onnx", copy)
        with pytest.raises(ModelError, match=r"gate\.onnx is not of this bundle"):
            Classifier.load(copy)
        gated.write(copy, {}, name="gateless")
        with pytest.raises(ModelError, match=r"gate\.onnx of which the model's contract says no"):
            Classifier.load(copy)

    def test_an_altered_gate_is_refused(self, bundle):
        data = bytearray((bundle / "gate.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / "gate.onnx").write_bytes(data)
        with pytest.raises(ModelError, match=r"gate\.onnx is not the file .*SHA-256 differs"):
            Classifier.load(bundle)

    def test_the_statement_has_a_fourth_line_for_a_gate_and_is_as_before_without(self, bundle):
        files = read_bundle(bundle)
        lines = files.statement().decode().splitlines()
        digest = hashlib.sha256((bundle / "gate.onnx").read_bytes()).hexdigest()
        assert lines[0] == "lungwatch model bundle 2"
        assert [line.split()[0] for line in lines[1:]] == [
            *("bundle.json", "model.onnx", "card.md", "gate.onnx"),
        ]
        assert lines[4] == f"gate.onnx {digest}"
        without = replace(files, gate=None).statement().decode().splitlines()
        assert without == ["lungwatch model bundle 1", *lines[1:4]]

    def test_a_reference_for_drift_is_listed_signed_and_of_the_model(self, bundle):
        files = read_bundle(bundle)
        gated.write(bundle, {"drift.json": b"{}"})
        with_drift = read_bundle(bundle)
        lines = with_drift.statement().decode().splitlines()
        assert lines[0] == "lungwatch model bundle 3"
        assert [line.split()[0] for line in lines[4:]] == ["gate.onnx", "drift.json"]
        assert lines[5] == f"drift.json {hashlib.sha256(b'{}').hexdigest()}"
        gateless = replace(with_drift, gate=None).statement().decode().splitlines()
        assert gateless[4] == "gate.onnx none"
        with pytest.raises(ModelError, match=r"drift\.json is not understood"):
            Classifier.load(bundle)
        (bundle / "drift.json").write_bytes(b"[]")
        with pytest.raises(ModelError, match=r"drift\.json is not the file .*SHA-256 differs"):
            Classifier.load(bundle)
        (bundle / "bundle.json").write_bytes(files.about)
        with pytest.raises(ModelError, match=r"drift\.json is not of this bundle"):
            Classifier.load(bundle)

    def test_a_signature_over_a_gated_bundle_is_worth_nothing_without_the_gate(self, bundle):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from lungwatch.daemon.pipeline.model import BundlePolicy
        from lungwatch.signing import fingerprint, sign

        key = Ed25519PrivateKey.generate()
        trust = BundlePolicy(keys={fingerprint(key.public_key()): key.public_key()})
        signature = sign(read_bundle(bundle).statement(), key).to_bytes()
        (bundle / "bundle.sig").write_bytes(signature)
        assert Classifier.load(bundle, trust=trust).gate is not None
        (bundle / "gate.onnx").unlink()
        with pytest.raises(ModelError, match="its signature is not of these files"):
            Classifier.load(bundle, trust=trust)

    def test_the_commands_on_models_tell_of_the_gate(self, bundle, tmp_path):
        run = CliRunner()
        said = run.invoke(main, ["model", "verify", str(bundle)]).stdout
        assert "; content gate: frontal from 0.200, positive from 0.200; drift reference" in said
        told = json.loads(run.invoke(main, ["model", "verify", str(bundle), "--json"]).stdout)
        assert told["gate"] == ["frontal", "positive"]
        shown = json.loads(run.invoke(main, ["model", "show", str(bundle), "--json"]).stdout)
        assert shown["gate"]["checks"][1] == {
            "name": "positive",
            "threshold": 0.2,
            "reason": "inverted",
        }
        assert '"reason": "inverted"' in run.invoke(main, ["model", "show", str(bundle)]).stdout
        without = gated.gateless_bundle(bundle, tmp_path)
        assert "no content gate" in run.invoke(main, ["model", "verify", str(without)]).stdout


class TestLoading:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"golden_scores": (0.9, 0.1)}, "score for 'frontal' of .* instead of 0.9000"),
            ({"golden_lung_area": 0.01}, "lung area of .* instead of 0.0100"),
            ({"lungs_side_px": 8}, r"shapes \(1, 2\) and \(1, 16, 16\), not those"),
        ],
    )
    def test_an_answer_that_is_not_the_recorded_one_is_refused(self, change, message):
        data = gated.gate_graph()
        contract = replace(gated.gate_contract(data), **change)
        with pytest.raises(ModelError, match=message):
            ContentGate.of(data, contract, Path("b"))

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ({"outputs": ("scores", "other")}, "not pixels and scores, lungs"),
            ({"columns": 1}, r"shapes \(1, 1\) and"),
        ],
    )
    def test_a_graph_that_is_not_what_the_contract_says_is_refused(self, made, message):
        contract = gated.gate_contract(gated.gate_graph())
        with pytest.raises(ModelError, match=message):
            ContentGate.of(gated.gate_graph(**made), contract, Path("b"))

    def test_a_file_that_is_no_graph_is_refused(self):
        contract = gated.gate_contract(gated.gate_graph())
        with pytest.raises(ModelError, match=r"b/gate\.onnx is not a model that can be run"):
            ContentGate.of(b"nothing", contract, Path("b"))


class TestInference:
    def test_what_fails_is_refused_with_check_score_and_threshold_and_the_rest_is_scored(
        self, classifier
    ):
        ended = []
        items = [prepared(classifier, grey, n) for n, grey in enumerate((0.05, 0.5, 0.95), 1)]
        done = classify(items, classifier, lambda item, error: ended.append((item, error)))
        assert [one.prepared.claim.result_id for one in done] == [2]
        assert done[0].gate.verdict.reason is None
        assert done[0].gate.verdict.score == pytest.approx(0.5)
        assert done[0].gate.lungs.shape == (16, 16)
        (first, dark), (third, bright) = ended
        assert (first.claim.result_id, third.claim.result_id) == (1, 3)
        assert isinstance(dark, GateRefused)
        assert (dark.reason, bright.reason) == (Reason.NOT_FRONTAL_CHEST, Reason.INVERTED)
        assert str(dark).startswith(
            "content gate: 'frontal' scores 0.050, at least 0.200 is needed; if this is an upright "
        )
        assert dark.meta is META
        assert dark.plausibility.gate_score == pytest.approx(0.05, abs=1e-5)
        assert (dark.plausibility.lung_area, bright.plausibility.lung_area) == (1.0, 0.0)
        assert dark.plausibility.lung_share is None

    def test_a_gate_that_flags_lets_everything_be_scored(self, classifier):
        done = classify([prepared(classifier, 0.05)], classifier, pytest.fail, refuses=False)
        assert done[0].gate.verdict.reason is Reason.NOT_FRONTAL_CHEST
        assert done[0].gate.verdict.flag is Flag.NOT_FRONTAL_CHEST

    def test_a_picture_that_is_no_number_costs_itself_only(self, classifier):
        ended = []
        items = [prepared(classifier, grey, n) for n, grey in enumerate((0.5, np.nan, 0.5), 1)]
        done = classify(items, classifier, lambda item, error: ended.append((item, error)))
        assert [one.prepared.claim.result_id for one in done] == [1, 3]
        assert [(item.claim.result_id, error.reason) for item, error in ended] == [
            (2, Reason.INTERNAL_ERROR)
        ]

    def test_the_gate_sees_the_models_input_where_it_is_the_same(self, classifier):
        item = prepared(classifier, 0.5)
        same = replace(item, gate_tensor=None, tensor=np.full((64, 64, 1), 0.05, np.float32))
        ended = []
        assert classify([same], classifier, lambda *pair: ended.append(pair)) == []
        assert ended[0][1].reason is Reason.NOT_FRONTAL_CHEST

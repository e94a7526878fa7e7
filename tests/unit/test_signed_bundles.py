"""Signed bundles: with `trusted_keys`, no byte of a model runs without a trusted signature."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from importlib import resources
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from lungwatch.bundle import read_bundle
from lungwatch.cli.main import main
from lungwatch.daemon.config import Config
from lungwatch.daemon.pipeline.model import BundlePolicy, Classifier, find_bundle
from lungwatch.errors import ConfigError, ModelError
from lungwatch.models import SHIPPED_STATEMENTS

SHIPPED = Path(str(resources.files("lungwatch.models")))
NAME = "baseline-1.1.0"
# A field that no reader of the format knows, and that every reader has to skip.
UNKNOWN_FIELD = b"\xf8\xff\x01\x01"


def lungwatch(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words):
    """Run a command that has to fail in one line, and return that line."""
    done = lungwatch(*words)
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("lungwatch: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with two key pairs, `ours` and `theirs`; `trusted/` has the first's public half."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        assert lungwatch("model", "keygen", folder / name).exit_code == 0
    (folder / "trusted").mkdir()
    shutil.copy(folder / "ours.pub", folder / "trusted")
    return folder


@pytest.fixture(scope="module")
def trust(keys):
    return BundlePolicy.of(Config(trusted_keys=str(keys / "trusted")))


@pytest.fixture(scope="module")
def original(tmp_path_factory, keys):
    """A bundle that is not a shipped one, signed by `ours`."""
    bundle = tmp_path_factory.mktemp("signed") / NAME
    copy_of_shipped(bundle)
    assert lungwatch("model", "sign", bundle, "--key", keys / "ours").exit_code == 0
    return bundle


@pytest.fixture
def bundle(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / NAME))


def copy_of_shipped(bundle):
    """Lay out the shipped model with one more field: other bytes, the same answers."""
    shutil.copytree(SHIPPED / NAME, bundle)
    model = (bundle / "model.onnx").read_bytes() + UNKNOWN_FIELD
    (bundle / "model.onnx").write_bytes(model)
    about = json.loads((bundle / "bundle.json").read_text())
    about["sha256"]["model.onnx"] = hashlib.sha256(model).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(about))


class TestKeys:
    def test_the_private_half_is_its_owners_alone_and_never_overwritten(self, tmp_path):
        made = lungwatch("model", "keygen", tmp_path / "key", "--json")
        assert made.exit_code == 0
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
        before = (tmp_path / "key").read_bytes()
        assert "exists already" in refused("model", "keygen", tmp_path / "key")
        (tmp_path / "key.pub").unlink()
        assert "exists already" in refused("model", "keygen", tmp_path / "key")
        assert (tmp_path / "key").read_bytes() == before
        assert list(tmp_path.iterdir()) == [tmp_path / "key"]

    def test_the_fingerprint_is_what_other_tools_say(self, keys, trust):
        key = serialization.load_pem_public_key((keys / "ours.pub").read_bytes())
        der = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert set(trust.keys) == {hashlib.sha256(der).hexdigest()}

    def test_a_passphrase_is_needed_again(self, tmp_path, bundle):
        for name, text in (("right", "correct horse\n"), ("wrong", "x"), ("empty", "\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o600)
        key = tmp_path / "key"
        assert "no passphrase" in refused(
            "model", "keygen", key, "--passphrase-file", tmp_path / "empty"
        )
        assert (
            lungwatch("model", "keygen", key, "--passphrase-file", tmp_path / "right").exit_code
            == 0
        )
        assert b"ENCRYPTED" in key.read_bytes()
        sign = ("model", "sign", bundle, "--key", key)
        assert "--passphrase-file" in refused(*sign)
        assert "passphrase is wrong" in refused(*sign, "--passphrase-file", tmp_path / "wrong")
        assert lungwatch(*sign, "--passphrase-file", tmp_path / "right").exit_code == 0

    def test_a_private_key_that_others_may_read_is_not_used(self, keys, tmp_path, bundle):
        shutil.copy(keys / "ours", tmp_path / "open")
        (tmp_path / "open").chmod(0o644)
        assert "chmod 600" in refused("model", "sign", bundle, "--key", tmp_path / "open")

    @pytest.mark.parametrize(
        ("content", "mode", "said"),
        [
            (None, 0o644, "cannot be read"),
            (b"", 0o644, "no public key"),
            (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", 0o644, "damaged"),
            (b"x" * 100_000, 0o644, "too large"),
            ("private", 0o644, "holds a private key"),
            ("elliptic curve", 0o644, "not Ed25519"),
            ("public", 0o646, "everybody may change"),
        ],
    )
    def test_what_is_no_trustworthy_list_of_keys_stops_the_start(
        self, keys, tmp_path, content, mode, said
    ):
        """It does not mean that everything is trusted, nor nothing: it is said."""
        if content == "elliptic curve":
            public = generate_private_key(SECP256R1()).public_key()
            content = public.public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        named = {"private": "ours", "public": "ours.pub"}
        if isinstance(content, str):
            content = (keys / named[content]).read_bytes()
        path = tmp_path / "key.pem"
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)
        with pytest.raises(ConfigError, match=said):
            BundlePolicy.of(Config(trusted_keys=str(path)))

    def test_a_folder_without_keys_is_said_to_be(self, tmp_path):
        (tmp_path / "README").write_text("no key")
        with pytest.raises(ConfigError, match=r"ends in \.pem or \.pub"):
            BundlePolicy.of(Config(trusted_keys=str(tmp_path)))

    def test_one_file_may_hold_several(self, keys, tmp_path):
        both = (keys / "ours.pub").read_bytes() + (keys / "theirs.pub").read_bytes()
        (tmp_path / "both").write_bytes(both)
        assert len(BundlePolicy.of(Config(trusted_keys=str(tmp_path / "both"))).keys) == 2


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put_consistent_model(bundle):
    """An attacker makes model and digest agree, and leaves the old signature."""
    signature = (bundle / "bundle.sig").read_bytes()
    model = (bundle / "model.onnx").read_bytes() + UNKNOWN_FIELD
    (bundle / "model.onnx").write_bytes(model)
    about = json.loads((bundle / "bundle.json").read_text())
    about["sha256"]["model.onnx"] = hashlib.sha256(model).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(about))
    (bundle / "bundle.sig").write_bytes(signature)


def put_signature_of_another_bundle(bundle, keys):
    other = bundle.parent / "other" / NAME
    copy_of_shipped(other)
    (other / "card.md").write_text("# Another card\n")
    about = json.loads((other / "bundle.json").read_text())
    about["sha256"]["card.md"] = hashlib.sha256(b"# Another card\n").hexdigest()
    (other / "bundle.json").write_text(json.dumps(about))
    assert lungwatch("model", "sign", other, "--key", keys / "ours").exit_code == 0
    shutil.copy(other / "bundle.sig", bundle)


def claim_a_trusted_key(bundle, keys, trust):
    """Signed by `theirs`, under the fingerprint of `ours`."""
    assert lungwatch("model", "sign", bundle, "--key", keys / "theirs").exit_code == 0
    fields = json.loads((bundle / "bundle.sig").read_text())
    fields["key"] = next(iter(trust.keys))
    (bundle / "bundle.sig").write_text(json.dumps(fields))


def put_link_to_elsewhere(bundle):
    shutil.move(bundle, bundle.parent / "elsewhere")
    (bundle.parent / "elsewhere" / "bundle.sig").unlink()
    bundle.symlink_to("elsewhere")


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def put_fifo(path):
    path.unlink()
    os.mkfifo(path)


ATTACKS = {
    "model altered": (lambda b, k, t: flip(b / "model.onnx"), "altered since"),
    "model and digest altered": (lambda b, k, t: put_consistent_model(b), "altered since"),
    "model of another, linked": (
        lambda b, k, t: (
            (b / "model.onnx").unlink(),
            (b / "model.onnx").symlink_to(SHIPPED / NAME / "model.onnx"),
        ),
        "altered since",
    ),
    "model a fifo": (lambda b, k, t: put_fifo(b / "model.onnx"), "not a regular file"),
    "bundle.json altered": (
        lambda b, k, t: (b / "bundle.json").write_text((b / "bundle.json").read_text() + " "),
        "altered since",
    ),
    "bundle.json no object": (lambda b, k, t: (b / "bundle.json").write_text("[]"), "altered"),
    "card altered": (lambda b, k, t: flip(b / "card.md"), "altered since"),
    "card removed": (lambda b, k, t: (b / "card.md").unlink(), "altered since"),
    "not signed": (lambda b, k, t: (b / "bundle.sig").unlink(), "not signed"),
    "signature of another bundle": (
        lambda b, k, t: put_signature_of_another_bundle(b, k),
        "altered since",
    ),
    "signed by a stranger": (
        lambda b, k, t: lungwatch("model", "sign", b, "--key", k / "theirs"),
        "is not trusted",
    ),
    "stranger with a trusted name": (claim_a_trusted_key, "altered since"),
    "signature cut": (lambda b, k, t: cut(b / "bundle.sig", 150), "damaged"),
    "signature empty": (lambda b, k, t: cut(b / "bundle.sig", 0), "damaged"),
    "signature nested": (
        lambda b, k, t: (b / "bundle.sig").write_text("[" * 100_000),
        "damaged",
    ),
    "signature huge": (
        lambda b, k, t: (b / "bundle.sig").write_bytes(bytes(5 << 20)),
        "larger than",
    ),
    "link to an unsigned one": (lambda b, k, t: put_link_to_elsewhere(b), "not signed"),
}


class TestRefusal:
    @pytest.mark.parametrize("attack", ATTACKS)
    def test_before_onnxruntime_sees_a_byte(self, bundle, keys, trust, attack, monkeypatch):
        change, said = ATTACKS[attack]
        change(bundle, keys, trust)
        monkeypatch.setattr(
            onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("it was parsed")
        )
        with pytest.raises(ModelError, match=said) as error:
            Classifier.load(bundle, trust=trust)
        assert "\n" not in str(error.value)

    def test_one_signed_bundle_does_not_pass_under_the_name_of_another(self, bundle, trust):
        """Else who may write to the folder could put an older version in a newer one's place."""
        renamed = bundle.rename(bundle.parent / "guided-1.1.0")
        with pytest.raises(ModelError, match=r"signed as 'baseline.*', not as 'guided"):
            Classifier.load(renamed, trust=trust)

    def test_the_line_says_what_to_do(self, bundle, keys):
        (bundle / "bundle.sig").unlink()
        home = bundle.parent / "home"
        (home / "models").mkdir(parents=True)
        (home / "lungwatch.toml").write_text(f'trusted_keys = "{keys / "trusted"}"\n')
        for command in ("verify", "show"):
            line = refused("model", command, bundle, "--home", home)
            assert "lungwatch model sign" in line
            assert "trusted_keys" in line
        shutil.copytree(bundle, home / "models" / "mine-1")
        listed = json.loads(lungwatch("model", "list", "--json", "--home", home).stdout)
        errors = {entry["bundle"]: entry["error"] for entry in listed}
        assert "refused" in errors.pop("mine-1")
        assert set(errors.values()) == {None}


class TestAcceptance:
    def test_a_bundle_that_a_trusted_key_signed_is_loaded_and_its_signer_named(
        self, bundle, keys, trust
    ):
        home = bundle.parent / "home"
        env = {"LUNGWATCH_TRUSTED_KEYS": str(keys / "trusted")}
        (signer,) = trust.keys
        told = CliRunner().invoke(
            main, ["model", "verify", str(bundle), "--home", str(home)], env=env
        )
        assert told.exit_code == 0, told.output
        assert f"signed by {signer} (trusted)" in told.stdout
        told = lungwatch("model", "verify", bundle, "--home", home, "--json")
        assert json.loads(told.stdout)["signer"] == signer
        assert json.loads(told.stdout)["trusted"] is False

    def test_a_link_is_judged_by_what_it_leads_to(self, original, tmp_path, trust):
        (tmp_path / NAME).symlink_to(original)
        assert Classifier.load(tmp_path / NAME, trust=trust).contract.id == NAME

    def test_what_was_checked_is_what_runs(self, bundle, trust, monkeypatch):
        """The file is exchanged between the check and the load, which notices nothing of it."""
        model, gate = ((bundle / f"{name}.onnx").read_bytes() for name in ("model", "gate"))
        check, given = BundlePolicy.check, []

        def check_and_exchange(self, files):
            check(self, files)
            for name in ("model", "gate"):
                (bundle / f"{name}.onnx").write_bytes(b"something else")

        make = onnxruntime.InferenceSession
        monkeypatch.setattr(BundlePolicy, "check", check_and_exchange)
        monkeypatch.setattr(
            onnxruntime, "InferenceSession", lambda data, **k: given.append(data) or make(data, **k)
        )
        classifier = Classifier.load(bundle, trust=trust)
        assert (bundle / "model.onnx").read_bytes() == b"something else"
        assert sorted(given) == sorted([model, gate])
        assert classifier.sha256 == hashlib.sha256(model).hexdigest()

    def test_only_what_is_what_it_says_is_signed(self, bundle, keys):
        before = (bundle / "bundle.sig").read_bytes()
        flip(bundle / "card.md")
        assert "SHA-256 differs" in refused("model", "sign", bundle, "--key", keys / "ours")
        shutil.copy(SHIPPED / NAME / "card.md", bundle)
        renamed = bundle.rename(bundle.parent / "other-1.0.0")
        assert "the same name" in refused("model", "sign", renamed, "--key", keys / "ours")
        assert (renamed / "bundle.sig").read_bytes() == before
        assert "cannot read" in refused("model", "sign", bundle, "--key", keys / "ours")


class TestShipped:
    def test_the_package_vouches_for_exactly_what_ships(self):
        """After a bundle was made anew, `SHIPPED_STATEMENTS` takes what this says is there."""
        there = {
            path.name: hashlib.sha256(read_bundle(path).statement()).hexdigest()
            for path in SHIPPED.iterdir()
            if (path / "model.onnx").is_file()
        }
        assert there == SHIPPED_STATEMENTS

    def test_they_need_no_signature_wherever_they_lie(self, tmp_path, trust):
        copy = tmp_path / "models" / NAME
        shutil.copytree(SHIPPED / NAME, copy)
        for place in (SHIPPED / NAME, copy):
            assert Classifier.load(place, trust=trust).contract.id == NAME

    def test_an_altered_copy_is_not_one_of_them(self, tmp_path, trust):
        copy = tmp_path / NAME
        copy_of_shipped(copy)
        with pytest.raises(ModelError, match="not signed"):
            Classifier.load(copy, trust=trust)

    def test_no_other_bundle_takes_the_place_of_one_by_its_name(self, tmp_path):
        copy_of_shipped(tmp_path / "models" / NAME)
        assert find_bundle(NAME, tmp_path) == SHIPPED / NAME


def test_a_model_whose_weights_lie_outside_of_its_file_is_not_run(tmp_path, monkeypatch):
    """What is outside is not signed."""
    onnx = pytest.importorskip("onnx")
    weights = onnx.TensorProto(
        name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "w.bin"), ("length", "8")):
        weights.external_data.add(key=key, value=value)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", 1, [2])],
        [value("y", 1, [2])],
        [weights],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    (tmp_path / "w.bin").write_bytes(bytes(8))
    (tmp_path / "model.onnx").write_bytes(model)
    digests = {"model.onnx": hashlib.sha256(model).hexdigest()}
    (tmp_path / "bundle.json").write_text(json.dumps({"sha256": digests}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="is not a model that can be run"):
        Classifier.load(tmp_path)


def test_a_daemon_without_trusted_keys_does_not_load_the_cryptography():
    code = "import sys, lungwatch.daemon.service; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

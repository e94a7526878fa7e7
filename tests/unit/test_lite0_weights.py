"""EfficientNet-Lite0's ImageNet weights come whole out of the package, and nothing else does."""

import importlib.util
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from lungwatch.errors import MissingExtraError, ModelError
from lungwatch.training.networks.weights import read_state_dict

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")

from lungwatch.training.networks.backbones import (  # noqa: E402
    EFFICIENTNET_LITE0,
    load_backbone,
)
from lungwatch.training.networks.weights import (  # noqa: E402
    PACKAGE,
    build_lite0,
)

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"needs {PACKAGE} (extra 'lite0')"
)


class Named:
    """Pickles as a bare reference to a global of that name."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class TorchPickler(pickle._Pickler):
    """Writes globals by name, whether they exist or not, and storages as PyTorch does."""

    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Named):
            return super().save(obj, save_persistent_id)
        self.write(f"c{obj.module}\n{obj.name}\n".encode())
        if obj.arguments:
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        return None


def torch_file(path, tensors, storages):
    """Write PyTorch's first format: tensors as given, storages as (key, array)."""
    with path.open("wb") as stream:
        machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        for part in (0x1950A86A20F9469CFC6C, 1001, machine, OrderedDict(tensors)):
            TorchPickler(stream, 2).dump(part)
        pickle.dump([key for key, _ in storages], stream, 2)
        for _, array in storages:
            stream.write(struct.pack("<q", array.size) + array.tobytes())
    return path


def tensor(key, length, shape, strides, offset=0):
    storage = ("storage", Named("torch", "FloatStorage"), key, "cpu", length, None)
    return Named("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, None)


def test_tensors_come_out_with_their_strides_and_offsets(tmp_path):
    values = np.arange(12, dtype="<f4")
    file = torch_file(
        tmp_path / "weights.pth",
        {"plain": tensor("1", 12, (3, 4), (4, 1)), "turned": tensor("1", 12, (2, 3), (1, 4), 1)},
        [("1", values)],
    )
    found = read_state_dict(file)
    np.testing.assert_array_equal(found["plain"], values.reshape(3, 4))
    np.testing.assert_array_equal(found["turned"], values.reshape(3, 4)[:, 1:3].T)


def test_a_file_that_names_anything_but_tensors_is_refused_and_runs_nothing(tmp_path):
    touched = tmp_path / "touched"
    file = torch_file(
        tmp_path / "evil.pth", {"x": Named("pathlib", "Path.touch", touched.as_posix())}, []
    )
    with pytest.raises(ModelError, match=r"names pathlib\.Path\.touch"):
        read_state_dict(file)
    assert not touched.exists()


def test_strides_that_lead_out_of_the_file_a_short_file_and_noise_are_refused(tmp_path):
    values = np.arange(4, dtype="<f4")
    out = torch_file(tmp_path / "out.pth", {"x": tensor("1", 4, (4,), (2,))}, [("1", values)])
    whole = torch_file(tmp_path / "whole.pth", {"x": tensor("1", 4, (4,), (1,))}, [("1", values)])
    short = tmp_path / "short.pth"
    short.write_bytes(whole.read_bytes()[:-4])
    noise = tmp_path / "noise.pth"
    noise.write_bytes(b"noise")
    for file in (out, short, noise, tmp_path / "nowhere.pth"):
        with pytest.raises(ModelError, match=rf"{file.name} is no PyTorch weights file"):
            read_state_dict(file)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lungwatch.training.networks.weights.PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingExtraError, match=r"lungwatch\[lite0\]"):
        load_backbone(EFFICIENTNET_LITE0, "imagenet", 64)


def test_random_weights_need_no_package_and_any_size_gives_maps_of_a_32nd():
    assert build_lite0(64, imagenet=False).output_shape == (None, 2, 2, 1280)
    assert load_backbone(EFFICIENTNET_LITE0, "none", 33).model.output_shape == (None, 2, 2, 1280)


@needs_package
def test_the_packages_weights_fill_the_network_and_tell_pictures_apart():
    model = build_lite0(64, imagenet=True, classes=1000)
    assert model.count_params() == 4_694_024
    for name in ("stem_bn", "b9_dw_bn", "head_bn"):
        scale, _, _, variance = model.get_layer(name).get_weights()
        assert min(np.abs(scale - 1).max(), np.abs(variance - 1).max()) > 0.05
    rng = np.random.default_rng(0)
    logits = np.asarray(model(rng.normal(0, 0.5, (4, 64, 64, 3)).astype(np.float32)))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


@needs_package
def test_the_package_gives_the_network_that_was_converted_and_checked_elsewhere():
    """Features and predictions agree to 1e-4 with a conversion made by other code."""
    name = os.environ.get("LUNGWATCH_TEST_WEIGHTS")
    if not name:
        pytest.skip("LUNGWATCH_TEST_WEIGHTS does not name the folder of converted weights")
    theirs = keras.models.load_model(Path(name) / "efficientnet_lite0_imagenet.keras")
    ours = build_lite0(224, imagenet=True, classes=1000)
    features = [
        keras.Model(model.input, [model.get_layer(layer).output, model.output])
        for model, layer in ((ours, "head_relu"), (theirs, "re_lu_32"))
    ]
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    for mine, known in zip(*(model(pictures, training=False) for model in features), strict=True):
        found, expected = np.asarray(mine), np.asarray(known)
        np.testing.assert_allclose(found, expected, atol=1e-4)

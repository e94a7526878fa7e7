"""A backbone is fed as it was trained, frozen and thawed as told, and refused with a reason."""

import json
import shutil

import numpy as np
import pytest

from lungwatch.errors import ConfigError, ModelError, NotFoundError
from lungwatch.training.fitting.frozen import FINE_TUNED, FROZEN, best_phase
from lungwatch.training.fitting.trainer import FitState

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")

import h5py  # noqa: E402
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group  # noqa: E402

from lungwatch.training.networks.backbones import (  # noqa: E402
    BACKBONE,
    EFFICIENTNET_LITE0,
    Standardisation,
    TransferConfig,
    backbone_names,
    blocks_of,
    build_transfer,
    imagenet_grey,
    input_scaling,
    load_backbone,
    unfreeze,
)
from lungwatch.training.networks.heads import FEATURES  # noqa: E402
from lungwatch.training.networks.weights import (  # noqa: E402
    build_lite0,
    read_h5,
)


def small_network(channels=3):
    """Two convolutions with batch norm, for 24 x 24 px, and a classifier that must go."""
    picture = keras.Input((24, 24, channels))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(picture)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.ReLU(max_value=6.0)(x)
    x = keras.layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(picture, keras.layers.Dense(5)(x))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "small.keras"
    model = small_network()
    model.get_layer("norm").moving_mean.assign(np.linspace(-0.2, 0.2, 8))
    model.save(file)
    return file


def config(weights, **changes):
    return TransferConfig(
        backbone=EFFICIENTNET_LITE0, weights=str(weights), size_px=32, dense_units=8, **changes
    )


def state(*losses):
    best = min(range(len(losses)), key=losses.__getitem__)
    return FitState(
        epoch=len(losses),
        best_epoch=best + 1,
        best_val_loss=losses[best],
        history=[{"epoch": i + 1, "val_loss_calibrated": v} for i, v in enumerate(losses)],
    )


def test_fine_tuning_is_kept_if_it_lowers_the_validation_loss_and_epochs_count_through():
    kept, joined = best_phase({FROZEN: state(0.5, 0.4), FINE_TUNED: state(0.6, 0.3, 0.35)})
    assert kept == FINE_TUNED
    assert (joined.epoch, joined.best_epoch, joined.best_val_loss) == (5, 4, 0.3)
    assert [row["epoch"] for row in joined.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tuned", [(0.6, 0.5), (0.4,)], ids=["worse", "no better"])
def test_the_frozen_network_is_kept_if_fine_tuning_does_not_help(tuned):
    kept, joined = best_phase({FROZEN: state(0.5, 0.4), FINE_TUNED: state(*tuned)})
    assert kept == FROZEN
    assert joined.best_epoch == 2
    assert joined.epoch == 2 + len(tuned)


@pytest.mark.parametrize("name", ["ResNet50", "ResNet50V2", "DenseNet121", "EfficientNetB0"])
def test_grey_levels_reach_a_backbone_as_its_own_preprocessing_would_make_them(name):
    import sys

    own = sys.modules[getattr(keras.applications, name).__module__].preprocess_input
    scale, offset = (np.array(part) for part in input_scaling(name.lower()))
    grey = np.linspace(0, 1, 5)[:, np.newaxis, np.newaxis]
    expected = own(np.repeat(255.0 * grey, 3, axis=2))
    np.testing.assert_allclose(grey * scale + offset, expected, rtol=1e-5, atol=1e-4)


def test_efficientnet_lite0_is_fed_what_tensorflow_fed_it():
    scale, offset = (np.array(part) for part in input_scaling(EFFICIENTNET_LITE0))
    np.testing.assert_allclose(
        np.array([[0.0], [1.0]]) * scale + offset, [[-127 / 128] * 3, [1.0] * 3]
    )


def test_a_file_is_cut_at_its_last_feature_map_and_rebuilt_for_another_size(weights):
    backbone = load_backbone(EFFICIENTNET_LITE0, str(weights), 40).model
    assert backbone.input_shape == (None, 40, 40, 3)
    assert backbone.output_shape == (None, 10, 10, 16)
    whole = keras.models.load_model(weights).get_weights()[:-2]
    for ours, theirs in zip(backbone.get_weights(), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_trained_networks_backbone_serves_as_weights_again(weights, tmp_path):
    first = build_transfer(config(weights))
    first.save(tmp_path / "model.keras")
    again = build_transfer(config(tmp_path / "model.keras"))
    for ours, theirs in zip(
        again.get_layer(BACKBONE).get_weights(),
        first.get_layer(BACKBONE).get_weights(),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_the_backbone_starts_frozen_and_thaws_from_its_end(weights):
    model = build_transfer(config(weights))
    head = 4
    assert len(model.trainable_weights) == head
    unfreeze(model, 1)
    assert len(model.trainable_weights) == head + 2
    unfreeze(model, None)
    assert len(model.trainable_weights) == head + 3
    unfreeze(model, 99)
    assert len(model.trainable_weights) == head + 3


def test_what_is_frozen_stays_frozen_in_a_saved_network(weights, tmp_path):
    model = build_transfer(config(weights))
    unfreeze(model, 1)
    model.save(tmp_path / "half.keras")
    assert len(keras.models.load_model(tmp_path / "half.keras").trainable_weights) == 6


def test_fine_tuning_moves_convolutions_but_not_batch_norms_statistics(weights, tmp_path):
    model = build_transfer(config(weights))
    unfreeze(model, None)
    model.save(tmp_path / "whole.keras")
    model = keras.models.load_model(tmp_path / "whole.keras")
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    backbone = model.get_layer(BACKBONE)
    before = backbone.get_weights()
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.random((8, 32, 32, 1), np.float32), np.ones((8, 1), np.float32))
    kernel, *norm, last, bias = backbone.get_weights()
    np.testing.assert_array_equal(norm, before[1:5])
    for now, then in ((kernel, before[0]), (last, before[5]), (bias, before[6])):
        assert np.abs(now - then).max() > 0


def test_maps_for_explanation_are_named_and_keep_the_backbones_cells(weights):
    model = build_transfer(config(weights))
    assert model.get_layer(FEATURES).output.shape == (None, 8, 8, 16)
    assert model.output_shape == (None, 1)


def test_what_cannot_be_a_backbone_is_refused_with_a_reason(weights, tmp_path):
    with pytest.raises(ConfigError, match=r"no backbone 'resnet5'.*ResNet50V2"):
        load_backbone("resnet5", "none", 64)
    with pytest.raises(NotFoundError, match=r"nowhere\.keras"):
        load_backbone(EFFICIENTNET_LITE0, str(tmp_path / "nowhere.keras"), 64)
    with pytest.raises(ConfigError, match=r"nowhere\.h5.*nor a file"):
        load_backbone("MobileNetV2", str(tmp_path / "nowhere.h5"), 64)
    (tmp_path / "noise.keras").write_bytes(b"noise")
    with pytest.raises(ModelError, match=r"noise\.keras"):
        load_backbone(EFFICIENTNET_LITE0, str(tmp_path / "noise.keras"), 64)
    small_network(channels=1).save(tmp_path / "grey.keras")
    with pytest.raises(ConfigError, match="takes 1 channels, not 3"):
        load_backbone(EFFICIENTNET_LITE0, str(tmp_path / "grey.keras"), 64)


def test_weights_of_a_run_with_another_backbone_are_refused_with_both_names(weights, tmp_path):
    shutil.copy(weights, tmp_path / "model.keras")
    used = {"network": {"backbone": "EfficientNet-Lite0"}}
    (tmp_path / "config.json").write_text(json.dumps(used), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"backbone EfficientNet-Lite0, not MobileNetV2"):
        load_backbone("MobileNetV2", str(tmp_path), 32)
    assert load_backbone(EFFICIENTNET_LITE0, str(tmp_path), 32).model.input_shape[1] == 32
    with pytest.raises(ConfigError, match="at least 1 block"):
        config(weights, unfreeze=0)
    assert {"ResNet50V2", "DenseNet121", EFFICIENTNET_LITE0} <= set(backbone_names())


def test_a_networks_blocks_are_found_by_its_layers_names():
    names = [block.name for block in blocks_of(build_lite0(32, imagenet=False))]
    assert names == [f"b{number}" for number in range(16)]


def test_unfreezing_names_the_layers_that_learn_and_takes_what_follows_the_last_block_along():
    backbone = build_lite0(32, imagenet=False)
    picture = keras.Input((32, 32, 3))
    backbone.name = BACKBONE
    model = keras.Model(picture, backbone(picture))
    assert unfreeze(model, 1) == ["b15_exp", "b15_dw", "b15_pw", "head"]
    assert unfreeze(model, 2)[:3] == ["b14_exp", "b14_dw", "b14_pw"]
    assert unfreeze(model, 16)[0] == "stem"


@pytest.mark.parametrize("saved", ["whole", "weights"])
def test_an_h5_file_with_another_classifier_fills_the_backbone(saved, tmp_path):
    """As CheXNet's are passed on: DenseNet121 with 14 classes, whole or weights alone."""
    body = small_network()
    picture = body.input
    pooled = body.layers[-2].output
    whole = keras.Model(picture, keras.layers.Dense(14, activation="sigmoid")(pooled))
    file = tmp_path / "chex.h5"
    if saved == "whole":
        whole.save(file)
        found = read_h5(file, small_network)
    else:
        with h5py.File(file, "w") as content:
            save_weights_to_hdf5_group(content, whole)
        features = keras.Model(body.input, body.layers[-3].output)
        found = read_h5(file, lambda: keras.models.clone_model(features))
    for ours, theirs in zip(found.get_weights()[:7], whole.get_weights()[:7], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_h5_weights_of_another_network_are_refused(tmp_path):
    file = tmp_path / "other.h5"
    with h5py.File(file, "w") as content:
        save_weights_to_hdf5_group(content, small_network(channels=1))
    with pytest.raises(ConfigError, match="weights of another network"):
        read_h5(file, small_network)
    (tmp_path / "noise.h5").write_bytes(b"noise")
    with pytest.raises(ModelError, match=r"noise\.h5"):
        read_h5(tmp_path / "noise.h5", small_network)


def test_grey_levels_are_standardised_to_imagenets_mean_and_spread():
    pixels = keras.Input((4, 4, 1))
    model = keras.Model(pixels, imagenet_grey(pixels, Standardisation(mean=0.6, std=0.2)))
    levels = np.full((3, 4, 4, 1), [[[[0.6]]]], np.float32)
    levels[1], levels[2] = 0.8, 0.4
    found = np.asarray(model(levels))[:, 0, 0, 0]
    np.testing.assert_allclose(found, [0.449, 0.449 + 0.226, 0.449 - 0.226], atol=1e-6)
    assert imagenet_grey(pixels, None) is pixels

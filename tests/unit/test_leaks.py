"""No X-ray and no patient of the other splits stays in the training set unless asked for."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from lungwatch.errors import DatasetError
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.duplicates import apply_leaks


def picture(seed, shape=(90, 80)):
    coarse = np.random.default_rng(seed).uniform(0.1, 0.9, (14, 12)).astype(np.float32)
    image = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 1)


def prepared(images, fit="stretch"):
    spec = PreprocessSpec(size_px=64, fit=fit)
    return np.stack([preprocess(image, spec) for image in images])


def samples(split, count, **patients):
    return [
        Sample(
            path=Path(f"{split}-{n}.png"),
            finding="COVID" if n % 2 else "NORMAL",
            split=split,
            source="a",
            patient=patients.get(f"at{n}", ""),
        )
        for n in range(count)
    ]


COPIES = {
    "same": lambda image: image,
    "cropped": lambda image: image[5:-5, 4:-4],
    "darker": lambda image: image**1.4 * 0.8,
}


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_a_training_image_that_is_tested_is_dropped_and_no_other(change, fit):
    train = [picture(n) for n in range(6)]
    others = [picture(10), change(train[2]), picture(11)]
    kept = apply_leaks(
        samples("train", 6), prepared(train, fit), samples("test", 3), prepared(others, fit), "drop"
    )
    assert kept == [0, 1, 3, 4, 5]


def test_a_copy_that_shows_more_than_the_training_image_is_a_leak_too():
    train, others = [picture(0)[6:-6, 5:-5], picture(1)], [picture(0)]
    arguments = samples("train", 2), prepared(train), samples("val", 1), prepared(others)
    assert apply_leaks(*arguments, "drop") == [1]


def test_refusing_names_the_first_pair_the_number_and_what_to_do():
    train = [picture(n) for n in range(4)]
    arguments = (samples("train", 4), prepared(train), samples("val", 1), prepared([train[3]]))
    with pytest.raises(DatasetError) as refused:
        apply_leaks(*arguments, "refuse")
    for words in ("train-3.png (train)", "val-0.png (val)", "1 of 4", "--leaks drop", "split"):
        assert words in str(refused.value)
    assert apply_leaks(*arguments, "allow") == [0, 1, 2, 3]


def test_a_patient_on_both_sides_is_a_leak_and_one_without_a_name_is_not():
    train = samples("train", 3, at1="p7")
    others = samples("test", 2, at0="p7")
    pixels = prepared([picture(n) for n in range(5)])
    assert apply_leaks(train, pixels[:3], others, pixels[3:], "drop") == [0, 2]
    with pytest.raises(DatasetError, match="of one patient"):
        apply_leaks(train, pixels[:3], others, pixels[3:], "refuse")


def test_nothing_left_to_train_on_is_refused():
    pixels = prepared([picture(0)])
    with pytest.raises(DatasetError, match="every training image"):
        apply_leaks(samples("train", 1), pixels, samples("test", 1), pixels, "drop")


def test_pictures_of_one_aspect_are_not_alike_because_of_their_padding():
    images = [picture(n, (40, 90)) for n in range(12)]
    kept = apply_leaks(
        samples("train", 6),
        prepared(images[:6], "pad"),
        samples("test", 6),
        prepared(images[6:], "pad"),
        "refuse",
    )
    assert kept == list(range(6))

"""Copies of an X-ray are found whatever was done to them; other X-rays are not taken for copies."""

import cv2
import numpy as np
import pytest

from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.duplicates import (
    Fingerprints,
    clusters,
    find_duplicates,
    similar,
    together,
)
from lungwatch.training.data.scan import scan


def chest(seed):
    """Two dark lungs on a bright body, alike in all, with ribs and spots of their own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:240, 0:220].astype(np.float32)
    image = np.full(y.shape, 170.0, np.float32)
    for centre in (65, 155):
        image -= 110 * np.exp(-(((x - centre) / 32) ** 2) - ((y - 120) / 70) ** 2)
    spots = rng.normal(0, 1, (30, 27)).astype(np.float32)
    image += 22 * cv2.resize(spots, (220, 240), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


def looks_of(folder, images, **more):
    samples = []
    for name, image in images.items():
        assert cv2.imwrite(str(folder / name), image)
        samples.append(Sample(path=folder / name, finding="COVID", **more.get(name, {})))
    looks, unreadable = scan(samples)
    assert not unreadable
    return looks


COPIES = {
    "resized": lambda image: cv2.resize(image, (160, 170), interpolation=cv2.INTER_AREA),
    "brighter and flatter": lambda image: (image * 0.7 + 40).astype(np.uint8),
    "noisy": lambda image: np.clip(
        image + np.random.default_rng(5).normal(0, 6, image.shape), 0, 255
    ).astype(np.uint8),
    "labelled": lambda image: cv2.putText(
        image.copy(), "R", (10, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 255, 2
    ),
    "slightly cropped": lambda image: image[3:-4, 4:-2],
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_an_altered_copy_is_found_among_other_x_rays(tmp_path, change):
    images = {f"{seed}.png": chest(seed) for seed in range(12)} | {"copy.png": change(chest(4))}
    (pair,) = find_duplicates(looks_of(tmp_path, images))
    assert (pair.first, pair.second, pair.identical) == (4, 12, False)


def recompressed(image, quality):
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)


def cropped(image, share):
    rows, columns = (round(share * side) for side in image.shape)
    return image[rows:-rows, columns:-columns]


VARIANTS = {
    "half the size": lambda image: cv2.resize(image, (110, 120), interpolation=cv2.INTER_AREA),
    "square": lambda image: cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR),
    "cropped by 5 %": lambda image: cropped(image, 0.05),
    "cropped by 10 %": lambda image: cropped(image, 0.10),
    "cropped below": lambda image: image[: round(0.86 * len(image))],
    "gamma": lambda image: (255 * (image / 255) ** 0.6).astype(np.uint8),
    "equalised": cv2.equalizeHist,
    "JPEG 30": lambda image: recompressed(image, 30),
    "all together": lambda image: recompressed(
        (cropped(cv2.resize(image, (200, 210)), 0.06) * 0.8 + 20).astype(np.uint8), 50
    ),
}


def test_of_all_variants_of_twelve_x_rays_95_of_100_are_found_and_no_other_pair():
    originals = [chest(seed) for seed in range(12)]
    whole = Fingerprints.of(thumbnails(originals))
    found, false = 0, []
    for change in VARIANTS.values():
        changed = Fingerprints.of(thumbnails([change(image) for image in originals]))
        pairs = [(i, j) for i, j, _ in similar(whole, changed)]
        found += sum(i == j for i, j in pairs)
        false += [pair for pair in pairs if pair[0] != pair[1]]
    assert false == []
    assert found >= 0.95 * len(originals) * len(VARIANTS)


def thumbnails(images):
    shrunk = [
        cv2.resize(image.astype(np.float32) / 255, (64, 64), interpolation=cv2.INTER_AREA)
        for image in images
    ]
    return np.stack(shrunk)


def test_a_recompressed_copy_is_found(tmp_path):
    images = {"a.png": chest(1), "b.png": chest(2), "c.jpg": chest(1)}
    (pair,) = find_duplicates(looks_of(tmp_path, images))
    assert (pair.first, pair.second, pair.identical) == (0, 2, False)


def test_identical_bytes_are_called_identical(tmp_path):
    looks = looks_of(tmp_path, {"a.png": chest(1), "b.png": chest(1)})
    (pair,) = find_duplicates(looks)
    assert pair.identical


def test_different_x_rays_are_no_pairs(tmp_path):
    assert find_duplicates(looks_of(tmp_path, {f"{n}.png": chest(n) for n in range(30)})) == []


def test_links_join_into_one_group_through_a_common_member():
    assert clusters(6, [(4, 2), (5, 4), (0, 1)]) == [0, 0, 2, 3, 2, 2]


def test_a_patient_and_a_copy_join_their_images_and_sources_keep_patients_apart(tmp_path):
    images = {f"{n}.png": chest(n) for n in range(4)} | {"4.png": chest(1)[1:-1, 1:-1]}
    who = {
        "0.png": {"patient": "p", "source": "a"},
        "1.png": {"patient": "p", "source": "a"},
        "2.png": {"patient": "p", "source": "b"},
    }
    looks = looks_of(tmp_path, images, **who)
    assert together(looks, find_duplicates(looks)) == [0, 0, 2, 3, 0]

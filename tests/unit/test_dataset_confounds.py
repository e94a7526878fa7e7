"""Confounds: features outside the lungs that predict the class, found only where planted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungwatch.training.data.check import find_confounds, verdict
from lungwatch.training.data.dataset import Sample
from lungwatch.training.data.scan import ScannedImage

pytest.importorskip("sklearn", reason="needs scikit-learn (extra 'train')")


def looks_of(count, *, source="", seed=0, **by_class):
    """Half COVID, half NORMAL; `columns` and `grey` may differ between them."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        finding = ("COVID", "NORMAL")[index % 2]
        columns = by_class.get("columns", {}).get(finding, 500) + int(rng.integers(-20, 20))
        histogram = rng.dirichlet(np.ones(32)).astype(np.float32)
        grey = by_class.get("grey", {}).get(finding)
        if grey is not None:
            histogram[grey] += 1
        found.append(
            ScannedImage(
                sample=Sample(path=Path(f"{source}{index}"), finding=finding, source=source),
                sha256=f"{source}{index}",
                format="PNG",
                rows=500,
                columns=columns,
                mean=0.5,
                std=0.2,
                p01=0.0,
                p50=0.5,
                p99=1.0,
                border=0.0,
                text_marks=0,
                histogram=histogram,
                thumbnail=rng.uniform(0, 1, (64, 64)).astype(np.float32),
                patient_id=None,
            )
        )
    return found


def areas(looks, groups=None, **more):
    found = find_confounds(looks, groups or list(range(len(looks))), **more)
    return {(c.among, c.against, c.feature): c.roc_auc for c in found}


def test_the_size_that_betrays_the_class_is_named_and_the_border_is_not():
    looks = looks_of(80, columns={"COVID": 300})
    found = areas(looks)
    assert found["all images", "all others", "size"] > 0.99
    assert found["all images", "all others", "border"] < 0.75
    sentence = verdict(find_confounds(looks, list(range(80))))
    assert "can be predicted without the lungs" in sentence
    assert "size" in sentence


def test_a_histogram_that_betrays_the_class_is_found():
    found = areas(looks_of(80, grey={"COVID": 3, "NORMAL": 20}))
    assert found["all images", "all others", "histogram"] > 0.99


def test_what_only_tells_the_sources_apart_vanishes_within_a_source():
    small = looks_of(120, source="a", columns={"COVID": 300, "NORMAL": 300})
    large = looks_of(120, source="b", seed=1)
    # Most of the one source has COVID, most of the other has not.
    looks = small[::2] + small[1:30:2] + large[1::2] + large[:30:2]
    found = areas(looks)
    assert found["all images", "all others", "size"] > 0.75
    assert found["source a", "all others", "size"] < 0.75
    assert found["source b", "all others", "size"] < 0.75


def test_children_who_are_all_normal_do_not_count_among_adults():
    looks = looks_of(80)
    adults = [True] * 80 + [False] * 40
    children = [
        replace(k, columns=200, sample=replace(k.sample, finding="NORMAL"))
        for k in looks_of(40, seed=3)
    ]
    found = areas(looks + children, adults=adults)
    assert found["all images", "all others", "size"] > found["adults", "all others", "size"]
    assert found["adults", "all others", "size"] < 0.75


def test_copies_on_both_sides_of_a_fold_would_betray_the_class_so_groups_prevent_it():
    rng = np.random.default_rng(0)
    looks, groups = [], []
    for index in range(20):
        finding = ("COVID", "NORMAL")[index % 2]
        thumbnail = rng.uniform(0, 1, (64, 64)).astype(np.float32)
        base = looks_of(1, seed=index)[0]
        for _ in range(5):
            sample = replace(base.sample, finding=finding)
            looks.append(replace(base, thumbnail=thumbnail, sample=sample))
            groups.append(index)
    apart = areas(looks, list(range(100)))
    together = areas(looks, groups)
    key = ("all images", "all others", "border")
    assert apart[key] > 0.95
    assert together[key] < 0.9


def test_too_few_images_give_no_figure_and_say_so():
    assert find_confounds(looks_of(2), [0, 1]) == []
    assert find_confounds([], []) == []
    assert "Too few" in verdict([])


def test_the_same_seed_gives_the_same_figures():
    looks = looks_of(40, columns={"COVID": 490})
    assert areas(looks, seed=4) == areas(looks, seed=4)

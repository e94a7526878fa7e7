"""No group crosses a split, classes stay alike, and what cannot be split is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungwatch.errors import DatasetError
from lungwatch.training.data.dataset import SPLITS, Sample
from lungwatch.training.data.scan import ScannedImage
from lungwatch.training.data.splits import split_groups

KINDS = st.sampled_from(["COVID", "NORMAL", "OTHER_PNEUMONIA"])


def look(index, finding, source=""):
    return ScannedImage(
        sample=Sample(path=Path(f"{index}.png"), finding=finding, source=source),
        sha256=str(index),
        format="PNG",
        rows=8,
        columns=8,
        mean=0.5,
        std=0.1,
        p01=0.0,
        p50=0.5,
        p99=1.0,
        border=0.0,
        text_marks=0,
        histogram=np.zeros(32, np.float32),
        thumbnail=np.zeros((64, 64), np.float32),
        patient_id=None,
    )


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(
        st.tuples(KINDS, st.sampled_from("ab"), st.integers(0, 25)), min_size=1, max_size=120
    ),
    seed=st.integers(0, 5),
)
def test_no_group_crosses_a_split_and_no_split_lacks_a_class_or_it_is_refused(images, seed):
    looks = [look(n, finding, source) for n, (finding, source, _) in enumerate(images)]
    groups = [group for _, _, group in images]
    try:
        splits = split_groups(looks, groups, val=0.2, test=0.2, seed=seed)
    except DatasetError:
        # That it names the split is held below.
        return
    assert len(splits) == len(looks)
    where = {}
    for group, split in zip(groups, splits, strict=True):
        assert where.setdefault(group, split) == split
    for split in SPLITS:
        there = {k.sample.positive for k, s in zip(looks, splits, strict=True) if s == split}
        assert there == {True, False}
    assert splits == split_groups(looks, groups, val=0.2, test=0.2, seed=seed)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 4), min_size=60, max_size=60))
def test_classes_and_sources_are_shared_out_as_asked(seed, sizes):
    looks, groups = [], []
    for group, size in enumerate(sizes):
        for _ in range(size):
            finding = ("COVID", "NORMAL", "OTHER_PNEUMONIA")[group % 3]
            looks.append(look(len(looks), finding, "ab"[group % 2]))
            groups.append(group)
    splits = split_groups(looks, groups, val=0.2, test=0.2, seed=seed)
    total = Counter(k.sample.finding for k in looks)
    there = Counter((k.sample.finding, s) for k, s in zip(looks, splits, strict=True))
    for (finding, split), count in there.items():
        share = 0.6 if split == "train" else 0.2
        # Whole patients are placed: up to one of them, of four images, may be too many.
        assert abs(count - share * total[finding]) <= 4


@pytest.mark.parametrize(
    ("findings", "groups", "message"),
    [
        (["COVID"] * 9, range(9), "one class only"),
        (["COVID", "NORMAL"] * 5, [0] * 10, "'val' is empty|'test' is empty|holds one class"),
        (["COVID", "NORMAL"], [0, 1], "one class only|is empty"),
    ],
)
def test_what_leaves_a_split_empty_or_of_one_class_is_refused_by_its_name(
    findings, groups, message
):
    looks = [look(n, finding) for n, finding in enumerate(findings)]
    with pytest.raises(DatasetError, match=message):
        split_groups(looks, list(groups), val=0.2, test=0.2, seed=1)

"""The card's section on quantisation."""

from collections.abc import Mapping
from typing import Any

_QUANTISED = """\
The convolutions count in int8; the head, the maps and the answers in float. Calibration and
threshold were fitted to this graph's own answers. Held against the float network, ROC-AUC of
both, the difference of the calibrated probabilities, decisions that change (UNCERTAIN counted
as one) and the likeness of the maps:"""

_QUANTISED_LIMIT = """\
Measured on the processor of the export. One without VNNI instructions may saturate in its
integer sums and answer a little otherwise; that was not measured."""


def quantisation_markdown(about: Mapping[str, Any]) -> str:
    """Draw the section, from what `lungwatch.export.int8` put into the contract."""
    rows = [
        "| set | images | float | int8 | loss | largest | mean | changed | cosine | correlation |",
        "|---" * 10 + "|",
    ]
    for name, found in about["fidelity"].items():
        maps = (found["map_cosine"], found["map_correlation"])
        likeness = " | ".join("none" if value is None else f"{value:.3f}" for value in maps)
        rows.append(
            f"| {name} | {found['images']} | {found['roc_auc_float']:.4f} | "
            f"{found['roc_auc_int8']:.4f} | {found['loss']:.4f} | "
            f"{found['probability_largest']:.3f} | {found['probability_mean']:.4f} | "
            f"{found['decisions_changed']} | {likeness} |"
        )
    for name, found in about.get("findings", {}).items():
        rows.append(
            f"\nROC-AUC of the finding `{name}` on validation: {found['roc_auc_float']:.4f}, in "
            f"int8 {found['roc_auc_int8']:.4f}."
        )
    made = (
        f"{about['convolutions']} convolutions; weights {about['weights']}; activations "
        f"{about['activations']}, range by {about['calibration']} over "
        f"{sum(about['images'].values())} training images; "
        f"{about['bytes_float'] / 1e6:.1f} MB became {about['bytes_int8'] / 1e6:.1f} MB "
        f"(onnxruntime {about['onnxruntime']})."
    )
    return "\n\n".join([_QUANTISED, "\n".join(rows), made, _QUANTISED_LIMIT])

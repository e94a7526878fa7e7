"""The section of a model card on the content gate: its checks, what they do, what they cannot."""

from collections.abc import Mapping, Sequence
from typing import Any

from lungwatch.gate import GateContract
from lungwatch.training.gate_checks import FAMILIAR, FRONTAL, LUNGS, POLARITY, UPRIGHT

_ASKS = {
    FRONTAL: "is it a frontal chest X-ray, however it lies?",
    UPRIGHT: "is it upright? (else turned by 90°, 180° or 270°)",
    POLARITY: "is air dark? (else the grey values are inverted)",
    LUNGS: "is enough of the picture lung? (0.5 stands for 5 %)",
    FAMILIAR: "is it near the X-rays that the gate learnt from? (0.5 stands for the largest "
    "distance that passes)",
}

_WHAT = """\
Before the network is asked, a second one says whether the picture can be judged at all. A picture
is refused by the first check whose score is below its threshold."""

_RULE = """\
Thresholds are chosen on the X-rays of the validation split, each at three exposures, and on no
picture that has to be refused: the 0.2 % quantile of each chance, but within 0.5 to 0.8; and 1.25
times the 99.5 % quantile of the distances, but at least 5."""

_RATES = """\
Rates of the shipped file on pictures read as the daemon reads them; what is refused while reading
counts as refused."""

_MADE = """\
- What has to be refused was made: X-rays turned, inverted, cut to pieces, laid over one another;
  noise, text, shapes, phantoms of bones and slices. No picture of another part of the body was
  learnt from."""

_LIMITS = """\
- The gate knows adults and children of the collections above. It was not measured on newborns, on
  X-rays taken lying on the side (decubitus), after the removal of a lung, or of animals, and hardly
  on photographs of films.
- It asks whether a picture can be judged, not whether the answer is right: nothing is said of
  exposure, motion or a foreign body.
- A mirrored chest passes, and one that is tilted by up to about 25°.
- The pictures that it refuses here are of few kinds and collections. Another kind may pass.
- Distances between embeddings tell collections apart too. A hospital whose X-rays look otherwise
  may be refused more often than these figures say: `lungwatch evaluate --gate-images DIR` tells,
  and `gate = "flag"` keeps such images with a remark."""


def gate_markdown(gate: GateContract) -> str:
    """Describe a gate in Markdown, from its contract alone."""
    about, spec = gate.provenance, gate.preprocess
    parts = [
        (
            f"{_WHAT} Input: {spec.size_px} x {spec.size_px} px, fit '{spec.fit}', intensity "
            f"'{spec.intensity}' ({spec.low_percentile:g} to {spec.high_percentile:g} %)."
        ),
        _checks_table(gate),
    ]
    if thresholds := about.get("thresholds"):
        least, most = gate.lung_area
        parts.append(
            f"{_RULE} Here the largest distance is {thresholds['distance']:g}; a typical training "
            "image has 1. The flag `partial_lungs` is set where the lungs are cut off, less than "
            f"{least:.1%} or more than {most:.1%} of the picture (0.5 % and 99.5 % quantiles of "
            "the training images)."
        )
    if rows := gate.metrics.get("rates"):
        parts += [_RATES, rates_table(rows)]
    parts += ["Limits of the gate:", _LIMITS]
    if about:
        parts.append("How the gate was made:\n\n" + _making(about))
    return "\n\n".join(parts)


def rates_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw what was kept and refused, failures first to be seen."""
    lines = [
        "| pictures of | copies | should be | pictures | right | wrong | refused as |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        count, kept = row["pictures"], row["kept"]
        right = kept if row["expected"] == "kept" else count - kept
        often = sorted(row["refused"].items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = ", ".join(f"{reason} {number}" for reason, number in often) or "none"
        lines.append(
            f"| {row['pictures_of']} | {row['copies']} | {row['expected']} | {count} "
            f"| {right / count:.1%} | {count - right} | {reasons} |"
        )
    return "\n".join(lines)


def _checks_table(gate: GateContract) -> str:
    lines = ["| check | asks | passes from | else refused as |", "|---|---|---|---|"]
    lines += [
        f"| {check.name} | {_ASKS.get(check.name, '')} | {check.threshold:g} | {check.reason} |"
        for check in gate.checks
    ]
    return "\n".join(lines)


def _making(about: Mapping[str, Any]) -> str:
    data, masks, fit = about["data"], about["data"]["masks"], about["fit"]
    count = sum(data["train"].values())
    lines = [
        (
            f"- {about['family']}, cut in its middle, from ImageNet; {about['parameters']:,} "
            f"parameters. {about['backend']}. Pictures were {about['pictures']}."
        ),
        (
            f"- It learnt from {count} X-rays of `{data['name']}` (training split; findings are "
            f"not used) and {masks['train']} X-rays with lungs drawn by hand: {fit['mask_steps']} "
            "steps on the drawings, which found the lungs of all others, then from the start "
            f"{fit['steps']} on everything; batches of {fit['batch_size']}, AdamW, learning rate "
            f"{fit['learning_rate']:g}, seed {fit['seed']}."
        ),
        _MADE,
    ]
    if dropped := data.get("dropped", 0) + masks.get("dropped", 0):
        lines.append(f"- {dropped} images that show an X-ray of another split were left out.")
    if others := masks.get("of_other_splits"):
        lines.append(
            f"- {others} of the X-rays with drawn lungs show an X-ray of the validation or test "
            "split, so the rates of these splits are a little too good."
        )
    terms = "; ".join(f"{name} ({number})" for name, number in data["licences"].items())
    lines.append(f"- Terms of the training images (number of images): {terms}.")
    if quantisation := about.get("quantisation"):
        lines.append(
            f"- Quantised: weights {quantisation['weights']}, activations "
            f"{quantisation['activations']}, {quantisation['convolutions']} convolutions, "
            f"{quantisation['bytes_float'] / 1e6:.1f} MB to {quantisation['bytes_int8'] / 1e6:.1f} "
            f"MB; the chances differ from the float network's by {quantisation['chance_mean']:.4f} "
            f"on average (onnxruntime {quantisation['onnxruntime']})."
        )
    return "\n".join(lines)

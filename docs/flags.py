"""Generator of the table in flags.md, from `lungwatch.errors`, the rules here and the tests."""

import re
from pathlib import Path

from lungwatch.errors import FLAGS

PAGE = Path(__file__).with_suffix(".md")
TESTS = Path(__file__).parents[1] / "tests"
BEGIN = "<!-- The table is written by flags.py. -->\n"
END = "<!-- end of the table -->\n"

RULES: dict[str, str] = {
    "view_unknown": "no attribute names a view",
    "decubitus": "the view, its codes or a description say that the patient lay on the side",
    "body_part_unknown": "neither Body Part Examined nor a region's code names the chest, or they "
    "name it as one part among others",
    "description_disagrees": "a series, study or procedure description names another part of the "
    "body, a lateral view, an animal or a derived image",
    "orientation_corrected": "Patient Orientation is not L\\F: turned or mirrored before scoring, "
    "also in overlay and map",
    "depth_corrected": "depth, sign, alignment or byte order contradicts the pixels, which decide; "
    "or a PNG or JPEG is shown from its lowest to its highest value",
    "table_ignored": "a Modality or VOI LUT that is broken, or with which the picture is not "
    "visible, was left out; the next table, the window or the rescale slope is used",
    "window_ignored": "a window with which the picture is not visible was left out",
    "frame_removed": "a uniform frame (letterbox, collimation, a viewer's panels) was cut off, as "
    "in training",
    "shutter_applied": "a display shutter is stated: hidden pixels are black",
    "shutter_ignored": "a display shutter without its geometry, or one that leaves less than a "
    "fifth of the image, was left out",
    "low_detail": "rows or columns fewer than the model's input has, or, at the input's size, "
    "structures of 1 to 2 pixels weaker than 0.135 of those of 2 to 8 (enlarged or blurred)",
    "text_burnt_in": "4 or more letters in a line, 5 to 40 px high where the longest side "
    "is 1024 px; side marks of up to 3 letters do not count",
    "partial_lungs": "lung area out of the bounds in the contract (`gate.lung_area`), less than "
    "0.15 of it in the left or right half of the picture, or lungs along 0.25 of an edge or more",
    "not_frontal_chest": "the gate's check of that reason is below its threshold, and `gate` is "
    "`flag`",
    "rotated": "as `not_frontal_chest`",
    "inverted": "as `not_frontal_chest`",
    "no_lungs": "as `not_frontal_chest`",
    "not_gated": "the model's bundle has no `gate.onnx`",
    "other_opacity": "the label is NEGATIVE, and the probability of the finding `opacity` is at or "
    "above that finding's threshold in the model's contract",
    "attention_outside_lungs": "`lung_share` below 0.5, the map for COVID is not empty, and the "
    "label is not NEGATIVE",
    "empty_map": "every cell of the map for the answer's class is 0",
}


def rendered(page: str) -> str:
    """Return the page with its table as the code has it."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def table() -> str:
    """Return a Markdown table, one row for each flag."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")}
    sources.pop("test_flags_docs.py", None)
    lines = ["| flag | says | rule | tests |", "|---|---|---|---|"]
    for flag, meaning in FLAGS.items():
        named = re.compile(rf"Flag\.{flag.name}\b|[\"']{flag.value}[\"']")
        tests = sorted(name for name, source in sources.items() if named.search(source))
        cells = (f"`{flag}`", meaning, RULES[flag], ", ".join(f"`{name}`" for name in tests))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

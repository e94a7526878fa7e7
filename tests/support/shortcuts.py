"""Drawn radiographs on which a shortcut can be planted, and linear models trained on them.

Two dark lungs on a bright body; COVID has bright spots in the lungs. A letter in the corner and
the view (a wider heart in AP) can be made to go with the finding, or not.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from sklearn.linear_model import LogisticRegression

from lungwatch.contract import Calibration, Decision, GateCheck, GateContract, Verdict
from lungwatch.errors import Reason
from lungwatch.preprocess import PreprocessSpec, preprocess
from lungwatch.training.evaluation.scorers import Judgement

SIDE = 96
SPEC = PreprocessSpec(size_px=32, intensity="as_is")
CELLS = 32
_Y, _X = np.mgrid[0:SIDE, 0:SIDE]
LUNGS = sum(((_X - x) / 15) ** 2 + ((_Y - 48) / 30) ** 2 < 1 for x in (28, 68)) > 0


def spot(x: float, y: float) -> np.ndarray:
    """A blurred spot around a point, in grey values."""
    return 70 * np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) / 60)


def draw(rng, *, covid: bool, letter: bool, ap: bool) -> np.ndarray:
    """Draw one, uint8 (96, 96)."""
    image = np.full((SIDE, SIDE), 165.0)
    image[SIDE - rng.integers(0, 17) :] = 60
    image[LUNGS] = 60
    if ap:  # the heart is wider and denser
        image[50:80, 44:52] += 60
    # Outside the lungs there are as many greys in between, so that a histogram tells little.
    for _ in range(rng.integers(0, 40)):
        dark = spot(rng.uniform(0, SIDE), rng.uniform(0, SIDE))
        image -= rng.uniform(0.3, 1.5) * dark * ~LUNGS
    if covid:
        for _ in range(4):
            image += spot(rng.choice([28, 68]) + rng.normal(0, 5), rng.normal(48, 12)) * LUNGS
    image += rng.normal(0, 8, image.shape) + rng.normal(0, 6)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if letter:
        cv2.putText(image, "L", (4, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 255, 2)
    return image


Plan = Callable[[np.random.Generator, bool], tuple[bool, bool]]


def independent(rng, covid: bool) -> tuple[bool, bool]:
    """Letter and view that have nothing to do with the finding."""
    del covid
    return rng.random() < 0.5, rng.random() < 0.5


def lettered(rng, covid: bool) -> tuple[bool, bool]:
    """A letter on every COVID image and on no other."""
    return covid, rng.random() < 0.5


def mostly_ap(rng, covid: bool) -> tuple[bool, bool]:
    """COVID mostly AP, the others mostly PA."""
    return rng.random() < 0.5, rng.random() < (0.7 if covid else 0.3)


def write_set(folder: Path, plan: Plan, *, count: int = 80, seed: int = 3) -> Path:
    """Write `count` images of either class from two sources, with a manifest."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for index in range(2 * count):
        covid = index % 2 == 0
        letter, ap = plan(rng, covid)
        name = f"{index:04d}.png"
        cv2.imwrite(str(folder / name), draw(rng, covid=covid, letter=letter, ap=ap))
        source = "ab"[index // 2 % 2]
        rows.append([name, "COVID" if covid else "NORMAL", source, "AP Supine" if ap else "PA"])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "source", "view"], *rows])
    return folder


class Linear:
    """A logistic regression on pixels; its embedding is what each block of pixels contributes."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, seen: np.ndarray) -> None:
        self._seen = seen.ravel()
        flat = images.reshape(len(images), -1)[:, self._seen]
        fitted = LogisticRegression(C=0.01, max_iter=500).fit(flat, targets)
        self._weights = np.zeros(self._seen.size, np.float32)
        self._weights[self._seen] = fitted.coef_[0]
        self._bias = float(fitted.intercept_[0])
        self.judgement = Judgement(
            name="linear",
            preprocess=SPEC,
            calibration=Calibration(),
            decision=Decision(threshold=0.5, uncertain_low=0.5, uncertain_high=0.5),
        )

    def logits(self, pixels):
        flat = pixels.reshape(len(pixels), -1)
        return (flat @ self._weights + self._bias).astype(np.float32)

    def embeddings(self, pixels):
        parts = (pixels.reshape(len(pixels), -1) * self._weights).reshape(-1, 8, 4, 8, 4)
        return parts.sum(axis=(2, 4)).reshape(len(pixels), -1).astype(np.float32)

    def maps(self, pixels):
        raw = np.maximum(self.embeddings(pixels).reshape(-1, 8, 8), 0)
        raw /= np.maximum(raw.max(axis=(1, 2), keepdims=True), 1e-6)
        return np.stack([np.zeros_like(raw), raw], axis=1)


def train(plan: Plan, *, of: str = "covid", lungs_only: bool = False, seed: int = 11) -> Linear:
    """Train on 400 drawn images: COVID against the rest, or (`of="view"`) AP against PA."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for index in range(400):
        covid = index % 2 == 0
        letter, ap = plan(rng, covid)
        pixels = draw(rng, covid=covid, letter=letter, ap=ap).astype(np.float32) / 255
        images.append(preprocess(pixels, SPEC))
        targets.append(covid if of == "covid" else ap)
    inside = cv2.resize(LUNGS.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA) > 0.99
    seen = inside if lungs_only else np.ones((32, 32), bool)
    return Linear(np.stack(images), np.array(targets), seen)


class LungFinder:
    """A content gate that passes everything and knows where the drawn lungs are."""

    contract = GateContract(
        preprocess=PreprocessSpec(size_px=32, intensity="as_is"),
        checks=(GateCheck(name="frontal", threshold=0.5, reason=Reason.NOT_FRONTAL_CHEST),),
        lungs_side_px=CELLS,
        lung_area=(0.1, 0.9),
        golden_scores=(0.9,),
        golden_lung_area=0.3,
    )

    def run(self, batch):
        verdict = Verdict(score=0.9, check="frontal", reason=None)
        field = cv2.resize(LUNGS.astype(np.float32), (CELLS, CELLS), interpolation=cv2.INTER_AREA)
        return [SimpleNamespace(verdict=verdict, lungs=field) for _ in batch]

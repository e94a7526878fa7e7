"""Homes, pictures and bundles for the tests of the real command in processes of its own.

What came of it is read from the command's own output, the folders and the SQLite file, as an
administrator would.
"""

import json
import os
import shutil
from functools import partial
from importlib import resources
from pathlib import Path

import pytest

from lungwatch.models import SHIPPED_DEFAULT
from tests.support.homes import Home
from tests.support.pictures import png
from tests.support.record import sha256


@pytest.fixture(scope="session")
def make_home(tmp_path_factory):
    """Make a new home, with settings of its own; drawn pictures are no X-rays, so flags only."""

    def make(**env: str):
        return Home(tmp_path_factory.mktemp("place") / "home", {"GATE": "flag", **env})

    return make


@pytest.fixture(scope="session")
def sample(find_testdata):
    """Return the bytes of one of pydicom's real files."""
    return lambda name: find_testdata(name).read_bytes()


@pytest.fixture(scope="session")
def picture():
    """A small PNG of a chest caricature, another one for each number."""
    return partial(png, side_px=160)


@pytest.fixture(scope="session")
def shipped_bundle():
    """The folder of the model that runs unless another one is named."""
    return Path(str(resources.files("lungwatch.models"))) / SHIPPED_DEFAULT


@pytest.fixture
def altered_bundle(shipped_bundle, tmp_path):
    """The shipped model with one bit turned over."""
    copy = Path(shutil.copytree(shipped_bundle, tmp_path / "altered"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    return copy


@pytest.fixture
def newer_bundle(shipped_bundle, tmp_path):
    """The shipped model in other bytes: to the record, another model that says the same."""
    copy = Path(shutil.copytree(shipped_bundle, tmp_path / "newer"))
    # A field that no reader of the format knows, and that every reader has to skip.
    data = (copy / "model.onnx").read_bytes() + b"\xf8\xff\x01\x01"
    (copy / "model.onnx").write_bytes(data)
    listed = json.loads((copy / "bundle.json").read_text())
    listed["sha256"]["model.onnx"] = sha256(data)
    (copy / "bundle.json").write_text(json.dumps(listed))
    return copy


@pytest.fixture
def has_no_privilege(tmp_path):
    """Skip a test about rights where this process has them all."""
    path = tmp_path / "secret"
    path.touch(mode=0)
    if os.access(path, os.R_OK):
        pytest.skip("this process, root's, reads and writes everything")

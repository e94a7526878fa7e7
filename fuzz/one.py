"""Fuzz one target in this process; `run.py` starts it. Needs atheris (extra `fuzz`)."""

import sys
import warnings

import atheris

# Coverage is of what is written here, and of the parser that it leans on.
with atheris.instrument_imports(include=["lungwatch.imaging", "lungwatch.contract"]):
    from targets import TARGETS

import logging

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
target, *arguments = sys.argv[1:]
atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
atheris.Fuzz()

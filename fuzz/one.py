"""Fuzz one target in this process; `run.py` starts it. Needs atheris (extra `fuzz`)."""

import logging
import sys
import warnings

import atheris

# Coverage is of what is written here, and of the parser that it leans on.
PARTS = ("imaging", "contract", "bundle", "signing", "daemon.config", "daemon.configfile")
with atheris.instrument_imports(include=[f"lungwatch.{part}" for part in PARTS]):
    from targets import TARGETS

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
target, *arguments = sys.argv[1:]
atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
atheris.Fuzz()

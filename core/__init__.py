"""lungwatch: drop-folder screening of chest X-rays. Research software, not a medical device."""

import os
from importlib.metadata import PackageNotFoundError, version

RESEARCH_USE_ONLY = "Research use only. Not a medical device."

# From 1.29 on, onnxruntime's Linux builds report to their maker unless this is set before the
# first import (microsoft/onnxruntime #27379). Nothing may leave a clinic's server unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    __version__ = version("lungwatch")
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "0+unknown"

__all__ = ["RESEARCH_USE_ONLY", "__version__"]

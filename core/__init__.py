"""lungwatch: drop-folder screening of chest X-rays. Research software, not a medical device."""

from importlib.metadata import PackageNotFoundError, version

RESEARCH_USE_ONLY = "Research use only. Not a medical device."

try:
    __version__ = version("lungwatch")
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "0+unknown"

__all__ = ["RESEARCH_USE_ONLY", "__version__"]

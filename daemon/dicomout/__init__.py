"""DICOM objects of a result for a PACS: Secondary Capture and Structured Report."""

from lungwatch.daemon.dicomout.build import BuiltObject, build_objects
from lungwatch.daemon.dicomout.facts import Kind, Predecessor, ReportClass, ResultFacts
from lungwatch.daemon.dicomout.source import SourceUnusable
from lungwatch.daemon.dicomout.validate import InvalidObject

__all__ = [
    "BuiltObject",
    "InvalidObject",
    "Kind",
    "Predecessor",
    "ReportClass",
    "ResultFacts",
    "SourceUnusable",
    "build_objects",
]

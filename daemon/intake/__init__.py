"""Intake: files of the drop folder, found, checked for completeness and claimed."""

"""Faults injected into the real daemon, and the proof that no file was lost or doubled.

Research software, not a medical device. Run with ``make chaos``; see docs/reliability.md.
"""

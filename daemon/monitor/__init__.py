"""Monitoring: health, metrics, the status port and drift."""

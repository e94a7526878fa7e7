"""Evaluation of networks: metrics, calibration, explanation maps, release gate and report."""

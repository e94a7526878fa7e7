"""Fitting of networks: trainer, augmentation, objectives, search.

And the data and results of a run.
"""

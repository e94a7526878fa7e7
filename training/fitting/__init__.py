"""Fitting of networks: trainer and tasks, augmentation, search, and the data of a run."""

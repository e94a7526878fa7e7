"""Data sets: images, labels, splits, checks and pictures of them."""

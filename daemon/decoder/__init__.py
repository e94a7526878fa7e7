"""Decoding in processes of its own: what a codec does to its process stays there."""

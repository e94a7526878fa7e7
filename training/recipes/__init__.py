"""Training recipes, one for each `lungwatch train` command.

A recipe takes the data set (`location`, see `load_dataset`), the run folder to fill (`root`), how
to train (`fitting`), whether to continue the run in that folder (`resume`), and listeners
(`progress`); `leave_out`, `leaks` and `labels` are those of `preparation.prepare`. It returns what
it writes to `metrics.json`.

A recipe raises DatasetError if a split is missing or empty, holds one class only, leaks, or a file
is unreadable; ConfigError if the folder holds another run, or a backbone is not available;
NotFoundError and ModelError if a network that it builds on is missing or damaged; and
MissingExtraError if TensorFlow or another package of the extra is not installed.
"""
